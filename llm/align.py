"""Align a chat model: make better answers likelier, by preference pairs or by rewards."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from llm.artifact import ArtifactWriter, Json
from llm.config import AlignConfig, read_section
from llm.data.content import Content
from llm.data.packed import PackedSequences
from llm.errors import ConfigError, DataError
from llm.model.transformer import Transformer
from llm.model.weights import load_model
from llm.runtime.job import STARTING_MODEL, Job
from llm.training.dpo import dpo
from llm.training.grpo import grpo
from llm.training.processes import run_training_job


class Method(NamedTuple):
    """A way to align."""

    content: Content
    """What it reads: preference pairs; or chats, as prompts and reference answers."""
    train: Callable[[Job, ArtifactWriter, AlignConfig, Transformer], dict[str, Json]]
    """Trains the starting model and returns the summary."""


METHODS: dict[str, Method] = {
    "dpo": Method("preferences", dpo),
    "grpo": Method("chats", grpo),
}
"""By the setting `align.method`."""


def align(job: Job, writer: ArtifactWriter) -> dict[str, Json]:
    """Train from the starting model's weights by the method of the settings.

    Raises:
        ConfigError: a model that is not causal.
        DataError: sequences of something else than the method reads.
    """
    config = read_section(AlignConfig, job.settings)
    method = METHODS[config.method]
    folder = Path(job.inputs["sequences"])
    found = PackedSequences(folder, "train").layout.content
    if found != method.content:
        raise DataError(
            f"align.data: found {found} in {folder}, expected {method.content} for the method"
            f" {config.method}; name a dataset of {method.content}"
        )
    model = load_model(Path(job.inputs[STARTING_MODEL]))
    if not model.config.is_causal:
        raise ConfigError(
            "model.is_causal: found false, expected true for align: a masked language model gives"
            " no probability to an answer"
        )
    return method.train(job, writer, config, model)


if __name__ == "__main__":
    run_training_job(align)
