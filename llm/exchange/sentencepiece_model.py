"""Read SentencePiece's `tokenizer.model`, a protocol buffer, without its library.

Source of the field numbers:
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from llm.errors import ArtifactError
from llm.tokenizer.pieces import BLANK, added_token, make_merges

MODEL_FILE = "tokenizer.model"
ALGORITHMS = {1: "Unigram", 2: "BPE"}
_OTHER_ALGORITHMS = {3: "word", 4: "char"}
_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5


class PieceType(IntEnum):
    """The type of a piece."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPiece:
    """One entry of the vocabulary; its id is its position."""

    piece: str
    score: float
    type: PieceType


@dataclass(kw_only=True, slots=True)
class PieceModel:
    """The fields of `tokenizer.model` that are used here, with the format's defaults."""

    pieces: list[ModelPiece] = field(default_factory=list[ModelPiece])
    model_type: int = 1
    has_byte_fallback: bool = False
    bos_id: int = 1
    normalization: str = ""
    """The name of the rule."""
    is_normalized: bool = False
    """Whether a table of replacements changes texts."""
    escapes_spaces: bool = True
    """Whether pieces have U+2581 for spaces."""

    @property
    def begin(self) -> str | None:
        """The piece that begins documents."""
        return self.pieces[self.bos_id].piece if 0 <= self.bos_id < len(self.pieces) else None


def read_piece_model(data: bytes) -> PieceModel:
    """Parse the file.

    Raises:
        ArtifactError: it is not a SentencePiece model.
    """
    model = PieceModel()
    try:
        for number, value in _fields(data):
            match number, value:
                case 1, bytes():
                    model.pieces.append(_piece(value))
                case 2, bytes():
                    trainer = dict(_fields(value))
                    model.model_type = int(trainer.get(3, 1))
                    model.has_byte_fallback = bool(trainer.get(35, False))
                    model.bos_id = int(trainer.get(41, 1))
                case 3, bytes():
                    normalizer = dict(_fields(value))
                    model.normalization = bytes(normalizer.get(1, b"")).decode()
                    model.is_normalized = bool(normalizer.get(2) or normalizer.get(6))
                    model.escapes_spaces = bool(normalizer.get(5, True))
                case _:
                    pass
        if not model.pieces:
            raise ValueError("no pieces")
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise ArtifactError(
            f"not a SentencePiece model ({error}); a {MODEL_FILE} of tiktoken must be converted to"
            " tokenizer.json by transformers"
        ) from error
    return model


def library_parts(model: PieceModel) -> dict[str, Any]:
    """Return the model as transformers converts it to the format of `tokenizers`.

    Raises:
        ArtifactError: it changes texts or loses characters, with the options that do.
    """
    if problems := _problems(model):
        raise ArtifactError(
            "a SentencePiece model that does not keep every byte: " + "; ".join(problems)
        )
    kinds = {PieceType.CONTROL: True, PieceType.USER_DEFINED: False}
    added = [
        added_token(index, one.piece, is_special=kinds[one.type])
        for index, one in enumerate(model.pieces)
        if one.type in kinds
    ]
    types = [one.type for one in model.pieces]
    unknown = types.index(PieceType.UNKNOWN) if PieceType.UNKNOWN in types else None
    made: dict[str, Any] = {"type": ALGORITHMS[model.model_type], "byte_fallback": True}
    if made["type"] == "Unigram":
        made["vocab"] = [[one.piece, one.score] for one in model.pieces]
        made["unk_id"] = unknown
    else:
        made["vocab"] = ids = {one.piece: index for index, one in enumerate(model.pieces)}
        made["merges"] = [list(pair) for pair in make_merges(ids)]
        made["unk_token"] = None if unknown is None else model.pieces[unknown].piece
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": replace if model.escapes_spaces else None,
        "pre_tokenizer": None,
        "decoder": None,
        "model": made,
    }


def _problems(model: PieceModel) -> list[str]:
    problems: list[str] = []
    if model.model_type not in ALGORITHMS:
        found = _OTHER_ALGORITHMS.get(model.model_type, str(model.model_type))
        problems.append(f"model_type: found {found}, expected unigram or bpe")
    if model.is_normalized:
        problems.append(
            f"normalization_rule_name: found {model.normalization or 'a table'}, which changes"
            " texts; expected identity. Train another tokenizer with it, or one here with"
            " train_tokenizer.kind=sentencepiece"
        )
    if not model.has_byte_fallback:
        problems.append(
            "byte_fallback: found false, expected true, or characters outside the"
            " vocabulary would be lost. Train another tokenizer with it, or one here with"
            " train_tokenizer.kind=sentencepiece"
        )
    held = [one.piece for one in model.pieces if one.type is PieceType.USER_DEFINED]
    if ALGORITHMS.get(model.model_type) == "Unigram" and any(BLANK in piece for piece in held):
        problems.append(
            "user_defined_symbols: found some with spaces, which unigram would score differently"
            " from its training; expected none"
        )
    if unused := sum(one.type is PieceType.UNUSED for one in model.pieces):
        problems.append(
            f"{unused} pieces of the type UNUSED, from shrinking the vocabulary after training;"
            " expected none"
        )
    return problems


def _piece(data: bytes) -> ModelPiece:
    fields = dict(_fields(data))
    score = fields.get(2, b"\0\0\0\0")
    return ModelPiece(
        piece=bytes(fields[1]).decode(),
        score=struct.unpack("<f", bytes(score))[0],
        type=PieceType(int(fields.get(3, 1))),
    )


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each field: an int, or the bytes of anything else."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        match key & 7:
            case kind if kind == _VARINT:
                value, position = _varint(data, position)
            case kind if kind == _LENGTH:
                size, position = _varint(data, position)
                value, position = data[position : position + size], position + size
            case kind if kind in (_EIGHT_BYTES, _FOUR_BYTES):
                size = 8 if kind == _EIGHT_BYTES else 4
                value, position = data[position : position + size], position + size
            case kind:
                raise ValueError(f"a field of the unknown type {kind}")
        if position > len(data):
            raise ValueError("it ends in the middle")
        yield key >> 3, value


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Return the number at `position`, and the position after it."""
    value, shift = 0, 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return (value - (1 << 64) if value >= 1 << 63 else value), position
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
