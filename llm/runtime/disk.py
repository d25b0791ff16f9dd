"""A full disk as one error that says how many bytes were needed and how many are free."""

import errno
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from llm.errors import DiskFullError

REASONS = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "your quota of the disk is used up",
    errno.EFBIG: "a file may not be so large here (`ulimit -f`, or the file system)",
}


def disk_full(error: OSError, path: Path, needed_bytes: int | None = None) -> DiskFullError | None:
    """Return the error for the user if `error` is of a full disk, else None.

    `needed_bytes` could not be written to `path`; None if they are not known.
    """
    if error.errno not in REASONS:
        return None
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    needed = f"more than these {free:,}" if needed_bytes is None else f"{needed_bytes:,} more"
    return DiskFullError(
        f"{path}: {REASONS[error.errno]}: found {free:,} bytes free, needed {needed}; make room, or"
        " set runtime.artifacts_dir to a folder on a larger disk, and run again: what is finished"
        " stays"
    )


@contextmanager
def refuse_full_disk(path: Path, needed_bytes: int | None = None) -> Generator[None]:
    """Raise DiskFullError for a full disk while `path` or a file below it is written."""
    try:
        yield
    except OSError as error:
        if (full := disk_full(error, path, needed_bytes)) is not None:
            raise full from error
        raise
