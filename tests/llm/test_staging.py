"""Staged documents: every repeated hash is found, in however many files they are sorted."""

from pathlib import Path

import numpy as np
import pytest

from llm.data.cleaning import staging
from llm.data.cleaning.staging import find_repeated


@pytest.mark.parametrize("hashes_per_file", [1, 7, 1000])
def test_repeated_hashes_equal_those_of_a_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashes_per_file: int
) -> None:
    monkeypatch.setattr(staging, "HASHES_PER_FILE", hashes_per_file)
    rng = np.random.default_rng(1)
    distinct = rng.integers(0, 2**64, (40, 2), dtype=np.uint64)
    distinct[20:, 0] = distinct[:20, 0]  # half a hash in common does not count
    hashes = distinct[rng.integers(0, 40, 200)]
    blocks = np.split(hashes, [0, 1, 90])
    found = find_repeated(blocks, len(hashes), tmp_path)
    seen = set[tuple[int, ...]]()
    for number, one in enumerate(map(tuple, hashes.tolist())):
        assert found[number] == (one in seen)
        seen.add(one)
    assert not list(tmp_path.iterdir()), "temporary files are removed"


def test_nothing_repeats_nothing(tmp_path: Path) -> None:
    assert find_repeated([], 0, tmp_path).tolist() == []
