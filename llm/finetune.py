"""Fine-tune a base model on chats, where only the assistant's tokens are targets."""

from pathlib import Path

from llm.artifact import ArtifactWriter, Json
from llm.config import FinetuneConfig, read_section
from llm.model.weights import load_model
from llm.runtime.job import STARTING_MODEL, Job
from llm.training.processes import run_training_job
from llm.training.run import train


def finetune(job: Job, writer: ArtifactWriter) -> dict[str, Json]:
    """Train from the base model's weights."""
    config = read_section(FinetuneConfig, job.settings)
    base = Path(job.inputs[STARTING_MODEL])
    # the packed sequences bring the mask of the assistant's tokens; all else is as in pretraining
    return train(job, writer, load_model(base), config, base)


if __name__ == "__main__":
    run_training_job(finetune)
