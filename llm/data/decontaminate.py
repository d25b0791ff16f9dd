"""Keep out of training what models are measured on: documents that share an n-gram with it.

In memory a word of the protected texts takes 9 bytes, a training document nothing.

W words of a text, N n-grams protected.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from llm.config import DecontaminationConfig
from llm.data.ngrams import hash_ngrams, hash_words
from llm.data.staging import StagedDocument

MOST_COUNTED = 255  # a byte for each n-gram


class Decontamination:
    """First all texts to protect, then, if common phrases are no sign, all training texts to
    count, then each to be judged.

    Source: Brown et al. 2020, appendix C, arXiv:2005.14165. There the surroundings of what is
    shared are cut out; here it is the document. A text to protect of fewer words than an n-gram has
    cannot be.
    """

    def __init__(self, path: Path, config: DecontaminationConfig) -> None:
        """Collect n-grams in a new file at `path`."""
        self._config = config
        self._path = path
        self._file = path.open("wb")
        self._ngrams = np.zeros(0, dtype=np.uint64)  # (N,) sorted
        self._counts = np.zeros(0, dtype=np.uint8)  # (N,) training documents that hold it

    @property
    def is_counting(self) -> bool:
        """Whether training texts must be counted before they are judged."""
        return self._config.max_documents > 0

    def protect(self, text: str) -> None:
        """Add a text that is measured on."""
        self._file.write(hash_ngrams(hash_words(text), self._config.ngram_words).tobytes())

    def finish(self) -> None:
        """All texts to protect were added."""
        self._file.close()
        self._ngrams = np.fromfile(self._path, dtype=np.uint64)
        self._path.unlink()
        self._ngrams.sort()
        self._counts = np.zeros(len(self._ngrams), dtype=np.uint8)

    def count(self, document: StagedDocument) -> None:
        """Count a document of training for each n-gram it shares."""
        if document.is_validation:
            return
        found = np.unique(self._shared(document.text))
        self._counts[found] += self._counts[found] < MOST_COUNTED

    def is_contaminated(self, document: StagedDocument) -> bool:
        """Tell whether a document of training shares an n-gram that is no common phrase."""
        if document.is_validation:
            return False
        found = self._shared(document.text)
        if self.is_counting:
            found = found[self._counts[found] <= self._config.max_documents]
        return found.size > 0

    def _shared(self, text: str) -> npt.NDArray[np.intp]:
        """Return the places of the first of each n-gram that is protected, (W,) -> (found,)."""
        ngrams = hash_ngrams(hash_words(text), self._config.ngram_words)
        if not ngrams.size or not self._ngrams.size:
            return np.zeros(0, dtype=np.intp)
        ngrams.sort()  # near ones lie near in memory
        places = np.searchsorted(self._ngrams, ngrams)
        is_shared = self._ngrams[np.minimum(places, len(self._ngrams) - 1)] == ngrams
        return places[is_shared]
