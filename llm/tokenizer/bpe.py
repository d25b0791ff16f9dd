"""Byte-level BPE: text to token ids and back, exact on any text, learned and run by `tokenizers`.

Every one of the 256 bytes is a token, so no text is unknown. The control tokens hold the first ids.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, ClassVar, cast

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as LibraryTokenizer

from llm.errors import ArtifactError
from llm.tokenizer.base import (
    CONTROL_TOKENS,
    TOKENIZER_JSON,
    Ids,
    Tokenizer,
    refuse_lone_surrogates,
)

# GPT-2's splitting with three changes for code: a word with the space before it, underscores being
# letters; numbers in groups of up to three digits, as GPT-4's; punctuation; and runs of whitespace,
# so that an indentation can be one token. Merges never cross a split. GPT-4's own lets a word take
# the sign before it: `(self` and `self` would share nothing, and a model could not copy one from
# the other.
SPLITTING = (
    r" ?[\p{L}_]+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}_]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The library needs over 100 bytes a token while it encodes, so a long text goes through in pieces:
# so many characters in a piece, and in one call.
PIECE_CHARACTERS = 32_768
CALL_CHARACTERS = 1_048_576
_LINE_START = re.compile(r"\n(?=\S)")


class ByteLevelBPE(Tokenizer):
    """Encode and decode with one learned vocabulary."""

    kind: ClassVar[str] = "bpe"

    def __init__(self, tokenizer: LibraryTokenizer) -> None:
        tokenizer.encode_special_tokens = True  # the library neither defaults to it nor saves it
        assert tokenizer.encode_special_tokens
        self._tokenizer = tokenizer
        super().__init__(tokenizer.get_vocab_size(with_added_tokens=True))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "ByteLevelBPE":
        """Learn at most `vocab_size` tokens; fewer where the texts repeat nothing more."""
        tokenizer = _untrained()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,  # what occurs once is memorized, not learned
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # else unseen bytes would vanish
            special_tokens=[AddedToken(token, special=True) for token in CONTROL_TOKENS],
        )
        pieces = (piece for text in texts for piece in split_text(text))
        tokenizer.train_from_iterator(pieces, trainer)
        return cls.from_json(tokenizer.to_str().encode())

    @classmethod
    def from_json(cls, data: bytes) -> "ByteLevelBPE":
        """Make a tokenizer from what `to_files` wrote.

        Raises:
            ArtifactError: the bytes are damaged or of another kind of tokenizer.
        """
        try:
            tokenizer = LibraryTokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # the library raises the bare class
            raise ArtifactError(f"the library cannot read it ({error})") from error
        if problem := _difference(tokenizer):
            raise ArtifactError(problem)
        return cls(tokenizer)

    def to_files(self) -> dict[str, bytes]:
        return {TOKENIZER_JSON: self._tokenizer.to_str(pretty=True).encode() + b"\n"}

    def encode_arrays(self, texts: Sequence[str]) -> list[Ids]:
        pieces = [(index, piece) for index, text in enumerate(texts) for piece in split_text(text)]
        parts: list[list[Ids]] = [[] for _ in texts]
        for call in _calls(pieces):
            try:
                encodings = self._tokenizer.encode_batch_fast(
                    [piece for _, piece in call], add_special_tokens=False
                )
            except TypeError:
                refuse_lone_surrogates(texts)
                raise
            for (index, _), encoding in zip(call, encodings, strict=True):
                parts[index].append(np.array(encoding.ids, dtype=np.uint32))
        empty = np.zeros(0, dtype=np.uint32)
        return [
            part[0] if len(part) == 1 else np.concatenate(part) if part else empty for part in parts
        ]

    @cached_property
    def bytes_of_token(self) -> list[bytes]:
        byte_of_character = {character: byte for byte, character in enumerate(byte_characters())}
        table = [b""] * self.vocab_size
        for token, index in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if index >= len(CONTROL_TOKENS):
                table[index] = bytes(byte_of_character[character] for character in token)
        return table


def split_text(text: str) -> Iterator[str]:
    """Yield `text` in pieces of about PIECE_CHARACTERS, cut where a line starts unindented.

    No token crosses such a place, so the pieces' tokens are the text's. Where there is none in
    twice that length the cut falls between any two characters: the round trip is still exact, in
    slightly other tokens.
    """
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        place = _LINE_START.search(text, start + PIECE_CHARACTERS - 1, start + 2 * PIECE_CHARACTERS)
        end = place.end() if place else start + PIECE_CHARACTERS
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def byte_characters() -> list[str]:
    """Return the printable character by which the vocabulary writes each of the 256 bytes.

    Source: GPT-2, `bytes_to_unicode`: printable Latin-1 stands for itself, the rest for U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _untrained() -> LibraryTokenizer:
    tokenizer = LibraryTokenizer(models.BPE())
    splitting = pre_tokenizers.Split(Regex(SPLITTING), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([splitting, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _difference(tokenizer: LibraryTokenizer) -> str | None:
    """Say in what a loaded tokenizer is not one that `train` makes, or return None."""
    found, expected = _parts(tokenizer), _parts(_untrained())
    vocabulary: dict[str, int] = found["model"]["vocab"]
    for part in expected:
        if part in ("model", "added_tokens"):
            continue
        if found[part] != expected[part]:
            return f"its {part} is another"
    learned = ("vocab", "merges")
    if any(
        found["model"][key] != expected["model"][key]
        for key in found["model"]
        if key not in learned
    ):
        return "its model has other settings"
    added = [(token["id"], token["content"], token["special"]) for token in found["added_tokens"]]
    if added != [(index, token, True) for index, token in enumerate(CONTROL_TOKENS)]:
        return f"its control tokens are {added}"
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        return "its ids have gaps"
    if strange := set("".join(vocabulary)) - set(byte_characters()):
        return f"its vocabulary holds {sorted(strange)}, which stand for no byte"
    if missing := [
        token for token in (*CONTROL_TOKENS, *byte_characters()) if token not in vocabulary
    ]:
        return f"its vocabulary lacks {missing}"
    return None


def _parts(tokenizer: LibraryTokenizer) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads(tokenizer.to_str()))


def _calls(pieces: Sequence[tuple[int, str]]) -> Iterator[Sequence[tuple[int, str]]]:
    """Yield slices of `pieces` of about CALL_CHARACTERS each."""
    start, characters = 0, 0
    for end, (_, piece) in enumerate(pieces, start=1):
        characters += len(piece)
        if characters >= CALL_CHARACTERS:
            yield pieces[start:end]
            start, characters = end, 0
    if start < len(pieces):
        yield pieces[start:]
