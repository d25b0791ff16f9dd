"""Packing: which segment of which document goes where in which sequence. No token is lost.

Concatenate and split: the documents are one stream, cut every T tokens. No padding, but most
sequences begin inside a document. Best-fit: a document that fits a sequence is never cut, longer
ones are cut into full sequences and a remainder; with many documents sequences are nearly full.

Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv:2404.10830.

T positions, so T + 1 tokens in a sequence; D documents, P segments, S tokens.
"""

from bisect import bisect_left, insort
from itertools import pairwise

import numpy as np

from llm.data.packed_writer import Integers, Segments


def pack_concatenated(lengths: Integers, seq_len: int) -> Segments:
    """Concatenate documents of these lengths (D,) and split the stream.

    Each sequence begins with the last token of the one before, which is its first input.
    """
    T, S = seq_len, int(lengths.sum())
    num_sequences = max(1, -(-(S - 1) // T))  # all but the first repeat one token
    ends = np.cumsum(lengths)
    begins = ends - lengths
    first = np.maximum(begins - 1, 0) // T  # sequence n ends with the first token of n + 1
    last = np.minimum((ends - 1) // T, num_sequences - 1)
    document, nth = _repeat(last - first + 1)
    sequence = first[document] + nth
    begin = np.maximum(begins[document], sequence * T)
    end = np.minimum(ends[document], sequence * T + T + 1)
    return Segments(
        document=document,
        offset=begin - begins[document],
        length=end - begin,
        sequence=sequence,
        start=begin - sequence * T,
    )


def pack_best_fit(lengths: Integers, seq_len: int) -> Segments:
    """Put each document of these lengths (D,), longest first, where it leaves the least room.

    Sequences come in the order of their longest documents, and documents in a sequence in their
    own order: so shuffled documents give sequences whose lengths of documents are shuffled too.
    """
    T = seq_len
    document, nth = _repeat(np.maximum(1, -(-(lengths - 1) // T)))
    offset = nth * T
    length = np.minimum(lengths[document] - offset, T + 1)
    sequence = _assign_sequences(length, T + 1)
    order = np.argsort(sequence, kind="stable")
    sequence, length = sequence[order], length[order]
    before = np.cumsum(length) - length
    return Segments(
        document=document[order],
        offset=offset[order],
        length=length,
        sequence=sequence,
        start=before - before[np.searchsorted(sequence, sequence)],
    )


def _assign_sequences(lengths: Integers, width: int) -> Integers:
    """Return the sequence of each segment (P,), by best fit from the longest to the shortest.

    All segments of one length are assigned together: the sequences with the least sufficient room
    take as many as they can, and then have another room.
    """
    sequence = np.empty(len(lengths), dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    bounds = np.flatnonzero(np.diff(lengths[order], prepend=0, append=0)).tolist()
    open_sequences = _OpenSequences()
    firsts: list[Integers] = [np.zeros(0, dtype=np.int64)]  # the first segment of each sequence
    num_sequences = 0
    for begin, end in pairwise(bounds):
        length = int(lengths[order[begin]])
        while begin < end:
            room, some = open_sequences.take(length)
            if not room:
                room, count = width, -(-(end - begin) // (width // length))
                some = np.arange(num_sequences, num_sequences + count)
                firsts.append(order[begin : end : width // length])
                num_sequences += count
            most = room // length  # in one sequence
            count = min(len(some), -(-(end - begin) // most))
            num_placed = min(end - begin, count * most)
            placed = np.repeat(some[:count], most)[:num_placed]
            sequence[order[begin : begin + num_placed]] = placed
            open_sequences.put(room, some[count:])
            open_sequences.put(room - most * length, some[: count - 1])
            last_room = room - (num_placed - (count - 1) * most) * length
            open_sequences.put(last_room, some[count - 1 : count])
            begin += num_placed
    return np.argsort(np.argsort(np.concatenate(firsts)))[sequence]


class _OpenSequences:
    """Sequences by the number of tokens for which they have room left."""

    def __init__(self) -> None:
        self._rooms: list[int] = []  # ascending
        self._sequences: dict[int, list[Integers]] = {}

    def take(self, length: int) -> tuple[int, Integers]:
        """Remove and return the sequences with the least room for `length`; room 0 if none has."""
        index = bisect_left(self._rooms, length)
        if index == len(self._rooms):
            return 0, np.zeros(0, dtype=np.int64)
        room = self._rooms.pop(index)
        return room, np.concatenate(self._sequences.pop(room))

    def put(self, room: int, sequences: Integers) -> None:
        """Add sequences that are not full."""
        if room and len(sequences):
            if room not in self._sequences:
                insort(self._rooms, room)
            self._sequences.setdefault(room, []).append(sequences)


def _repeat(counts: Integers) -> tuple[Integers, Integers]:
    """Return the owner of each part and its number among the owner's, from parts per owner."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
