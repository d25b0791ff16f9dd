"""Run one stage in a process group of its own: `python -m llm.<stage> JOB.json`.

The child imports neither prefect nor mlflow, so neither can stall or kill training. The parent
follows its progress, stops the whole group on request, restarts a child that a signal killed, and
turns a failure into one error with the child's traceback and the command that reproduces it.
"""

import fcntl
import json
import shlex
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llm.errors import Interrupted, StageError
from llm.monitoring.metrics import METRICS_FILE
from llm.runtime.failures import OUTPUT, end_of_output, forget_errors, how_it_ended, read_failure
from llm.runtime.job import (
    EXIT_INTERRUPTED,
    PROGRESS,
    Job,
    child_environment,
    command,
    is_finished,
    write_job,
)
from llm.runtime.termination import SECONDS_TO_SAVE, end_processes
from tasks.cluster.runner import ShardRunner

CHILD_POLL_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Progress of a stage: `done` of `total` (0: unknown) `unit`s."""

    done: int
    total: int
    unit: str


def launch(
    job: Job,
    folder: Path,
    *,
    is_training: bool,
    on_progress: Callable[[Progress], None],
    should_stop: Callable[[], bool],
    on_restart: Callable[[str], None] = lambda why: None,
) -> None:
    """Run the stage of `job`, whose staging folder is `folder`, until its artifact is finished.

    A child that was killed by a signal or hung is restarted; `on_restart` gets the reason.

    Raises:
        Interrupted: `should_stop` returned True, or the child got a signal; it can be resumed.
        DataError, ConfigError, ...: the user's error that the child raised.
        TransientError: a network failed.
        ConfigError: the library of the cluster for its shards is not installed.
        StageError: any other failure; the message holds the traceback.
    """
    job.work.mkdir(parents=True, exist_ok=True)
    path = folder / "job.json"
    write_job(path, job)
    for attempt in range(job.runtime.max_restarts + 1):
        _wait_for_leftovers(job.work, should_stop)
        forget_errors(job.work)
        (job.work / PROGRESS).unlink(missing_ok=True)
        end = _run(job, path, is_training, on_progress, should_stop)
        if end.code == 0 and is_finished(job.out):
            return
        if should_stop() or (end.code == EXIT_INTERRUPTED and not end.is_stalled):
            raise Interrupted(f"{job.stage} was stopped; run again to resume it")
        why = _restart_reason(job, path, end)
        if attempt == job.runtime.max_restarts:
            raise StageError(
                f"{job.stage} {why}, after {attempt + 1} attempts"
                f" (runtime.max_restarts)\n{end_of_output(job.work)}\n{_reproduce(job, path)}"
            )
        on_restart(why)


@dataclass(frozen=True, kw_only=True, slots=True)
class _End:
    """How a child ended: its exit code, and whether it was stopped because it hung."""

    code: int
    is_stalled: bool = False


def _restart_reason(job: Job, path: Path, end: _End) -> str:
    """Return the reason to restart a stage.

    Raises:
        DataError, ...: the error of a stage that a restart would not cure.
    """
    if end.is_stalled:
        return f"hung: no progress for {job.runtime.stall_seconds} seconds (runtime.stall_seconds)"
    failure = read_failure(job.work, end.code, job.stage, prefix=f"{job.stage}: ")
    if failure is None:
        return how_it_ended(end.code)
    if isinstance(failure, StageError) and "\n" in str(failure):  # a traceback
        failure = type(failure)(f"{failure}\n{_reproduce(job, path)}")
    raise failure


def _reproduce(job: Job, path: Path) -> str:
    return f"reproduce: {shlex.join(command(job.stage, path))}"


def _run(
    job: Job,
    path: Path,
    is_training: bool,
    on_progress: Callable[[Progress], None],
    should_stop: Callable[[], bool],
) -> _End:
    """Start the child and follow it until its whole process group has ended."""
    environment = child_environment() | {"PYTHONUNBUFFERED": "1"}
    # How long an idle OpenMP thread spins before it sleeps. The default, 100 times as long, is
    # three times slower on shared cores; not spinning at all is two times slower for a small model
    # on idle cores (docs/log.md).
    environment.setdefault("GOMP_SPINCOUNT", "3000")
    runner = ShardRunner(job, path)
    with (job.work / OUTPUT).open("ab") as output:
        child = subprocess.Popen(
            command(job.stage, path),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        watch = _Watch(job.work, on_progress, job.runtime.stall_seconds if is_training else 0)
        while True:
            try:
                return _End(code=child.wait(timeout=CHILD_POLL_SECONDS))
            except subprocess.TimeoutExpired:
                watch.poll()
                runner.poll()
            if should_stop() or watch.is_stalled:
                end_processes([child], SECONDS_TO_SAVE, with_groups=True)
                return _End(is_stalled=watch.is_stalled, code=child.wait())
    finally:
        end_processes([child], SECONDS_TO_SAVE, with_groups=True)
        runner.close()


class _Watch:
    """Follows a child's progress and metrics files; notices when they stop changing."""

    def __init__(
        self, work: Path, on_progress: Callable[[Progress], None], stall_seconds: int
    ) -> None:
        self._files = (work / PROGRESS, work / METRICS_FILE)
        self._on_progress = on_progress
        self._stall_seconds = stall_seconds
        self._seen: tuple[int, ...] = ()
        self._seen_at = time.monotonic()
        self._next_at = 0.0

    @property
    def is_stalled(self) -> bool:
        return 0 < self._stall_seconds < time.monotonic() - self._seen_at

    def poll(self) -> None:
        now = time.monotonic()
        if now < self._next_at:
            return
        self._next_at = now + 4 * CHILD_POLL_SECONDS
        seen = tuple(path.stat().st_mtime_ns if path.exists() else 0 for path in self._files)
        if seen != self._seen:
            self._seen, self._seen_at = seen, now
            if self._files[0].exists():
                self._on_progress(Progress(**json.loads(self._files[0].read_bytes())))


def _wait_for_leftovers(work: Path, should_stop: Callable[[], bool]) -> None:
    """Wait until every process of an earlier attempt has ended; one may still be saving."""
    with (work / "alive.lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if should_stop():
                    raise Interrupted("stopped while an earlier attempt was ending") from None
                time.sleep(CHILD_POLL_SECONDS)
