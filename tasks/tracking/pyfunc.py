"""MLflow pyfunc model: prompts in, completions out.

MLflow copies this file and the `llm` package into the logged model and runs it where the model is
loaded, so no pickle is involved. Nothing in this project imports it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext


class TrainedModel(PythonModel):
    """Completes each prompt; a chat model (`model_config["is_chat"]`) answers it."""

    def load_context(self, context: PythonModelContext) -> None:
        """Verify every file against the manifest, then load model and tokenizer.

        Raises:
            ArtifactError: a file is missing or damaged.
        """
        from llm.artifact import file_sha256, read_manifest
        from llm.errors import ArtifactError
        from llm.model.weights import load_model
        from llm.tokenizer.load import load_tokenizer

        folder = Path(context.artifacts["model"])
        for record in read_manifest(folder).files:
            path = folder / record.path
            if not path.is_file() or file_sha256(path) != record.sha256:
                raise ArtifactError(f"{path}: missing or damaged; log the model again")
        self._model = load_model(folder)
        self._tokenizer = load_tokenizer(folder)

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]  # it is typed as None there
        self,
        context: PythonModelContext,
        model_input: pandas.DataFrame,
        params: Mapping[str, Any] | None = None,
    ) -> pandas.DataFrame:
        """Complete each row of the column `prompt` into the column `completion`."""
        from llm.data.chat import Message, render_prompt
        from llm.inference.generate import generate_texts
        from llm.inference.options import GenerationOptions

        tokenizer = self._tokenizer
        prompts = [str(prompt) for prompt in model_input["prompt"]]
        if context.model_config["is_chat"]:
            ids = [render_prompt([Message(role="user", content=p)], tokenizer) for p in prompts]
        else:
            ids = [[tokenizer.bos_id, *text] for text in tokenizer.encode_batch(prompts)]
        stop_ids = (tokenizer.end_id, tokenizer.bos_id)
        options = GenerationOptions(stop_ids=stop_ids, **(params or {}))
        answers = generate_texts(self._model, tokenizer, ids, options)
        return pandas.DataFrame({"completion": answers})


set_model(TrainedModel())
