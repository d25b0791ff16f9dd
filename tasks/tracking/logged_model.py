"""Log a trained model to MLflow: weights, tokenizer and inference code, no pickle."""

import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import llm
from tasks.tracking.client import MlflowConnection

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel, Run
    from mlflow.models import ModelSignature

REQUIREMENTS = ("mlflow", "torch", "tokenizers", "safetensors", "numpy", "pyyaml", "accelerate")
CODE = Path(__file__).parent / "pyfunc.py"


def log_model(
    mlflow: MlflowConnection, run: "Run", folder: Path, name: str, *, is_chat: bool, step: int
) -> str:
    """Log the model in `folder` as an output of `run` and return its id. A second call finds it."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.entities.logged_model_status import LoggedModelStatus

    model = _find_or_create(mlflow, run, name)
    if model.status != LoggedModelStatus.READY:
        with tempfile.TemporaryDirectory(dir=mlflow.scratch_folder()) as scratch:
            path = Path(scratch) / "model"
            _save(path, model, folder, is_chat=is_chat)
            mlflow.client.log_model_artifacts(model.model_id, str(path))
        mlflow.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    if logged_model_id(mlflow, run.info.run_id) != model.model_id:
        output = LoggedModelOutput(model.model_id, step=step)
        mlflow.client.log_outputs(run.info.run_id, models=[output])
    return model.model_id


def logged_model_id(mlflow: MlflowConnection, run_id: str) -> str:
    """Return the id of the model that a run logged, or an empty string."""
    outputs = mlflow.client.get_run(run_id).outputs
    models = outputs.model_outputs if outputs is not None else []
    return models[-1].model_id if models else ""


def _find_or_create(mlflow: MlflowConnection, run: "Run", model_name: str) -> "LoggedModel":
    experiment_id, run_id = run.info.experiment_id, run.info.run_id
    found = mlflow.client.search_logged_models(
        [experiment_id], filter_string=f"source_run_id = '{run_id}'"
    )
    if found:
        return found[0]
    name = run.data.params.get("name", "model")
    return mlflow.client.create_logged_model(
        experiment_id,
        name=f"{name}-{model_name}",
        source_run_id=run_id,
        params=run.data.params,
        model_type=model_name,
    )


def _save(path: Path, model: "LoggedModel", folder: Path, *, is_chat: bool) -> None:
    """Write the bundle: MLflow's metadata, the model folder, our code."""
    import pandas
    from mlflow import pyfunc
    from mlflow.models import Model

    pyfunc.save_model(
        path,
        python_model=str(CODE),
        artifacts={"model": str(folder)},
        code_paths=[str(Path(llm.__file__).parent)],
        pip_requirements=[_pinned(name) for name in REQUIREMENTS],
        signature=_signature(),
        input_example=pandas.DataFrame({"prompt": ["Once upon a time"]}),
        model_config={"is_chat": is_chat},
        mlflow_model=Model(
            artifact_path=model.artifact_location,
            run_id=model.source_run_id,
            model_uuid=model.model_id,
            model_id=model.model_id,
        ),
    )


def _signature() -> "ModelSignature":
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    return ModelSignature(
        inputs=Schema([ColSpec("string", "prompt")]),
        outputs=Schema([ColSpec("string", "completion")]),
        params=ParamSchema(
            [
                ParamSpec("max_new_tokens", "long", 64),
                ParamSpec("temperature", "double", 0.0),
                ParamSpec("top_k", "long", 0),
                ParamSpec("top_p", "double", 1.0),
                ParamSpec("min_p", "double", 0.0),
                ParamSpec("repetition_penalty", "double", 1.0),
                ParamSpec("seed", "long", 0),
            ]
        ),
    )


def _pinned(package: str) -> str:
    """Return `package==version` without the local `+cpu`, which only torch's own index has."""
    return f"{package}=={metadata.version(package).partition('+')[0]}"
