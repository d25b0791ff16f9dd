"""Byte-level BPE, trained and run by the library `tokenizers`.

Each of the 256 bytes is a token, so no text is unknown. The control tokens have the first ids; in
GPT-2's published vocabulary the last (llm/tokenizer/gpt2.py).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, cast

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as LibraryTokenizer

from llm.errors import ArtifactError
from llm.tokenizer.base import CONTROL_TOKENS, Ids, Tokenizer, refuse_lone_surrogates
from llm.tokenizer.pre_tokenization import (
    MAX_DIGITS,
    PRE_TOKENIZATIONS,
    library_pattern,
    split_text,
    word_finder,
)
from llm.tokenizer.word_cache import WordCache, encode_in_chunks

SEPARATOR = "\uffff"  # not a character; texts that contain it are encoded by the library
JOINED_WORDS = 100
GPT2_CONTROL_TOKENS = ("<|endoftext|>", *CONTROL_TOKENS[1:])


class ByteLevelBPE(Tokenizer):
    """Encode and decode with one vocabulary of byte-level tokens."""

    kind: ClassVar[str] = "bpe"

    def __init__(self, tokenizer: LibraryTokenizer, pre_tokenization: str, max_digits: int) -> None:
        tokenizer.encode_special_tokens = True  # the library neither defaults to it nor saves it
        assert tokenizer.encode_special_tokens
        self._tokenizer, self._pre_tokenization = tokenizer, pre_tokenization
        self._find_words = word_finder(pre_tokenization, max_digits)
        self._merger = _make_merger(tokenizer)
        self._words = WordCache(self._merge)
        super().__init__(
            tokenizer.get_vocab_size(with_added_tokens=True),
            sorted(tokenizer.get_added_tokens_decoder()),
        )

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        pre_tokenization: str = "code",
        max_digits: int = 3,
    ) -> "ByteLevelBPE":
        """Learn at most `vocab_size` tokens; fewer if the texts repeat nothing more."""
        tokenizer = make_library_tokenizer(models.BPE(), pre_tokenization, max_digits)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,  # a merge that occurs once only memorizes the text
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # else unseen bytes would vanish
            special_tokens=[AddedToken(token, special=True) for token in CONTROL_TOKENS],
        )
        chunks = (chunk for text in texts for chunk in split_text(text, pre_tokenization))
        tokenizer.train_from_iterator(chunks, trainer)
        return cls.from_json(_parts(tokenizer))

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "ByteLevelBPE":
        """Make a tokenizer from the fields that `to_json` wrote, or raise ArtifactError."""
        try:
            tokenizer = LibraryTokenizer.from_str(json.dumps(fields))
        except Exception as error:  # the library raises the bare class
            raise ArtifactError(f"the library cannot read it ({error})") from error
        found = _parts(tokenizer)
        pre_tokenization, max_digits = _find_pre_tokenization(found)
        if problem := _difference(found, pre_tokenization, max_digits):
            raise ArtifactError(problem)
        return cls(tokenizer, pre_tokenization, max_digits)

    def to_json(self) -> bytes:
        return self._tokenizer.to_str(pretty=True).encode() + b"\n"

    def library_json(self) -> dict[str, Any]:
        return _parts(self._tokenizer)

    def encode_arrays(self, texts: Sequence[str]) -> list[Ids]:
        try:
            return encode_in_chunks(
                texts, lambda text: split_text(text, self._pre_tokenization), self._encode_chunks
            )
        except TypeError:
            refuse_lone_surrogates(texts)
            raise

    def _encode_chunks(self, chunks: Sequence[str]) -> list[Ids]:
        """Encode by words where Python's engine splits as the library's does, else by it."""
        split = [self._find_words(chunk) for chunk in chunks]
        by_words = iter(self._words.encode([words for words in split if words is not None]))
        by_library = iter(
            self._encode_by_library(
                [chunk for chunk, words in zip(chunks, split, strict=True) if words is None]
            )
        )
        return [next(by_library if words is None else by_words) for words in split]

    def _merge(self, words: Sequence[str]) -> tuple[Ids, npt.NDArray[np.int64]]:
        """Encode words, joined: the library's overhead per text is twice its cost per word."""
        texts = [
            SEPARATOR.join(words[start : start + JOINED_WORDS])
            for start in range(0, len(words), JOINED_WORDS)
        ]
        encodings = self._merger.encode_batch_fast(texts, add_special_tokens=False)
        ids = np.concatenate([np.array(encoding.ids, dtype=np.uint32) for encoding in encodings])
        byte_ends = np.cumsum([len(word.encode()) for word in words])
        ends = np.searchsorted(self.token_bytes[ids].cumsum(), byte_ends) + 1
        return ids, np.diff(ends, prepend=0)

    def _encode_by_library(self, texts: Sequence[str]) -> list[Ids]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    @cached_property
    def bytes_of_token(self) -> list[bytes]:
        bytes_of = {ord(character): byte for byte, character in enumerate(byte_characters())}
        table = [b""] * self.vocab_size
        for token, index in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if index not in self.control_ids:
                table[index] = token.translate(bytes_of).encode("latin-1")
        return table


