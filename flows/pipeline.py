"""The map: from raw text to a chat model and its report, one line a stage."""

from llm.config import RunConfig
from tasks.stages import (
    Step,
    clean,
    download,
    evaluate,
    finetune,
    pack,
    pretrain,
    train_tokenizer,
)


def language_model(config: RunConfig) -> Step:
    """Return the last step, the report; every other step is an input of an input of it."""
    chats = clean(download("chats", config.download), config.clean)
    corpus = clean(download("corpus", config.download), config.clean, held_out=chats)
    tokenizer = train_tokenizer(corpus)
    text_rows = pack(corpus, tokenizer)
    chat_rows = pack(chats, tokenizer)
    base = pretrain(text_rows, tokenizer)
    chat = finetune(base, chat_rows)
    return evaluate(base, chat, text_rows, chat_rows, tokenizer)
