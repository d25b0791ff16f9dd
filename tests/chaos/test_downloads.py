"""A download ends in the right bytes or in a typed error (promise 13)."""

from pathlib import Path

import pytest

from tests.chaos.downloads import DOWNLOAD_CASES


@pytest.mark.parametrize("name", list(DOWNLOAD_CASES))
def test_a_download_is_right_or_a_closed_failure(name: str, tmp_path: Path) -> None:
    DOWNLOAD_CASES[name](tmp_path)
