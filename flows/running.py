"""Which flow runs of an artifacts folder are alive: a locked file for each.

The kernel frees the lock when the process ends, however it ends. A run whose lock is free and which
Prefect still shows as running was killed; nobody else would ever say so.
"""

import contextlib
import fcntl
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO
from urllib.error import HTTPError

from flows.prefect_api import FINAL_STATES, PrefectApi, state_type

KILLED = "Its process was killed; run it again to go on from where it was."


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningRun:
    """A flow run whose process is alive."""

    id: str
    name: str
    pid: int
    is_of_worker: bool
    """Whether the worker that `up` started runs it, or someone's command line."""


class RunFile:
    """Says that this process runs a flow run, from now until the process ends."""

    def __init__(self, artifacts_dir: Path, run: RunningRun) -> None:
        """Say so in the folder whose server knows the run."""
        folder = _folder(artifacts_dir)
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / f".{run.id}"
        self._file = new.open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._file.write(json.dumps(asdict(run)))
        self._file.flush()
        new.rename(folder / run.id)  # locked before anyone sees it
        _held.append(self._file)  # Prefect is told how the run ended after the flow has returned

    def ended(self) -> None:
        """Say that the run has ended. The lock stays: Prefect may not know yet."""
        self._file.seek(0)
        self._file.truncate()


_held: list[IO[str]] = []


def running_runs(artifacts_dir: Path) -> list[RunningRun]:
    """Return the runs that are alive, in the order they were started."""
    found: list[RunningRun] = []
    for path in _files(artifacts_dir):
        if not _is_free(path):
            with contextlib.suppress(ValueError, TypeError):  # it ended, or just begins
                found.append(RunningRun(**json.loads(path.read_bytes())))
    return found


def has_process(artifacts_dir: Path, run: RunningRun) -> bool:
    """Tell whether the process of a run is there: until Prefect knows how the run ended, it is."""
    path = _folder(artifacts_dir) / run.id
    return path.exists() and not _is_free(path)


def close_dead_runs(artifacts_dir: Path, api: PrefectApi) -> list[str]:
    """Tell Prefect that the runs whose processes are gone crashed; return their names.

    Raises:
        OSError: Prefect does not answer; the rest is left to the next call.
    """
    closed: list[str] = []
    for path in _files(artifacts_dir):
        if not _is_free(path):
            continue
        try:
            run = api.get(f"flow_runs/{path.name}")
        except HTTPError as error:
            if error.code != 404:  # a run that was deleted has no end to tell
                raise
        else:
            if state_type(run) not in FINAL_STATES:
                _close(api, run["id"])
                closed.append(run["name"])
        path.unlink(missing_ok=True)
    return closed


def _close(api: PrefectApi, run_id: str) -> None:
    """Close a run, the tasks that ran in it, and its runs of shards."""
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
        with contextlib.suppress(FileNotFoundError):  # another that closes dead runs removed it
            found.append((path.stat().st_mtime_ns, path))
    for _, path in sorted(found):
        yield path


def _is_free(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return True
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return False