def byte_characters() -> list[str]:
    """Return the printable character that stands for each of the 256 bytes in the vocabulary.

    Source: GPT-2, `bytes_to_unicode`: printable Latin-1 as itself, the rest from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def make_library_tokenizer(
    model: models.BPE, pre_tokenization: str = "code", max_digits: int = 0
) -> LibraryTokenizer:
    """Return a byte-level tokenizer around `model`, without control tokens."""
    tokenizer = LibraryTokenizer(model)
    pattern = Regex(library_pattern(pre_tokenization, max_digits))
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, behavior="isolated"), to_bytes]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _make_merger(tokenizer: LibraryTokenizer) -> LibraryTokenizer:
    """Return an encoder of words joined by SEPARATOR, with the model of `tokenizer`."""
    merger = LibraryTokenizer(tokenizer.model)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merger.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(SEPARATOR, behavior="removed"), to_bytes]
    )
    return merger


def _find_pre_tokenization(found: Mapping[str, Any]) -> tuple[str, int]:
    """Return the `pre_tokenization` and `max_digits` of a loaded tokenizer.

    Raises:
        ArtifactError: it has another pre-tokenizer.
    """
    for pre_tokenization in PRE_TOKENIZATIONS:
        for max_digits in range(MAX_DIGITS + 1):
            made = make_library_tokenizer(models.BPE(), pre_tokenization, max_digits)
            if _parts(made)["pre_tokenizer"] == found["pre_tokenizer"]:
                return pre_tokenization, max_digits
    raise ArtifactError("its pre_tokenizer is not one of this project")


def _difference(found: Mapping[str, Any], pre_tokenization: str, max_digits: int) -> str | None:
    """Say how a loaded tokenizer differs from one made here, or return None."""
    expected = _parts(make_library_tokenizer(models.BPE(), pre_tokenization, max_digits))
    for part in expected.keys() - {"model", "added_tokens"}:
        if found[part] != expected[part]:
            return f"its {part} is not the one of this project"
    settings = found["model"].keys() - {"vocab", "merges"}
    if any(found["model"][key] != expected["model"][key] for key in settings):
        return "its model has settings other than this project's"
    return _vocabulary_problem(found)


def _vocabulary_problem(parts: Mapping[str, Any]) -> str | None:
    vocabulary: dict[str, int] = dict(parts["model"]["vocab"])
    added = [(token["id"], token["content"], token["special"]) for token in parts["added_tokens"]]
    vocabulary |= {token: index for index, token, _ in added}
    end = len(vocabulary)
    if added not in (
        [(index, token, True) for index, token in enumerate(CONTROL_TOKENS)],
        [
            (end - len(added) + index, token, True)
            for index, token in enumerate(GPT2_CONTROL_TOKENS)
        ],
    ):
        return f"its control tokens are {added}"
    if sorted(vocabulary.values()) != list(range(end)):
        return "its ids have gaps"
    tokens = vocabulary.keys() - {token for _, token, _ in added}
    if strange := set("".join(tokens)) - set(byte_characters()):
        return f"its vocabulary has {sorted(strange)}, which stand for no byte"
    if missing := set(byte_characters()) - tokens:
        return f"its vocabulary lacks {sorted(missing)}"
    return None


def _parts(tokenizer: LibraryTokenizer) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads(tokenizer.to_str()))
