"""How an error crosses from one process to another: its type, message and exit code arrive as they
were raised.

The process that fails writes `error.json`; whoever started it reads that, and raises the same.
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

ERROR, OUTPUT = "error.json", "output.log"
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: try again, nothing is lost
EXIT_DISK_FULL = 73  # EX_CANTCREAT of sysexits.h: says so where error.json found no room either
OUTPUT_CHARACTERS = 2000  # of its end, shown of a process that wrote no error.json
# the first that an error is an instance of is its type
KINDS = (
    ConfigError,
    DataError,
    ArtifactError,
    DiskFullError,
    TransientError,
    StageError,
)


def error_to_json(error: BaseException) -> dict[str, Json]:
    """Return what `error_from_json` makes the same error from. A bug has its traceback with it."""
    if isinstance(error, FromscratchError):
        kind = next((kind for kind in KINDS if isinstance(error, kind)), StageError)
        return {"type": kind.__name__, "message": str(error), "traceback": ""}
    kind = TransientError if isinstance(error, ConnectionError | TimeoutError) else StageError
    return {
        "type": kind.__name__,
        "message": f"{type(error).__name__}: {error}",
        "traceback": "".join(traceback.format_exception(error)),
    }


def error_from_json(data: Mapping[str, Json], what: str, prefix: str = "") -> FromscratchError:
    """Return the error that `error_to_json` described: a bug of `what`, or the user's error, whose
    message gets a prefix.
    """
    kind = next((kind for kind in KINDS if kind.__name__ == data["type"]), StageError)
    if not data["traceback"]:
        return kind(f"{prefix}{data['message']}")
    return kind(f"{what} failed: {data['message']}\n{data['traceback']}".rstrip())


def write_error(work: Path, error: BaseException, rank: int = 0) -> None:
    """Write why a process fails, which is rank `rank` of its stage, for `read_failure`."""
    name = f"rank-{rank}-{ERROR}" if rank else ERROR
    write_json_atomically(work / name, {**error_to_json(error), "rank": rank})


def forget_errors(work: Path) -> None:
    """Remove what an earlier attempt wrote."""
    for stale in work.glob(f"*{ERROR}"):
        stale.unlink(missing_ok=True)


def read_failure(
    work: Path, code: int | None, what: str, prefix: str = ""
) -> FromscratchError | None:
    """Return why `what`, which reported in `work`, failed, or None where it did not: it still runs
    (`code` is None), or was ended by a signal, after which it may be started again.

    Of several ranks the first that failed counts: the others' errors are its consequences.
    """
    paths = sorted(work.glob(f"*{ERROR}"), key=lambda path: path.stat().st_mtime_ns)
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
    """Say how a process ended whose exit code, or minus the signal that killed it, is `code`."""
    if code == EXIT_INTERRUPTED:
        return "was asked to stop by a signal"
    if code >= 0:
        return f"exited with {code}"
    hint = " (which the kernel sends when memory runs out)" if -code == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"


def end_of_output(work: Path) -> str:
    """Return the end of what a process printed, where that was kept."""
    try:
        text = (work / OUTPUT).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    return text[-OUTPUT_CHARACTERS:]
