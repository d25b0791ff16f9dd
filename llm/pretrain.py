"""Train a base model from random weights on rows of text."""

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
    """Make a model of the shape in the settings, draw its first weights and train it."""
    config = read_section(PretrainConfig, job.settings)
    layout = PackedSequences(Path(job.inputs["sequences"]), "train").layout
    model = Transformer(config.model, layout.vocab_size, layout.seq_len)
    # drawn on the CPU whatever trains them, so that a seed means the same weights everywhere
    model.initialize(torch.Generator().manual_seed(derive_seed(job.seed, "weights")))
    return train(job, writer, model, config, Path(job.inputs["tokenizer"]))


if __name__ == "__main__":
    run_training_job(pretrain)
