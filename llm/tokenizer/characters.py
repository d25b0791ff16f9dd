"""The two vocabularies that merge nothing: one id a character, and one id a byte."""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from llm.errors import ArtifactError, DataError
from llm.tokenizer.base import (
    CONTROL_TOKENS,
    NUM_BYTE_VALUES,
    TOKENIZER_JSON,
    Ids,
    Tokenizer,
    refuse_lone_surrogates,
)

NUM_CONTROL = len(CONTROL_TOKENS)
CODE_POINTS = 0x110000


class ByteTokenizer(Tokenizer):
    """One id a byte of UTF-8: nothing to learn, nothing unknown."""

    kind: ClassVar[str] = "bytes"

    def __init__(self) -> None:
        super().__init__(NUM_CONTROL + NUM_BYTE_VALUES)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ByteTokenizer":
        """Make a tokenizer from what `to_files` wrote.

        Raises:
            ArtifactError: it is none.
        """
        _refuse_other_fields(data, {"kind": str})
        return cls()

    def to_files(self) -> dict[str, bytes]:
        return _json_file({"kind": self.kind})

    def encode_arrays(self, texts: Sequence[str]) -> list[Ids]:
        refuse_lone_surrogates(texts)
        return [
            np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32) + NUM_CONTROL
            for text in texts
        ]

    @cached_property
    def bytes_of_token(self) -> list[bytes]:
        return [b""] * NUM_CONTROL + [bytes([byte]) for byte in range(NUM_BYTE_VALUES)]


class CharacterTokenizer(Tokenizer):
    """One id a character of the training text; the rest by their bytes, or not at all.

    The ids after the control tokens are the characters by code point, then the 256 bytes where
    `has_byte_fallback`.
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
    def from_json(cls, data: Mapping[str, Any]) -> "CharacterTokenizer":
        """Make a tokenizer from what `to_files` wrote.

        Raises:
            ArtifactError: it is none.
        """
        _refuse_other_fields(data, {"kind": str, "characters": str, "has_byte_fallback": bool})
        characters: str = data["characters"]
        if characters != "".join(sorted(set(characters))):
            raise ArtifactError("its characters are not in order, each once")
        try:
            refuse_lone_surrogates([characters])
        except DataError as error:
            raise ArtifactError(f"its characters: {error}") from error
        return cls(characters, data["has_byte_fallback"])

    def to_files(self) -> dict[str, bytes]:
        return _json_file(
            {
                "kind": self.kind,
                "characters": self._characters,
                "has_byte_fallback": self._has_byte_fallback,
            }
        )

    def can_encode(self, text: str) -> bool:
        return super().can_encode(text) and (self._has_byte_fallback or not self._unknown(text))

    def encode_arrays(self, texts: Sequence[str]) -> list[Ids]:
        refuse_lone_surrogates(texts)
        return [self._encode(text, index) for index, text in enumerate(texts)]

    @cached_property
    def bytes_of_token(self) -> list[bytes]:
        tokens = [b""] * NUM_CONTROL + [character.encode() for character in self._characters]
        if self._has_byte_fallback:
            tokens += [bytes([byte]) for byte in range(NUM_BYTE_VALUES)]
        return tokens

    def _encode(self, text: str, index: int) -> Ids:
        code_points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        ids = self._id_of_code_point[code_points]
        if ids.all():
            return ids
        if not self._has_byte_fallback:
            place = int((ids == 0).argmax())
            raise DataError(
                f"text {index}: character {place}, {text[place]!r}, is not among the"
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

    def _unknown(self, text: str) -> set[str]:
        return set(text).difference(self._characters)

    @cached_property
    def _id_of_code_point(self) -> Ids:
        """(CODE_POINTS,); 0, which is bos, for a character the vocabulary lacks."""
        table = np.zeros(CODE_POINTS, dtype=np.uint32)
        code_points = np.array([ord(character) for character in self._characters], dtype=np.int64)
        table[code_points] = np.arange(NUM_CONTROL, self._first_byte_id)
        return table


def _utf8_lengths(code_points: Ids) -> npt.NDArray[np.int64]:
    return 1 + np.searchsorted([0x80, 0x800, 0x10000], code_points, side="right")


def _json_file(fields: Mapping[str, object]) -> dict[str, bytes]:
    return {TOKENIZER_JSON: json.dumps(fields, indent=2).encode() + b"\n"}


def _refuse_other_fields(data: Mapping[str, Any], types: Mapping[str, type]) -> None:
    found = {name: type(value) for name, value in data.items()}
    if found != dict(types):
        raise ArtifactError(f"found the fields {sorted(found)}, expected {sorted(types)}")
