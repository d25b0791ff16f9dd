"""Tokenizers without merges: one id per character, and one id per byte."""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, cast

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as LibraryTokenizer

from llm.errors import ArtifactError, DataError
from llm.tokenizer.base import (
    CONTROL_TOKENS,
    NUM_BYTE_VALUES,
    Ids,
    Tokenizer,
    json_bytes,
    refuse_lone_surrogates,
)
from llm.tokenizer.bpe import byte_characters
from llm.tokenizer.pieces import BYTE_PIECES

NUM_CONTROL = len(CONTROL_TOKENS)
CODE_POINTS = 0x110000


class ByteTokenizer(Tokenizer):
    """One id per byte of UTF-8: nothing to learn, nothing unknown."""

    kind: ClassVar[str] = "bytes"

    def __init__(self) -> None:
        super().__init__(NUM_CONTROL + NUM_BYTE_VALUES)

    @classmethod
    def train(cls, texts: Iterable[str] = ()) -> "ByteTokenizer":
        """Make the tokenizer, whatever the texts."""
        return cls()

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "ByteTokenizer":
        """Make a tokenizer from the fields that `to_json` wrote, or raise ArtifactError."""
        _refuse_other_fields(fields, {"kind": str})
        return cls()

    def to_json(self) -> bytes:
        return json_bytes({"kind": self.kind})

    def encode_arrays(self, texts: Sequence[str]) -> list[Ids]:
        refuse_lone_surrogates(texts)
        return [
            np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32) + NUM_CONTROL
            for text in texts
        ]

    @cached_property
    def bytes_of_token(self) -> list[bytes]:
        return [b""] * NUM_CONTROL + [bytes([byte]) for byte in range(NUM_BYTE_VALUES)]

    def library_json(self) -> dict[str, Any]:
        """Return a byte-level BPE without merges."""
        made = LibraryTokenizer(models.BPE(_vocabulary(byte_characters()), []))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
        return _with_control_tokens(made)


class CharacterTokenizer(Tokenizer):
    """One id per character of the training text; other characters by their bytes, or an error.

    After the control tokens come the characters by code point, then, with `has_byte_fallback`, the
    256 bytes.
    """

    kind: ClassVar[str] = "characters"

    def __init__(self, characters: str, has_byte_fallback: bool) -> None:
        self._characters, self._has_byte_fallback = characters, has_byte_fallback
        self._first_byte_id = NUM_CONTROL + len(characters)
        super().__init__(self._first_byte_id + (NUM_BYTE_VALUES if has_byte_fallback else 0))

    @classmethod
    def train(cls, texts: Iterable[str], has_byte_fallback: bool = True) -> "CharacterTokenizer":
        """Take every character of the texts."""
        characters: set[str] = set()
        for text in texts:
            characters.update(text)
        return cls("".join(sorted(characters)), has_byte_fallback)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "CharacterTokenizer":
        """Make a tokenizer from the fields that `to_json` wrote, or raise ArtifactError."""
        _refuse_other_fields(fields, {"kind": str, "characters": str, "has_byte_fallback": bool})
        characters: str = fields["characters"]
        if characters != "".join(sorted(set(characters))):
            raise ArtifactError("its characters are not in order, each once")
        try:
            refuse_lone_surrogates([characters])
        except DataError as error:
            raise ArtifactError(f"its characters: {error}") from error
        return cls(characters, fields["has_byte_fallback"])

    def to_json(self) -> bytes:
        return json_bytes(
            {
                "kind": self.kind,
                "characters": self._characters,
                "has_byte_fallback": self._has_byte_fallback,
            }
        )

    def can_encode(self, text: str) -> bool:
        is_known = self._has_byte_fallback or set(text) <= set(self._characters)
        return is_known and super().can_encode(text)

    def encode_arrays(self, texts: Sequence[str]) -> list[Ids]:
        refuse_lone_surrogates(texts)
        return [self._encode(text, index) for index, text in enumerate(texts)]

    @cached_property
    def bytes_of_token(self) -> list[bytes]:
        tokens = [b""] * NUM_CONTROL + [character.encode() for character in self._characters]
        if self._has_byte_fallback:
            tokens += [bytes([byte]) for byte in range(NUM_BYTE_VALUES)]
        return tokens

    def library_json(self) -> dict[str, Any]:
        """Return one word per character or, with byte fallback, a BPE without merges."""
        if self._has_byte_fallback:
            vocabulary = _vocabulary([*self._characters, *BYTE_PIECES])
            made = LibraryTokenizer(models.BPE(vocabulary, [], byte_fallback=True))
            made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        else:
            made = LibraryTokenizer(models.WordLevel(_vocabulary(self._characters), unk_token=""))
            made.decoder = decoders.Fuse()
        made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
        return _with_control_tokens(made)

    def _encode(self, text: str, index: int) -> Ids:
        code_points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        ids = self._id_of_code_point[code_points]
        if ids.all():
            return ids
        if not self._has_byte_fallback:
            position = int((ids == 0).argmax())
            raise DataError(
                f"text {index}: character {position}, {text[position]!r}, is not among the"
                f" {len(self._characters)} characters of the training text; take it out, or set"
                " train_tokenizer.has_byte_fallback to true"
            )
        known = ids > 0
        lengths = np.where(known, 1, _utf8_lengths(code_points))
        spelled = np.zeros(int(lengths.sum()), dtype=np.uint32)
        spelled[np.repeat(known, lengths)] = ids[known]
        unknown = "".join(map(chr, code_points[~known].tolist())).encode()
        spelled[np.repeat(~known, lengths)] = (
            np.frombuffer(unknown, dtype=np.uint8).astype(np.uint32) + self._first_byte_id
        )
        return spelled

    @cached_property
    def _id_of_code_point(self) -> Ids:
        """(CODE_POINTS,); 0, the id of bos, for characters outside the vocabulary."""
        table = np.zeros(CODE_POINTS, dtype=np.uint32)
        code_points = np.array([ord(character) for character in self._characters], dtype=np.int64)
        table[code_points] = np.arange(NUM_CONTROL, self._first_byte_id)
        return table


def _utf8_lengths(code_points: Ids) -> npt.NDArray[np.int64]:
    return 1 + np.searchsorted([0x80, 0x800, 0x10000], code_points, side="right")


def _refuse_other_fields(fields: Mapping[str, Any], types: Mapping[str, type]) -> None:
    if {name: type(value) for name, value in fields.items()} != dict(types):
        raise ArtifactError(f"found the fields {sorted(fields)}, expected {sorted(types)}")


def _vocabulary(tokens: Iterable[str]) -> dict[str, int]:
    """Return the ids of the control tokens and of the tokens that follow them."""
    return {token: index for index, token in enumerate((*CONTROL_TOKENS, *tokens))}


def _with_control_tokens(made: LibraryTokenizer) -> dict[str, Any]:
    made.add_special_tokens([AddedToken(token, special=True) for token in CONTROL_TOKENS])
    return cast(dict[str, Any], json.loads(made.to_str()))
