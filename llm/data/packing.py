"""Decide where documents lie in rows: no token is lost, and each but a row's first is told once.

End to end, text is one stream that is cut every T tokens: no room is left, but most rows begin in
the middle of a document. Best fit leaves documents whole where they fit a row, and rows nearly full
where there are many documents to choose from; longer ones are cut into full rows and what remains.

Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv:2404.10830.

T positions in a row, which holds T + 1 tokens; D documents, P pieces, S tokens.
"""

from bisect import bisect_left, insort
from itertools import pairwise

import numpy as np

from llm.data.packed_writer import Integers, Pieces


def pack_concatenated(lengths: Integers, seq_len: int) -> Pieces:
    """Concatenate documents of these lengths (D,), and cut: each row begins with the last token of
    the one before.
    """
    T, S = seq_len, int(lengths.sum())
    num_rows = max(1, -(-(S - 1) // T))  # each but the first repeats one token
    ends = np.cumsum(lengths)
    begins = ends - lengths
    first = np.maximum(begins - 1, 0) // T  # a row's first token is also the last of the row before
    last = np.minimum((ends - 1) // T, num_rows - 1)
    document, nth = _repeat(last - first + 1)
    row = first[document] + nth
    begin = np.maximum(begins[document], row * T)
    end = np.minimum(ends[document], row * T + T + 1)
    return Pieces(
        document=document,
        offset=begin - begins[document],
        length=end - begin,
        row=row,
        start=begin - row * T,
    )


def pack_best_fit(lengths: Integers, seq_len: int) -> Pieces:
    """Give each of the documents of these lengths (D,), the longest first, the room that it fills
    best; one longer than a row is cut, and what remains of it is placed like a document.

    Rows come in the order of the documents they were begun with, and documents in a row in theirs:
    where these are shuffled, so is the length of what begins a row, or stands in the first rows.
    """
    T = seq_len
    document, nth = _repeat(np.maximum(1, -(-(lengths - 1) // T)))
    offset = nth * T
    length = np.minimum(lengths[document] - offset, T + 1)
    row = _place(length, T + 1)
    order = np.argsort(row, kind="stable")
    row, length = row[order], length[order]
    before = np.cumsum(length) - length
    return Pieces(
        document=document[order],
        offset=offset[order],
        length=length,
        row=row,
        start=before - before[np.searchsorted(row, row)],
    )


def _place(lengths: Integers, width: int) -> Integers:
    """Return the row of each of some pieces (P,), by best fit from the longest to the shortest.

    All pieces of a length are placed in few moves: the rows with the least room that is enough take
    as many as they can, one after another, and are then rows with another room.
    """
    row = np.empty(len(lengths), dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    bounds = np.flatnonzero(np.diff(lengths[order], prepend=0, append=0)).tolist()
    rows = _Rooms()
    firsts: list[Integers] = [np.zeros(0, dtype=np.int64)]  # the piece each row was begun with
    num_rows = 0
    for begin, end in pairwise(bounds):
        length = int(lengths[order[begin]])
        while begin < end:
            room, some = rows.take(length)
            if not room:
                room, count = width, -(-(end - begin) // (width // length))
                some = np.arange(num_rows, num_rows + count)
                firsts.append(order[begin : end : width // length])
                num_rows += count
            most = room // length  # in one row
            count = min(len(some), -(-(end - begin) // most))
            num_placed = min(end - begin, count * most)
            row[order[begin : begin + num_placed]] = np.repeat(some[:count], most)[:num_placed]
            rows.put(room, some[count:])
            rows.put(room - most * length, some[: count - 1])
            rows.put(room - (num_placed - (count - 1) * most) * length, some[count - 1 : count])
            begin += num_placed
    return np.argsort(np.argsort(np.concatenate(firsts)))[row]


class _Rooms:
    """Rows by the room that is left in them."""

    def __init__(self) -> None:
        self._rooms: list[int] = []  # ascending
        self._rows: dict[int, list[Integers]] = {}

    def take(self, length: int) -> tuple[int, Integers]:
        """Take out the rows with the least room for `length`; return it, 0 if there is none."""
        place = bisect_left(self._rooms, length)
        if place == len(self._rooms):
            return 0, np.zeros(0, dtype=np.int64)
        room = self._rooms.pop(place)
        return room, np.concatenate(self._rows.pop(room))

    def put(self, room: int, rows: Integers) -> None:
        """Put rows in."""
        if room and len(rows):
            if room not in self._rows:
                insort(self._rooms, room)
            self._rows.setdefault(room, []).append(rows)


def _repeat(counts: Integers) -> tuple[Integers, Integers]:
    """Return which of several each of their parts is of, and its number among these."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
