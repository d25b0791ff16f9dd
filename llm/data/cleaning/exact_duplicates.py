"""Tell which of many hashes came before, in bounded memory but for a byte each.

They are dealt to files by their first bits, so that equal ones lie in the same file, which is then
sorted in memory.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import numpy.typing as npt

HASHES_PER_FILE = 1 << 20
"""Sorting them takes 80 MB at most; a file more costs less than a sort that does not fit."""
MAX_FILES = 512
ENTRY = np.dtype([("hash", "<u8", 2), ("ordinal", "<u8")])


def find_repeated(
    blocks: Iterable[npt.NDArray[np.uint64]], num_hashes: int, scratch: Path
) -> npt.NDArray[np.bool_]:
    """Return for each hash whether it came before, (num_hashes,).

    They come as blocks of any length, each hash in two halves, (length, 2). The files lie in
    `scratch` without a name.
    """
    num_files = min(max(num_hashes // HASHES_PER_FILE, 1), MAX_FILES)
    is_repeated = np.zeros(num_hashes, dtype=np.bool_)
    with ExitStack() as stack:
        files = [stack.enter_context(TemporaryFile(dir=scratch)) for _ in range(num_files)]
        start = 0
        for hashes in blocks:
            entries = np.empty(len(hashes), dtype=ENTRY)
            entries["hash"], entries["ordinal"] = hashes, np.arange(start, start + len(hashes))
            dealt = (hashes[:, 0] >> np.uint64(32)) * np.uint64(num_files) >> np.uint64(32)
            for number in range(num_files):
                files[number].write(entries[dealt == number].tobytes())
            start += len(hashes)
        assert start == num_hashes
        for file in files:
            file.seek(0)
            entries = np.frombuffer(file.read(), dtype=ENTRY)
            order = np.lexsort((entries["hash"][:, 1], entries["hash"][:, 0]))  # stable
            hashes = entries["hash"][order]
            is_same = (hashes[1:] == hashes[:-1]).all(axis=1)
            is_repeated[entries["ordinal"][order[1:][is_same]]] = True
    return is_repeated
