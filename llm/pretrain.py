"""Train a base model from random weights on packed text."""

from pathlib import Path

import torch

from llm.artifact import ArtifactWriter, Json
from llm.config import PretrainConfig, read_section
from llm.data.packed import PackedSequences
from llm.model.transformer import Transformer
from llm.runtime.job import Job
from llm.seeds import derive_seed
from llm.training.processes import run_training_job
from llm.training.run import train


def pretrain(job: Job, writer: ArtifactWriter) -> dict[str, Json]:
    """Initialize a model of the configured shape and train it."""
    config = read_section(PretrainConfig, job.settings)
    layout = PackedSequences(Path(job.inputs["sequences"]), "train").layout
    model = Transformer(config.model, layout.vocab_size, layout.seq_len)
    # initialized on the CPU, so that a seed gives the same weights on every device
    model.initialize(torch.Generator().manual_seed(derive_seed(job.seed, "weights")))
    return train(job, writer, model, config, Path(job.inputs["tokenizer"]))


if __name__ == "__main__":
    run_training_job(pretrain)
