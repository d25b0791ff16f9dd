"""Tokenizers of every kind from a small corpus, and difficult pieces of text."""

import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as LibraryTokenizer

from llm.tokenizer.base import CONTROL_TOKENS, Tokenizer
from llm.tokenizer.bpe import ByteLevelBPE
from llm.tokenizer.characters import ByteTokenizer, CharacterTokenizer
from llm.tokenizer.load import load_tokenizer
from llm.tokenizer.sentencepiece import SentencePieceTokenizer

FRAGMENTS = (
    *CONTROL_TOKENS, "<|endoftext|>", "<unk>", "<s>", "</s>", "<0x41>", "\u2581", "\u2581the",
    "\u2047", "<|", "|>", "bos", " ", "  ", "\n", "\r\n", "\t", "\0", "a", "the", "é", "漢", "🎉",
    "7", "'s", "\ufeff", "\ufffd", "\ufdd0", "\U0010ffff", "e\u0301", "\u00a0", "\u3000", "\uff21",
)  # fmt: skip
MAKERS: dict[str, Callable[[list[str]], Tokenizer]] = {
    "bpe code": lambda texts: ByteLevelBPE.train(texts, 600),
    "bpe gpt2": lambda texts: ByteLevelBPE.train(texts, 600, "gpt2", 0),
    "bpe gpt4": lambda texts: ByteLevelBPE.train(texts, 600, "gpt4", 1),
    "characters": CharacterTokenizer.train,
    "bytes": lambda texts: ByteTokenizer(),
    "unigram": lambda texts: SentencePieceTokenizer.train(texts, 600, "unigram"),
    "sentencepiece bpe": lambda texts: SentencePieceTokenizer.train(texts, 600, "bpe"),
}


WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BEGIN = {
    "gpt2": "<|endoftext|>", "llama": "<|begin_of_text|>", "qwen3": "<|endoftext|>",
    "gemma": "<bos>",
}  # fmt: skip


def train_library(form: str, corpus: list[str]) -> LibraryTokenizer:
    """Train a tokenizer put together as the model family of that name has it."""
    if form == "gemma":
        return _train_pieces(corpus)
    made = LibraryTokenizer(models.BPE())
    if form == "gpt2":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.post_processor = processors.ByteLevel(trim_offsets=False)
    else:
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator(corpus, trainer)
    made.add_special_tokens([AddedToken(BEGIN[form], special=True)])
    if form == "llama":
        made.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN[form]} $A", special_tokens=[(BEGIN[form], 400)]
        )
    if form == "qwen3":
        made.normalizer = normalizers.NFC()
        made.add_tokens([AddedToken("<tool_call>", normalized=False)])
    return made


def _train_pieces(corpus: list[str]) -> LibraryTokenizer:
    """Train pieces with byte fallback, blanks as U+2581."""
    made = LibraryTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    names = ["<unk>", "<bos>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.pre_tokenizer = pre_tokenizers.Metaspace(split=True, prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False, special_tokens=names)
    made.train_from_iterator(corpus, trainer)
    parts = json.loads(made.to_str())
    parts["added_tokens"] = parts["added_tokens"][:3]  # bytes are no special tokens
    parts["pre_tokenizer"] = {
        "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
        "invert": False,
    }  # fmt: skip
    return LibraryTokenizer.from_str(json.dumps(parts))


def save_and_load(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    for name, data in tokenizer.to_files().items():
        (folder / name).write_bytes(data)
    return load_tokenizer(folder)
