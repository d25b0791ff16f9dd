"""Whatever a file holds, each record is used or counted with file and line (promise 14)."""

import importlib.util
import random
from pathlib import Path

import pytest

from tests.chaos.nasty_text import RANDOM_FILES, long_line, try_hub

NEEDS = {"Parquet": "pyarrow", "any bytes": "pyarrow"}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", list(RANDOM_FILES))
def test_each_record_is_used_or_counted_with_file_and_line(
    name: str, seed: int, tmp_path: Path
) -> None:
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"needs {NEEDS[name]}")
    RANDOM_FILES[name](tmp_path, random.Random(seed))


def test_a_line_of_a_gibibyte_is_counted_in_512_mebibytes(tmp_path: Path) -> None:
    long_line(tmp_path, "a.jsonl")


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs datasets")
def test_wrong_types_on_the_hub_are_counted_and_not_turned_into_text(tmp_path: Path) -> None:
    try_hub(tmp_path, random.Random(1), is_streamed=True)
