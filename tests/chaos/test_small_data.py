"""Data that is too small or too long is an error before training (promise 15)."""

import importlib.util
from pathlib import Path

import pytest

from tests.chaos.small_data import SMALL_DATA_CASES


@pytest.mark.parametrize("name", list(SMALL_DATA_CASES))
def test_data_that_cannot_be_trained_on_is_an_error_before_training(
    name: str, tmp_path: Path
) -> None:
    if "vocabulary" in name and importlib.util.find_spec("sentencepiece") is None:
        pytest.skip("needs sentencepiece")
    SMALL_DATA_CASES[name](tmp_path)
