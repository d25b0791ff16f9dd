"""No archive, URL or link leaves its folder or fills the disk (promise 19)."""

import importlib.util
from pathlib import Path

import pytest

from tests.chaos.archives import ARCHIVE_CASES

NEEDS = {".zst": "backports", ".parquet": "pyarrow"}


@pytest.mark.parametrize("name", list(ARCHIVE_CASES))
def test_nothing_leaves_its_folder_or_fills_the_disk(name: str, tmp_path: Path) -> None:
    for word, package in NEEDS.items():
        if word in name and importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    ARCHIVE_CASES[name](tmp_path)
