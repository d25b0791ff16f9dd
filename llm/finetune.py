"""Fine-tune a model on chats, where only the assistant's tokens are targets, or on text."""

from pathlib import Path

from llm.artifact import MANIFEST, ArtifactWriter, Json, read_manifest
from llm.config import FinetuneConfig, read_section
from llm.errors import ConfigError
from llm.model.weights import load_model
from llm.runtime.job import STARTING_MODEL, Job
from llm.tokenizer.load import load_tokenizer
from llm.training.embeddings import EmbeddingNoise, set_to_mean, untrained_tokens
from llm.training.processes import run_training_job
from llm.training.run import train


def finetune(job: Job, writer: ArtifactWriter) -> dict[str, Json]:
    """Train from the base model's weights.

    Raises:
        ConfigError: settings that contradict each other, or the starting model.
    """
    config = read_section(FinetuneConfig, job.settings)
    base = Path(job.inputs[STARTING_MODEL])
    model, tokenizer = load_model(base), load_tokenizer(base)
    if config.new_token_embeddings == "mean":
        _refuse_trained_on_chats(base, job.stage)
        text_tokens = tokenizer.token_bytes.nonzero()[0].tolist()
        set_to_mean(model, untrained_tokens(tokenizer, model.config.is_causal), text_tokens)
    if config.neftune_alpha:
        noise = EmbeddingNoise(
            alpha=config.neftune_alpha, bos_id=tokenizer.bos_id, pad_id=tokenizer.pad_id
        )
        noise.add_to(model)
    # the packed sequences bring the mask of the assistant's tokens; all else is as in pretraining
    return train(job, writer, model, config, base)


def _refuse_trained_on_chats(base: Path, stage: str) -> None:
    # an imported model has no manifest; its own tokens keep their embeddings (llm/exchange)
    if not (base / MANIFEST).exists():
        return
    if (found := read_manifest(base).summary.get("content", "text")) != "text":
        raise ConfigError(
            f"{stage}.new_token_embeddings: found mean, expected keep: the starting model was"
            f" trained on {found}, and would forget what its control tokens mean"
        )


if __name__ == "__main__":
    run_training_job(finetune)
