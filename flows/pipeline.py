"""The map: from raw text to a chat model and its report, one line a stage."""

from llm.config import RunConfig
from tasks.stages import (
    PipelineStep,
    clean,
    download,
    evaluate,
    finetune,
    pack,
    pretrain,
    train_tokenizer,
)


def language_model(config: RunConfig) -> PipelineStep:
    """Return the last step, the report; every other step is an input of an input of it."""
    chats = clean(download("chats", config.download), config.clean)
    corpus = clean(download("corpus", config.download), config.clean, held_out=chats)
    tokenizer = train_tokenizer(corpus)
    text_sequences = pack(corpus, tokenizer)
    chat_sequences = pack(chats, tokenizer)
    base = pretrain(text_sequences, tokenizer)
    chat = finetune(base, chat_sequences)
    return evaluate(base, chat, text_sequences, chat_sequences, tokenizer)
