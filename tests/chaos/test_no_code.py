"""Nothing that is loaded runs code, starts, connects or writes elsewhere (promise 18)."""

import importlib.util
from pathlib import Path

import pytest

from tests.chaos.no_code import try_to_run_code


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("pyarrow", "sentencepiece", "backports"))),
    reason="needs pyarrow, sentencepiece and backports.zstd",
)
def test_hostile_files_are_refused_or_read_as_data_and_never_run(tmp_path: Path) -> None:
    figure = try_to_run_code(tmp_path, "few")
    assert figure.num_tried > 150 and figure.failures == []
