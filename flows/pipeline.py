"""The pipeline, from raw text to trained models and their report, one line a stage."""

from llm.config import RunConfig
from tasks.stages import (
    PipelineStep,
    clean,
    download,
    evaluate,
    pack,
    pretrain,
    train_further,
    train_tokenizer,
)


def language_model(config: RunConfig) -> PipelineStep:
    """Return the last step, the report, from which all others are reached as inputs."""
    chats = clean(download("chats", config.download), config.clean)
    corpus = clean(download("corpus", config.download), config.clean, held_out=chats)
    tokenizer = train_tokenizer(corpus)
    sequences = {"text": pack(corpus, tokenizer), "chats": pack(chats, tokenizer)}
    models = [pretrain(sequences["text"], tokenizer)]
    for stage in config.stages_after_pretrain:  # finetune
        models.append(train_further(stage, models[-1], sequences))
    return evaluate(models, sequences, tokenizer)
