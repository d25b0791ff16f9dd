"""A full disk is one error for the user, whatever the kernel calls it; other errors stay."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from llm.errors import DiskFullError
from llm.runtime.disk import disk_full, refuse_full_disk


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "quota of the disk is used up"),
        (errno.EFBIG, "may not be so large here"),
    ],
)
def test_every_kind_of_full_is_one_line_with_bytes_and_advice(
    tmp_path: Path, number: int, reason: str
) -> None:
    path = tmp_path / "not" / "made" / "file"
    found = disk_full(OSError(number, os.strerror(number)), path, 1234)
    message = str(found)
    free = shutil.disk_usage(tmp_path).free
    assert reason in message and "needed 1,234 more" in message and str(path) in message
    assert abs(int(message.split("found ")[1].split()[0].replace(",", "")) - free) < 2**30
    assert "runtime.artifacts_dir" in message and "\n" not in message


def test_bytes_that_nobody_counted_are_more_than_are_free(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match="needed more than"), refuse_full_disk(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_other_errors_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), refuse_full_disk(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")
