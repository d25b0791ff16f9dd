"""Run one stage in a process group of its own: `python -m llm.<stage> JOB.json`.

The child imports neither prefect nor mlflow, so neither can stall or kill a training. This side
follows its progress, stops the whole group when asked, restarts what a signal killed, and turns a
failure into one error with the child's own traceback and the command that reproduces it.
"""

import contextlib
import fcntl
import json
import os
import shlex
import signal
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
from tasks.cluster.runner import ShardRunner

SECONDS_BETWEEN_LOOKS = 0.05
SECONDS_TO_SAVE = 60.0  # a stopped child saves a checkpoint; then it is killed


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a stage is: `done` of `total` (0: unknown) `unit`s."""

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

    One that a signal killed, or that hung, is started again; `on_restart` takes the reason.

    Raises:
        Interrupted: `should_stop` said so, or the child was told by a signal; it can go on later.
        DataError, ConfigError, ...: what the child raised for the user.
        TransientError: it failed for a network.
        ConfigError: the library of the cluster that does its shards is not installed.
        StageError: it failed otherwise; the message holds its traceback.
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
            raise Interrupted(f"{job.stage} was stopped; run again to go on from where it was")
        why = _why_again(job, path, end)
        if attempt == job.runtime.max_restarts:
            raise StageError(
                f"{job.stage} {why}, and was started {attempt + 1} times"
                f" (runtime.max_restarts)\n{end_of_output(job.work)}\n{_reproduce(job, path)}"
            )
        on_restart(why)


@dataclass(frozen=True, kw_only=True, slots=True)
class _End:
    """How a child ended: its exit code, and whether it was stopped for having hung."""

    code: int
    is_stalled: bool = False


def _why_again(job: Job, path: Path, end: _End) -> str:
    """Return the reason to start a stage again.

    Raises:
        DataError, ...: what it failed of, which another try would not cure.
    """
    if end.is_stalled:
        return (
            f"reported nothing for {job.runtime.stall_seconds} seconds (runtime.stall_seconds) and"
            " was taken for hung"
        )
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
    """Start the child, follow it to its end, and return how it ended. Its group is gone then."""
    environment = child_environment() | {"PYTHONUNBUFFERED": "1"}
    # How long a thread that waits for work spins before it sleeps. A hundred times as long, the
    # default, is three times slower where others use the cores too; not at all is two times slower
    # for a small model where nobody does (docs/log.md).
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
                return _End(code=child.wait(timeout=SECONDS_BETWEEN_LOOKS))
            except subprocess.TimeoutExpired:
                watch.look()
                runner.look()
            if should_stop() or watch.is_stalled:
                return _End(is_stalled=watch.is_stalled, code=_end(child))
    finally:
        _end(child)
        runner.close()


def _end(child: subprocess.Popen[bytes]) -> int:
    """Stop the child's group: ask first, so that it saves, then kill."""
    if child.poll() is None:
        _signal_group(child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=SECONDS_TO_SAVE)
    _signal_group(child.pid, signal.SIGKILL)
    return child.wait()


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return


class _Watch:
    """Looks at what a child reports, and for how long it has reported nothing."""

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

    def look(self) -> None:
        now = time.monotonic()
        if now < self._next_at:
            return
        self._next_at = now + 4 * SECONDS_BETWEEN_LOOKS
        seen = tuple(path.stat().st_mtime_ns if path.exists() else 0 for path in self._files)
        if seen != self._seen:
            self._seen, self._seen_at = seen, now
            if self._files[0].exists():
                self._on_progress(Progress(**json.loads(self._files[0].read_bytes())))


def _wait_for_leftovers(work: Path, should_stop: Callable[[], bool]) -> None:
    """Wait until no process of an earlier attempt is left; one may still be saving."""
    with (work / "alive.lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if should_stop():
                    raise Interrupted("stopped while an earlier attempt was ending") from None
                time.sleep(SECONDS_BETWEEN_LOOKS)
