"""Lay documents into rows without losing a token.

Text is concatenated and cut: row i+1 begins with the last token of row i, so every token but the
very first is a target exactly once. Chats stay whole: each goes into the open row it fits best, and
a row's end is padded. Both are streams of whole documents cut by the same function: text is one
long stream, chats are many short ones.

Shapes: B rows, T positions, S tokens in a stream.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from llm.data.rows import RowWriter

Tokens = npt.NDArray[np.uint32]
Mask = npt.NDArray[np.bool_]
Scalar = TypeVar("Scalar", bound=np.generic)

MAX_OPEN_ROWS = 4096
MAX_OPEN_TOKENS = 1 << 24  # 80 MiB with the mask


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedDocument:
    """A document as tokens (S,), the first of them bos, and for chats their mask (S,)."""

    id: bytes
    tokens: Tokens
    mask: Mask | None = None
    kind: str = ""


class Packer(Protocol):
    """What lays documents into rows."""

    def add(self, documents: Sequence[EncodedDocument]) -> None:
        """Take the next documents, and write rows that are full."""
        ...

    def finish(self) -> None:
        """Write the rows that are not full yet."""
        ...


def make_packer(rows: RowWriter) -> Packer:
    """Return the packer for the content of `rows`."""
    return ChatPacker(rows) if rows.layout.content == "chats" else TextPacker(rows)


class TextPacker:
    """Concatenate and cut; only the last row is padded."""

    def __init__(self, rows: RowWriter) -> None:
        self._rows = rows
        self._left = np.zeros(0, dtype=np.uint32)
        self._num_left_written = 0  # 1 once the first token left is the last of a written row
        self._document = 0  # ordinal of the document the first token left belongs to

    def add(self, documents: Sequence[EncodedDocument]) -> None:
        """Take the next documents, and write rows that are full."""
        self._rows.write_documents([(document.id, document.kind) for document in documents])
        stream = np.concatenate([self._left, *(document.tokens for document in documents)])
        end = (len(stream) - 1) // self._rows.layout.seq_len * self._rows.layout.seq_len
        if end > 0:
            self._document = _write_stream(self._rows, stream[: end + 1], None, self._document)
            self._num_left_written = 1
        self._left = stream[end:]

    def finish(self) -> None:
        """Write what is left as a padded row."""
        if len(self._left) > self._num_left_written:
            _write_stream(self._rows, self._left, None, self._document)


class ChatPacker:
    """Best fit over many open rows, longest chat of a batch first; the fullest row makes place.

    A chat longer than a row fills rows of its own; others may follow it in its last.
    """

    def __init__(self, rows: RowWriter) -> None:
        self._rows = rows
        self._max_open_rows = max(1, min(MAX_OPEN_ROWS, MAX_OPEN_TOKENS // rows.layout.seq_len))
        self._open: dict[int, list[EncodedDocument]] = {}  # by number, in the order opened
        self._room: list[tuple[int, int]] = []  # (free positions, number), sorted
        self._num_opened = 0
        self._num_documents = 0

    def add(self, documents: Sequence[EncodedDocument]) -> None:
        """Take the next chats, and write the fullest rows where too many are open."""
        for chat in sorted(documents, key=lambda document: -len(document.tokens)):
            length = len(chat.tokens)
            place = bisect_left(self._room, (length, 0))
            room, number = (
                self._room.pop(place) if place < len(self._room) else self._open_row(length)
            )
            self._open[number].append(chat)
            insort(self._room, (room - length, number))

    def finish(self) -> None:
        """Write the open rows in the order they were opened."""
        for number in list(self._open):
            self._write(number)

    def _open_row(self, length: int) -> tuple[int, int]:
        """Return room and number of a new row, or of as many as a chat of `length` tokens needs."""
        if len(self._open) == self._max_open_rows:
            self._write(self._room.pop(0)[1])
        num_rows = _num_rows(length, self._rows.layout.seq_len)
        self._rows.num_split_chats += num_rows > 1
        number = self._num_opened
        self._num_opened += 1
        self._open[number] = []
        return num_rows * self._rows.layout.seq_len + 1, number

    def _write(self, number: int) -> None:
        chats = self._open.pop(number)
        self._rows.write_documents([(chat.id, chat.kind) for chat in chats])
        stream = np.concatenate([chat.tokens for chat in chats])
        mask = np.concatenate([chat.mask for chat in chats if chat.mask is not None])
        _write_stream(self._rows, stream, mask, self._num_documents)
        self._num_documents += len(chats)


def _num_rows(length: int, seq_len: int) -> int:
    """Return how many rows a stream takes; each but the first repeats one token."""
    return max(1, -(-(length - 1) // seq_len))


def _write_stream(rows: RowWriter, stream: Tokens, mask: Mask | None, document: int) -> int:
    """Cut a stream (S,) into rows; return the ordinal of its last token's document.

    `document` is that of its first token. The last row is padded; each row but the first begins
    with the last token of the one before.
    """
    S, T = len(stream), rows.layout.seq_len
    B = _num_rows(S, T)
    bos_positions = np.flatnonzero(stream[1:] == rows.layout.bos_id) + 1
    first_documents = document + np.searchsorted(bos_positions, np.arange(B) * T, side="right")
    row_tokens = _cut(stream, B, T, rows.layout.pad_id)
    row_mask = None if mask is None else _cut(mask, B, T, False)
    rows.write_rows(row_tokens, row_mask, first_documents)
    return document + len(bos_positions)


def _cut(stream: npt.NDArray[Scalar], B: int, T: int, filler: int) -> npt.NDArray[Scalar]:
    padded = np.full(B * T + 1, filler, dtype=stream.dtype)
    padded[: len(stream)] = stream
    return np.column_stack([padded[:-1].reshape(B, T), padded[T::T]])  # (S,) -> (B, T+1)
