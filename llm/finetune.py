"""Teach a base model to answer: train it on rows of chats, where only the assistant's words are
targets.
"""

from pathlib import Path

from llm.artifact import ArtifactWriter, Json
from llm.config import FinetuneConfig, read_section
from llm.model.weights import load_model
from llm.runtime.job import STARTING_MODEL, Job
from llm.training.processes import run_training_job
from llm.training.run import train


def finetune(job: Job, writer: ArtifactWriter) -> dict[str, Json]:
    """Go on from the base model's weights. The mask comes with the rows, so the loop is
    pretraining's.
    """
    config = read_section(FinetuneConfig, job.settings)
    base = Path(job.inputs[STARTING_MODEL])
    return train(job, writer, load_model(base), config, base)


if __name__ == "__main__":
    run_training_job(finetune)
