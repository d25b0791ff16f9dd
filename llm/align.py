"""Align a chat model: make better answers likelier, by preference pairs or by rewards."""

from collections.abc import Callable

from llm.artifact import ArtifactWriter, Json
from llm.config import AlignConfig, read_section
from llm.runtime.job import Job
from llm.training.dpo import dpo
from llm.training.grpo import grpo
from llm.training.processes import run_training_job

METHODS: dict[str, Callable[[Job, ArtifactWriter, AlignConfig], dict[str, Json]]] = {
    "dpo": dpo,
    "grpo": grpo,
}
"""By the setting `align.method`: train from the starting model and return the summary."""


def align(job: Job, writer: ArtifactWriter) -> dict[str, Json]:
    """Train from the starting model's weights by the method of the settings."""
    config = read_section(AlignConfig, job.settings)
    return METHODS[config.method](job, writer, config)


if __name__ == "__main__":
    run_training_job(align)
