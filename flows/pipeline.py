"""The map: from raw text to a chat model and its report, one line a stage."""

from llm.config import DownloadConfig
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


def language_model(sources: DownloadConfig) -> Step:
    """Return the last step, the report; every other step is an input of an input of it."""
    corpus = clean(download("corpus", sources))
    chats = clean(download("chats", sources))
    tokenizer = train_tokenizer(corpus)
    text_rows = pack(corpus, tokenizer)
    chat_rows = pack(chats, tokenizer)
    base = pretrain(text_rows, tokenizer)
    chat = finetune(base, chat_rows)
    return evaluate(base, chat, text_rows, chat_rows, tokenizer)
