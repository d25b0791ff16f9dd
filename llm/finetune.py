"""Fine-tune a model on chats, where only the assistant's tokens are targets, or on text."""

from pathlib import Path

from llm.artifact import ArtifactWriter, Json
from llm.config import FinetuneConfig, read_section
from llm.model.weights import load_model
from llm.runtime.job import STARTING_MODEL, Job
from llm.tokenizer.load import load_tokenizer
from llm.training.embeddings import EmbeddingNoise, set_to_mean, untrained_tokens
from llm.training.processes import run_training_job
from llm.training.run import train


def finetune(job: Job, writer: ArtifactWriter) -> dict[str, Json]:
    """Train from the base model's weights."""
    config = read_section(FinetuneConfig, job.settings)
    base = Path(job.inputs[STARTING_MODEL])
    model, tokenizer = load_model(base), load_tokenizer(base)
    if config.new_token_embeddings == "mean":
        text_tokens = tokenizer.token_bytes.nonzero()[0].tolist()
        set_to_mean(model, untrained_tokens(tokenizer), text_tokens)
    if config.neftune_alpha:
        noise = EmbeddingNoise(
            alpha=config.neftune_alpha, bos_id=tokenizer.bos_id, pad_id=tokenizer.pad_id
        )
        noise.add_to(model)
    # the packed sequences bring the mask of the assistant's tokens; all else is as in pretraining
    return train(job, writer, model, config, base)


if __name__ == "__main__":
    run_training_job(finetune)
