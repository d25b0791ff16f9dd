"""A cache of the ids of words: text repeats its words, and a look-up beats merging them again."""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain, islice, pairwise

import numpy as np
import numpy.typing as npt

from llm.tokenizer.base import Ids

MAX_WORDS = 1 << 18  # about 60 MB
MAX_CHARACTERS = 1 << 24
CALL_CHARACTERS = 1 << 20  # `tokenizers` needs over 100 bytes per token while it encodes


def encode_in_chunks(
    texts: Sequence[str],
    split: Callable[[str], Iterator[str]],
    encode: Callable[[Sequence[str]], list[Ids]],
) -> list[Ids]:
    """Encode texts of any length, `split` into chunks, about CALL_CHARACTERS at a time."""
    chunks = [(index, chunk) for index, text in enumerate(texts) for chunk in split(text)]
    parts: list[list[Ids]] = [[] for _ in texts]
    for call in _calls(chunks):
        encoded = encode([chunk for _, chunk in call])
        for (index, _), ids in zip(call, encoded, strict=True):
            parts[index].append(ids)
    empty = np.zeros(0, dtype=np.uint32)
    return [
        part[0] if len(part) == 1 else np.concatenate(part) if part else empty for part in parts
    ]


class WordCache:
    """The ids of every word seen, emptied when there are too many."""

    def __init__(
        self, encode: Callable[[Sequence[str]], tuple[Ids, npt.NDArray[np.int64]]]
    ) -> None:
        """Take a function from words to their concatenated ids and the number of ids of each."""
        self._encode_new = encode
        self._forget()

    def encode(self, texts: Sequence[Sequence[str]]) -> list[Ids]:
        """Return the ids of texts given as words."""
        if len(self._numbers) > MAX_WORDS or self._num_characters > MAX_CHARACTERS:
            self._forget()
        num_known, num_words = len(self._numbers), sum(map(len, texts))
        words = chain.from_iterable(texts)
        numbers = np.fromiter(map(self._numbers.__getitem__, words), np.int64, num_words)
        if len(self._numbers) > num_known:
            self._learn(list(islice(self._numbers, num_known, None)))
        lengths = self._lengths[numbers]
        ends = np.concatenate([[0], lengths.cumsum()])
        # index i of a word that starts at s here and at t in the table is t + (i - s)
        shifts = np.repeat(self._starts[numbers] - ends[:-1], lengths)
        ids = self._ids[shifts + np.arange(ends[-1])]
        spans = pairwise(ends[list(accumulate(map(len, texts), initial=0))].tolist())
        return [ids[start:end] for start, end in spans]

    def _learn(self, words: list[str]) -> None:
        ids, lengths = self._encode_new(words)
        self._starts = np.concatenate([self._starts, len(self._ids) + lengths.cumsum() - lengths])
        self._lengths = np.concatenate([self._lengths, lengths])
        self._ids = np.concatenate([self._ids, ids])
        self._num_characters += sum(map(len, words))

    def _forget(self) -> None:
        self._numbers = _Numbers()
        self._ids: Ids = np.zeros(0, dtype=np.uint32)
        self._starts = np.zeros(0, dtype=np.int64)
        self._lengths = np.zeros(0, dtype=np.int64)
        self._num_characters = 0


class _Numbers(dict[str, int]):
    """The number of each word, assigned on first use."""

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        return number


def _calls(chunks: Sequence[tuple[int, str]]) -> Iterator[Sequence[tuple[int, str]]]:
    """Yield slices of `chunks` of about CALL_CHARACTERS each."""
    start, characters = 0, 0
    for end, (_, chunk) in enumerate(chunks, start=1):
        characters += len(chunk)
        if characters >= CALL_CHARACTERS:
            yield chunks[start:end]
            start, characters = end, 0
    if start < len(chunks):
        yield chunks[start:]
