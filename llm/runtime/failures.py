"""Errors across process boundaries: type, message and exit code arrive as they were raised.

The process that fails writes `error.json`; its parent reads it and raises the same error.
"""

import json
import signal
import traceback
from collections.abc import Mapping
from pathlib import Path

from llm.artifact import Json, write_json_atomically
from llm.errors import (
    ArtifactError,
    ConfigError,
    DataError,
    DiskFullError,
    FromscratchError,
    StageError,
    TransientError,
)

ERROR_FILE, OUTPUT = "error.json", "output.log"
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: try again, nothing is lost
EXIT_DISK_FULL = 73  # EX_CANTCREAT of sysexits.h, in case there is no room for error.json either
OUTPUT_CHARACTERS = 2000  # the end of the output, shown of a process that wrote no error.json
# an error is of the first of these that it is an instance of
ERROR_TYPES = (
    ConfigError,
    DataError,
    ArtifactError,
    DiskFullError,
    TransientError,
    StageError,
)


def error_to_json(error: BaseException) -> dict[str, Json]:
    """Return a description for `error_from_json`; an unexpected error brings its traceback."""
    if isinstance(error, FromscratchError):
        kind = next((kind for kind in ERROR_TYPES if isinstance(error, kind)), StageError)
        return {"type": kind.__name__, "message": str(error), "traceback": ""}
    kind = TransientError if isinstance(error, ConnectionError | TimeoutError) else StageError
    return {
        "type": kind.__name__,
        "message": f"{type(error).__name__}: {error}",
        "traceback": "".join(traceback.format_exception(error)),
    }


def error_from_json(data: Mapping[str, Json], what: str, prefix: str = "") -> FromscratchError:
    """Return the error that `error_to_json` described.

    The user's errors get `prefix` before their message; others name the process `what`.
    """
    kind = next((kind for kind in ERROR_TYPES if kind.__name__ == data["type"]), StageError)
    if not data["traceback"]:
        return kind(f"{prefix}{data['message']}")
    return kind(f"{what} failed: {data['message']}\n{data['traceback']}".rstrip())


def error_file(rank: int) -> str:
    """Return the name of the error file of a rank."""
    return f"rank-{rank}-{ERROR_FILE}" if rank else ERROR_FILE


def write_error(work: Path, error: BaseException, rank: int = 0) -> None:
    """Write why rank `rank` of a stage fails, for `read_failure`."""
    write_json_atomically(work / error_file(rank), {**error_to_json(error), "rank": rank})


def forget_errors(work: Path) -> None:
    """Remove the error files of an earlier attempt."""
    for stale in work.glob(f"*{ERROR_FILE}"):
        stale.unlink(missing_ok=True)


def read_failure(
    work: Path, code: int | None, what: str, prefix: str = ""
) -> FromscratchError | None:
    """Return why the process `what`, with work folder `work`, failed.

    None if it still runs (`code` is None) or was ended by a signal, and so may be started again.
    """
    # of several ranks the first counts: the errors of the others follow from it
    paths = sorted(work.glob(f"*{ERROR_FILE}"), key=lambda path: path.stat().st_mtime_ns)
    if paths:
        return error_from_json(json.loads(paths[0].read_bytes()), what, prefix)
    if code is None or code < 0 or code == EXIT_INTERRUPTED:
        return None
    if code == EXIT_DISK_FULL:
        return DiskFullError(
            f"{what}: no space left on the disk of {work}, not even for its error message; make"
            " room there, or set runtime.artifacts_dir to a folder on a larger disk, and run again"
        )
    return StageError(f"{what} {how_it_ended(code)}\n{end_of_output(work)}")


def how_it_ended(code: int) -> str:
    """Describe an exit code; a negative one is the signal that killed the process."""
    if code == EXIT_INTERRUPTED:
        return "was asked to stop by a signal"
    if code >= 0:
        return f"exited with {code}"
    hint = " (which the kernel sends when memory runs out)" if -code == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"


def end_of_output(work: Path) -> str:
    """Return the end of a process's output, if it was kept."""
    try:
        text = (work / OUTPUT).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    return text[-OUTPUT_CHARACTERS:]
