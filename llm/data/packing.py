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
from typing import Protocol

import numpy as np
import numpy.typing as npt

from llm.data.rows import RowWriter

Tokens = npt.NDArray[np.uint32]
Mask = npt.NDArray[np.bool_]

NUM_OPEN_ROWS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedDocument:
    """A document as tokens, the first of them bos; for chats with its mask."""

    id: bytes
    tokens: Tokens
    mask: Mask | None = None


class Packer(Protocol):
    """What lays documents into rows."""

    num_split_chats: int

    def add(self, documents: Sequence[EncodedDocument]) -> None:
        """Take the next documents; rows that are full are written."""
        ...

    def finish(self) -> None:
        """Write the rows that are not full yet."""
        ...


class TextPacker:
    """Concatenate and cut; only the last row is padded."""

    num_split_chats = 0

    def __init__(self, rows: RowWriter) -> None:
        self._rows = rows
        self._left = np.zeros(0, dtype=np.uint32)  # from the last token already written on
        self._document = 0  # that the first token left belongs to

    def add(self, documents: Sequence[EncodedDocument]) -> None:
        """Take the next documents; rows that are full are written."""
        self._rows.write_document_ids([document.id for document in documents])
        stream = np.concatenate([self._left, *(document.tokens for document in documents)])
        T = self._rows.layout.seq_len
        num_rows = (len(stream) - 1) // T
        if num_rows:
            self._document = _write_stream(
                self._rows, stream[: num_rows * T + 1], None, self._document
            )
        self._left = stream[num_rows * T :]

    def finish(self) -> None:
        """Write what is left as a padded row."""
        if len(self._left) > 1 or self._document == 0:
            _write_stream(self._rows, self._left, None, self._document)


class ChatPacker:
    """Best fit over a bounded number of open rows; for one more, the fullest is written."""

    def __init__(self, rows: RowWriter) -> None:
        self._rows = rows
        self._num_documents = 0
        self._opened = 0
        self._open: dict[int, list[EncodedDocument]] = {}
        self._room: list[tuple[int, int]] = []  # (free positions, number of the open row), sorted
        self.num_split_chats = 0

    def add(self, documents: Sequence[EncodedDocument]) -> None:
        """Take the next chats; the fullest rows are written."""
        for document in documents:
            self._place(document)

    def finish(self) -> None:
        """Write all open rows, in the order they were opened."""
        for number in sorted(self._open):
            self._write(number)
        self._room.clear()

    def _place(self, chat: EncodedDocument) -> None:
        T = self._rows.layout.seq_len
        length = len(chat.tokens)
        place = bisect_left(self._room, (length, 0))
        if place < len(self._room):
            room, number = self._room.pop(place)
        else:
            if len(self._open) == NUM_OPEN_ROWS:
                self._write(self._room.pop(0)[1])
            number, self._opened = self._opened, self._opened + 1
            self._open[number] = []
            num_rows = max(1, -(-(length - 1) // T))
            self.num_split_chats += num_rows > 1
            room = num_rows * T + 1
        self._open[number].append(chat)
        insort(self._room, (room - length, number))

    def _write(self, number: int) -> None:
        chats = self._open.pop(number)
        self._rows.write_document_ids([chat.id for chat in chats])
        stream = np.concatenate([chat.tokens for chat in chats])
        mask = np.concatenate([_mask(chat) for chat in chats])
        _write_stream(self._rows, stream, mask, self._num_documents)
        self._num_documents += len(chats)


def make_packer(rows: RowWriter) -> Packer:
    """Return the packer for the content of `rows`."""
    return ChatPacker(rows) if rows.layout.content == "chats" else TextPacker(rows)


def _mask(chat: EncodedDocument) -> Mask:
    assert chat.mask is not None
    return chat.mask


def _write_stream(rows: RowWriter, stream: Tokens, mask: Mask | None, document: int) -> int:
    """Cut a stream (S,) into rows; return the ordinal of its last token's document.

    `document` is that of its first token. The last row is padded; each row but the first begins
    with the last token of the one before.
    """
    S, T = len(stream), rows.layout.seq_len
    B = max(1, -(-(S - 1) // T))
    num_padding = B * T + 1 - S
    tokens = np.pad(stream, (0, num_padding), constant_values=rows.layout.pad_id)
    windows = np.lib.stride_tricks.sliding_window_view
    row_starts = np.arange(B) * T
    bos_positions = np.flatnonzero(stream[1:] == rows.layout.bos_id) + 1
    first_documents = document + np.searchsorted(bos_positions, row_starts, side="right")
    row_mask = None
    if mask is not None:
        row_mask = windows(np.pad(mask, (0, num_padding)), T + 1)[::T]  # (S,) -> (B, T+1)
    rows.write_rows(windows(tokens, T + 1)[::T], row_mask, first_documents)
    return document + len(bos_positions)
