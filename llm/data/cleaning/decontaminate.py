"""Decontamination: find training documents that share an n-gram with evaluation data.

The map pass writes the n-grams of validation documents; merged and sorted in one file, they are
memory-mapped by all processes of the write pass. A training document takes no memory.

W words of a text, N protected n-grams.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llm.data.cleaning.ngrams import Hashes, hash_ngrams, hash_words

NGRAMS, PROTECTED = "ngrams.bin", "protected.bin"
NGRAM_BYTES = 8
NGRAMS_AT_ONCE = 1 << 20


class Protected:
    """The n-grams of all evaluation data, sorted on disk.

    Source: Brown et al. 2020, appendix C, arXiv:2005.14165, who cut out the text around a shared
    n-gram and ignore n-grams in more than 10 documents; here the whole document is dropped. A text
    of fewer words than an n-gram cannot be protected.
    """

    def __init__(self, path: Path, num_words: int) -> None:
        """Open the output of `write_protected` for n-grams of `num_words` words."""
        is_empty = path.stat().st_size == 0
        self._ngrams: Hashes = (  # (N,) sorted
            np.zeros(0, dtype="<u8") if is_empty else np.memmap(path, dtype="<u8", mode="r")
        )
        self._num_words = num_words

    def is_in(self, text: str) -> bool:
        """Return whether a text holds any of the n-grams."""
        ngrams = hash_ngrams(hash_words(text), self._num_words)
        if not ngrams.size or not self._ngrams.size:
            return False
        ngrams.sort()  # neighbors lie close in memory
        indices = np.searchsorted(self._ngrams, ngrams)
        return bool((self._ngrams[np.minimum(indices, len(self._ngrams) - 1)] == ngrams).any())


def ngrams_of(text: str, num_words: int) -> bytes:
    """Return the n-grams of a text in the format of the file NGRAMS."""
    return hash_ngrams(hash_words(text), num_words).astype("<u8").tobytes()


def write_protected(parts: Iterable[npt.NDArray[np.uint64]], num_ngrams: int, path: Path) -> None:
    """Write the distinct n-grams of all parts, `num_ngrams` in all, to `path`, sorted.

    In memory each takes 8 bytes.
    """
    ngrams, end = np.empty(num_ngrams, dtype="<u8"), 0
    for part in parts:
        ngrams[end : end + len(part)] = part
        end += len(part)
    assert end == num_ngrams
    ngrams.sort()
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        for start in range(0, len(ngrams), NGRAMS_AT_ONCE):
            block = ngrams[start : start + NGRAMS_AT_ONCE]
            is_first = np.ones(len(block), dtype=np.bool_)
            is_first[1:] = block[1:] != block[:-1]
            is_first[0] = start == 0 or block[0] != ngrams[start - 1]
            file.write(block[is_first].tobytes())
    temporary.replace(path)
