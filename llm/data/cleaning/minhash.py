"""Near-duplicate clusters of texts: MinHash LSH proposes pairs, their n-grams decide.

Two texts are candidates if all hashes in one band of their signatures agree; their Jaccard index is
then computed from the n-grams themselves. Texts linked directly or through others form a cluster,
of which the first in the given order is kept. The result depends on the texts and that order alone.

On disk a text takes 128 signature values of 4 bytes and a key of 8 bytes per band; in memory 60
bytes while bands are compared. Signing, which needs the library `rensa`, depends on one text alone
and is done by shards.

U texts, M members of a band's bucket.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from types import ModuleType, TracebackType

import numpy as np
import numpy.typing as npt

from llm.artifact import ArtifactWriter
from llm.config import NearDuplicatesConfig
from llm.data.cleaning.ngrams import POWERS, Hashes, hash_distinct_ngrams, hash_ngrams, hash_words
from llm.data.closing import Closing
from llm.data.open_files import OpenFiles
from llm.errors import ConfigError

Ranks = npt.NDArray[np.int64]
ReadText = Callable[[int], str]

NUM_HASHES = 128
SEED = 1
MIN_FOUND_FRACTION = 0.995
"""Share of the pairs at exactly `min_jaccard` that must be candidates."""
ESTIMATE_SLACK = 0.1
"""Candidates whose estimated Jaccard index is further below `min_jaccard` are skipped; the standard
deviation of the estimate is 0.03 at 0.8 (measured)."""
MAX_REMEMBERED = 1 << 18
"""Pairs known to be unlike, so that they are not compared again in every band."""
MAX_LEADERS = 64
"""At most so many unlike texts of a bucket are compared with all others, so that time stays linear
in its size, also where thousands of pages share a template."""
MAX_CACHED_BYTES = 64 << 20
"""N-grams of the texts of one bucket, which are compared with one leader after another."""
TEXTS_AT_ONCE, WORDS_AT_ONCE = 1024, 1 << 21
"""Signed together."""
SIGNATURES, KEYS = "signatures.bin", "keys.bin"
SIGNATURE_BYTES = 4 * NUM_HASHES


class Signer(Closing):
    """Writes signatures of texts to SIGNATURES, and their band keys, band by band, to KEYS."""

    def __init__(self, writer: ArtifactWriter, config: NearDuplicatesConfig) -> None:
        """Open the first file.

        Raises:
            ConfigError: the library is missing.
        """
        self._rensa = _import_rensa()
        self._writer, self._config = writer, config
        super().__init__()
        self._signatures = self._stack.enter_context(writer.open(SIGNATURES))
        self._waiting: list[Hashes] = []
        self._num_waiting = 0
        self.num_texts = 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._sign()
        super().__exit__(kind, error, trace)
        if error is None:
            self._write_keys()

    def add(self, text: str) -> bool:
        """Sign a text; return False if it has too few words to be compared."""
        words = hash_words(text)
        if len(words) < self._config.min_words:
            return False
        self._waiting.append(hash_ngrams(words, min(self._config.ngram_words, len(words))))
        self._num_waiting += len(words)
        self.num_texts += 1
        if len(self._waiting) >= TEXTS_AT_ONCE or self._num_waiting >= WORDS_AT_ONCE:
            self._sign()
        return True

    def _sign(self) -> None:
        """Write the signatures of the waiting texts."""
        if not self._waiting:
            return
        ends = np.cumsum([0, *map(len, self._waiting)], dtype=np.uint64)
        matrix = self._rensa.RMinHash.digest_matrix_from_flat_token_hashes(
            np.concatenate(self._waiting), ends, NUM_HASHES, SEED
        )
        self._signatures.write(np.array(matrix.to_rows(), dtype="<u4").tobytes())
        self._waiting.clear()
        self._num_waiting = 0

    def _write_keys(self) -> None:
        rows = rows_per_band(self._config.min_jaccard)
        path = self._writer.folder / SIGNATURES
        with self._writer.open(KEYS) as keys, path.open("rb", buffering=0) as file:
            for start in range(0, NUM_HASHES - rows + 1, rows):
                file.seek(0)
                while block := file.read(TEXTS_AT_ONCE * SIGNATURE_BYTES):
                    signatures = np.frombuffer(block, dtype="<u4").reshape(-1, NUM_HASHES)
                    keys.write(_keys(signatures[:, start : start + rows]).tobytes())


class NearDuplicates(Closing):
    """Finds the near-duplicate clusters of signed texts."""

    def __init__(self, folders: Sequence[Path], config: NearDuplicatesConfig) -> None:
        """Number the texts of all folders consecutively."""
        self._config = config
        self._folders = folders
        self._paths = [folder / SIGNATURES for folder in folders]
        sizes = [path.stat().st_size // SIGNATURE_BYTES for path in self._paths]
        self._starts = list(accumulate(sizes, initial=0))
        self.num_bands = NUM_HASHES // rows_per_band(config.min_jaccard)
        self._unlike: set[tuple[int, int]] = set()
        super().__init__()
        self._files = self._stack.enter_context(OpenFiles())

    def __len__(self) -> int:
        return self._starts[-1]

    def find(self, order: Ranks, read_text: ReadText) -> Iterator[Ranks]:
        """Yield after each band the first text of each text's cluster so far, (U,), by rank.

        `order` holds the number of the text at each rank, (U,); other texts are not compared. A
        text that is not the first of its cluster is a near duplicate.
        """
        first = np.arange(len(order), dtype=np.int64)  # (U,) by rank
        for band in range(self.num_bands):
            for members in _buckets(self._read_keys(band)[order], first):
                self._link(members, order, first, read_text)
            first = _flattened(first)
            yield first

    def _read_keys(self, band: int) -> Hashes:
        """Return the keys of all texts in a band, (texts,)."""
        keys = np.empty(len(self), dtype=np.uint64)
        for folder, start, end in zip(self._folders, self._starts, self._starts[1:], strict=False):
            keys[start:end] = np.fromfile(
                folder / KEYS, dtype="<u8", count=end - start, offset=band * (end - start) * 8
            )
        return keys

    def _link(self, members: Ranks, order: Ranks, first: Ranks, read_text: ReadText) -> None:
        """Link the first member with all similar ones, then the first of the remainder, and so on.

        The first texts of clusters are always members, so they are compared.
        """
        ngrams = _NgramCache(read_text, self._config.ngram_words)
        for _ in range(MAX_LEADERS):
            leader, members = members[0], members[1:]
            roots = np.array([_find(first, int(member)) for member in members])
            is_like = roots == _find(first, int(leader))
            unknown = np.flatnonzero(~is_like)
            is_like[unknown] = self._is_like(int(order[leader]), order[members[unknown]], ngrams)
            for member in members[unknown[is_like[unknown]]]:
                one, other = _find(first, int(leader)), _find(first, int(member))
                first[max(one, other)] = min(one, other)
            members = members[~is_like]
            if len(members) < 2:
                return

    def _is_like(self, leader: int, others: Ranks, ngrams: "_NgramCache") -> npt.NDArray[np.bool_]:
        """Return which texts share enough n-grams with the leader, (M,)."""
        own, is_like = self._signature(leader), np.zeros(len(others), dtype=np.bool_)
        for index, other in enumerate(others.tolist()):
            if (leader, other) in self._unlike:
                continue
            estimate = np.count_nonzero(own == self._signature(other)) / NUM_HASHES
            if estimate >= self._config.min_jaccard - ESTIMATE_SLACK:
                share = jaccard(ngrams.read(leader), ngrams.read(other))
                is_like[index] = share >= self._config.min_jaccard
            if not is_like[index] and len(self._unlike) < MAX_REMEMBERED:
                self._unlike.add((leader, other))
        return is_like

    def _signature(self, text: int) -> npt.NDArray[np.uint32]:
        shard = bisect_right(self._starts, text) - 1
        path, number = self._paths[shard], text - self._starts[shard]
        data = self._files.read(path, number * SIGNATURE_BYTES, SIGNATURE_BYTES)
        return np.frombuffer(data, dtype="<u4")


class _NgramCache:
    """The n-grams of the texts of one bucket."""

    def __init__(self, read_text: ReadText, num_words: int) -> None:
        self._read_text = read_text
        self._num_words = num_words
        self._known: dict[int, Hashes] = {}
        self._num_bytes = 0

    def read(self, text: int) -> Hashes:
        """Return the distinct n-grams of a text, sorted."""
        if (found := self._known.get(text)) is None:
            found = hash_distinct_ngrams(self._read_text(text), self._num_words)
            if self._num_bytes + found.nbytes <= MAX_CACHED_BYTES:
                self._known[text] = found
                self._num_bytes += found.nbytes
        return found


def rows_per_band(min_jaccard: float) -> int:
    """Return the largest number of hashes per band that finds MIN_FOUND_FRACTION of the pairs.

    Of pairs with Jaccard index j, 1 - (1 - j^r)^b become candidates (Leskovec et al., Mining of
    Massive Datasets, 3.4.2).
    """
    found = [
        rows for rows in range(1, NUM_HASHES + 1)
        if 1 - (1 - min_jaccard**rows) ** (NUM_HASHES // rows) >= MIN_FOUND_FRACTION
    ]  # fmt: skip
    return max(found)


def jaccard(ngrams: Hashes, others: Hashes) -> float:
    """Return the Jaccard index of two sorted sets; 1 if both are empty."""
    num_shared = len(np.intersect1d(ngrams, others, assume_unique=True))
    num_all = len(ngrams) + len(others) - num_shared
    return num_shared / num_all if num_all else 1.0


def _buckets(keys: Hashes, first: Ranks) -> Iterator[Ranks]:
    """Yield the ascending ranks of texts with equal keys that are not one cluster yet.

    `keys` and `first` are by rank, (U,).
    """
    ranks = np.argsort(keys, kind="stable")
    keys = keys[ranks]
    is_same = np.concatenate([[False], keys[1:] == keys[:-1], [False]])  # as its predecessor
    is_member = is_same[1:] | is_same[:-1]
    is_first = ~is_same[:-1][is_member]
    ranks = ranks[is_member]
    del keys, is_same, is_member
    starts = np.flatnonzero(is_first)
    if not starts.size:
        return
    clusters = _flattened(first)[ranks]
    is_mixed = np.minimum.reduceat(clusters, starts) != np.maximum.reduceat(clusters, starts)
    ends = np.append(starts[1:], len(ranks))
    for start, end in zip(starts[is_mixed], ends[is_mixed], strict=True):
        yield ranks[start:end]


def _keys(columns: npt.NDArray[np.uint32]) -> Hashes:
    """Hash the columns of a band to one key, (texts, rows) -> (texts,)."""
    return columns.astype(np.uint64) @ POWERS[: columns.shape[1]]


def _find(first: Ranks, rank: int) -> int:
    """Return the first of a text's cluster (union-find with path halving)."""
    while (parent := int(first[rank])) != rank:
        first[rank] = first[parent]
        rank = parent
    return rank


def _flattened(first: Ranks) -> Ranks:
    while not np.array_equal(parent := first[first], first):
        first = parent
    return first


def _import_rensa() -> ModuleType:
    try:
        import rensa
    except ImportError as error:
        raise ConfigError(
            "clean.near_duplicates.unit: signatures need the library rensa; `pip install rensa`, or"
            " set it to none"
        ) from error
    return rensa
