"""Registry of the live flow runs of an artifacts folder: one locked file per run.

The kernel releases the lock when the process ends, however it ends. A run that Prefect shows as
running although its lock is free was killed, and no one else would report that to Prefect.
"""

import contextlib
import fcntl
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO
from urllib.error import HTTPError

from tasks.prefect_api import FINAL_STATES, PrefectApi, state_type

KILLED = "The process was killed; run it again to resume."


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveRun:
    """A flow run whose process is alive."""

    id: str
    name: str
    pid: int
    is_of_worker: bool
    """Whether it was started by the worker of `up`, rather than by a command line."""


class LiveRunFile:
    """The lock file that marks this process's flow run as live until the process ends."""

    def __init__(self, artifacts_dir: Path, run: LiveRun) -> None:
        """Create and lock the file of `run`."""
        folder = _folder(artifacts_dir)
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / f".{run.id}"
        self._file = new.open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._file.write(json.dumps(asdict(run)))
        self._file.flush()
        new.rename(folder / run.id)  # locked before it is visible
        _held.append(self._file)  # Prefect records the final state after the flow has returned

    def end(self) -> None:
        """Mark the run as ended. The lock stays: Prefect may not have the final state yet."""
        self._file.seek(0)
        self._file.truncate()


_held: list[IO[str]] = []


def live_runs(artifacts_dir: Path) -> list[LiveRun]:
    """Return the runs whose processes are alive, oldest first."""
    found: list[LiveRun] = []
    for path in _files(artifacts_dir):
        if not _is_free(path):
            with contextlib.suppress(ValueError, TypeError):  # it has ended or is starting
                found.append(LiveRun(**json.loads(path.read_bytes())))
    return found


def has_process(artifacts_dir: Path, run: LiveRun) -> bool:
    """Tell whether a run's process is alive; it is until Prefect has the final state."""
    path = _folder(artifacts_dir) / run.id
    return path.exists() and not _is_free(path)


def close_dead_runs(artifacts_dir: Path, api: PrefectApi) -> list[str]:
    """Set Prefect's state of killed runs to crashed; return their names.

    Raises:
        OSError: Prefect does not answer; the remaining runs are left to the next call.
    """
    closed: list[str] = []
    for path in _files(artifacts_dir):
        if not _is_free(path):
            continue
        try:
            run = api.get(f"flow_runs/{path.name}")
        except HTTPError as error:
            if error.code != 404:  # the run was deleted in Prefect
                raise
        else:
            if state_type(run) not in FINAL_STATES:
                _close(api, run["id"])
                closed.append(run["name"])
        path.unlink(missing_ok=True)
    return closed


def _close(api: PrefectApi, run_id: str) -> None:
    """Set a run, its running tasks and its child runs (shards on a cluster) to crashed."""
    of_run = {"flow_runs": {"id": {"any_": [run_id]}}}
    running = {"state": {"type": {"any_": ["RUNNING"]}}}
    for task in api.post("task_runs/filter", {**of_run, "task_runs": running}):
        api.set_state("task_runs", task["id"], "CRASHED", KILLED)
    of_parent = {"flow_runs": {"parent_flow_run_id": {"any_": [run_id]}, **running}}
    for child in api.post("flow_runs/filter", of_parent):
        _close(api, child["id"])
    api.set_state("flow_runs", run_id, "CRASHED", KILLED)


def _folder(artifacts_dir: Path) -> Path:
    return artifacts_dir / "services" / "runs"


def _files(artifacts_dir: Path) -> Iterator[Path]:
    folder = _folder(artifacts_dir)
    found: list[tuple[int, Path]] = []
    for path in folder.glob("[!.]*") if folder.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):  # removed by another `close_dead_runs`
            found.append((path.stat().st_mtime_ns, path))
    for _, path in sorted(found):
        yield path


def _is_free(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return True
    except (BlockingIOError, FileNotFoundError):
        return False
