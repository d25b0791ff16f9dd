"""Keep out of training what models are measured on: documents that share an n-gram with it.

The n-grams to protect are collected by shards and put together in one sorted file, which the
processes that judge training documents share. A training document takes no memory.

W words of a text, N n-grams protected.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llm.artifact import write_bytes_atomically
from llm.data.cleaning.ngrams import Hashes, hash_ngrams, hash_words

MOST_COUNTED = 255  # a byte for each n-gram
COUNT = np.dtype([("place", "<u8"), ("count", "u1")])
NGRAMS_AT_ONCE = 1 << 20


class Protected:
    """The n-grams of all texts that are measured on.

    Source: Brown et al. 2020, appendix C, arXiv:2005.14165. There the surroundings of what is
    shared are cut out; here it is the document. A text to protect of fewer words than an n-gram has
    cannot be.
    """

    def __init__(self, path: Path, num_words: int) -> None:
        """Open what `merge_ngrams` wrote of n-grams of `num_words` words."""
        is_empty = path.stat().st_size == 0
        self._ngrams: Hashes = (  # (N,) sorted
            np.zeros(0, dtype="<u8") if is_empty else np.memmap(path, dtype="<u8", mode="r")
        )
        self._num_words = num_words

    def __len__(self) -> int:
        return len(self._ngrams)

    def find(self, text: str) -> npt.NDArray[np.intp]:
        """Return the places of those that a text holds, each once, (W,) -> (found,)."""
        ngrams = hash_ngrams(hash_words(text), self._num_words)
        if not ngrams.size or not self._ngrams.size:
            return np.zeros(0, dtype=np.intp)
        ngrams.sort()  # near ones lie near in memory
        places = np.searchsorted(self._ngrams, ngrams)
        is_shared = self._ngrams[np.minimum(places, len(self._ngrams) - 1)] == ngrams
        return np.unique(places[is_shared])


class DocumentCounts:
    """How many training documents hold each protected n-gram, up to MOST_COUNTED."""

    def __init__(self, num_ngrams: int) -> None:
        """Begin with none."""
        self.values = np.zeros(num_ngrams, dtype=np.uint8)  # (N,)

    def add(self, places: npt.NDArray[np.intp]) -> None:
        """Count a document that holds the n-grams at these places, which are different ones."""
        self.values[places] += self.values[places] < MOST_COUNTED

    def to_bytes(self) -> bytes:
        """Return the counts that are not 0, which are few, with their places."""
        places = np.flatnonzero(self.values)
        found = np.empty(len(places), dtype=COUNT)
        found["place"], found["count"] = places, self.values[places]
        return found.tobytes()

    def add_bytes(self, data: bytes) -> None:
        """Add what `to_bytes` gave for other documents."""
        found = np.frombuffer(data, dtype=COUNT)
        room = MOST_COUNTED - self.values[found["place"]]
        self.values[found["place"]] += np.minimum(found["count"], room)


def ngrams_of(text: str, num_words: int) -> bytes:
    """Return the n-grams of a text to protect, as they lie in a file."""
    return hash_ngrams(hash_words(text), num_words).astype("<u8").tobytes()


def merge_ngrams(paths: Sequence[Path], target: Path) -> int:
    """Write the n-grams of all files to `target`, each once, sorted, and return how many there are.

    In memory each takes 8 bytes.
    """
    sizes = [path.stat().st_size // 8 for path in paths]
    ngrams, start = np.empty(sum(sizes), dtype="<u8"), 0
    for path, size in zip(paths, sizes, strict=True):
        ngrams[start : start + size] = np.fromfile(path, dtype="<u8")
        start += size
    ngrams.sort()
    temporary = target.with_name(f".{target.name}.tmp")
    with temporary.open("wb") as file:
        for start in range(0, len(ngrams), NGRAMS_AT_ONCE):
            block = ngrams[start : start + NGRAMS_AT_ONCE]
            is_first = np.ones(len(block), dtype=np.bool_)
            is_first[1:] = block[1:] != block[:-1]
            is_first[0] = start == 0 or block[0] != ngrams[start - 1]
            file.write(block[is_first].tobytes())
        num_ngrams = file.tell() // 8
    temporary.replace(target)
    return num_ngrams


def write_uncommon(path: Path, counts: DocumentCounts, max_documents: int, target: Path) -> None:
    """Write those of the n-grams at `path` to `target` that are in a training document, but not in
    more than `max_documents`: by these documents are judged.
    """
    is_uncommon = (counts.values > 0) & (counts.values <= max_documents)
    ngrams = np.fromfile(path, dtype="<u8")[is_uncommon]
    write_bytes_atomically(target, ngrams.tobytes(), is_durable=False)
