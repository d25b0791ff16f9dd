"""How a stage runs as a process of its own: `python -m llm.<stage> JOB.json`.

The job file says what to build and where. The process reports by three files in its work folder,
which outlives kills: `progress.json` (how far it is), `metrics.jsonl` (the curves) and `error.json`
(why it failed). It ends with its parent, and on SIGTERM, SIGINT or SIGUSR1 saves what it has and
exits with EXIT_INTERRUPTED.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import NoReturn

from llm.artifact import MANIFEST, ArtifactWriter, Json, write_json_atomically
from llm.config import RuntimeConfig
from llm.errors import DiskFullError, Interrupted, StageError
from llm.runtime.code import code_digests
from llm.runtime.disk import refuse_full_disk
from llm.runtime.failures import EXIT_DISK_FULL, EXIT_INTERRUPTED, write_error

PROGRESS, METRICS = "progress.json", "metrics.jsonl"
STARTING_MODEL = "base"  # name of the input whose weights a stage continues to train
PARENT_PID = "FROMSCRATCH_PARENT_PID"  # of whoever starts a process that ends with it
PR_SET_PDEATHSIG = 1  # linux/prctl.h
SECONDS_BETWEEN_PROGRESS = 0.2
SECONDS_BETWEEN_PARENT_LOOKS = 0.5
SECONDS_TO_SAVE_ALONE = 5.0  # for what is not saved by then, the last checkpoint is there

_is_stopping = False


@dataclass(kw_only=True, slots=True)
class Job:
    """One stage to run: what decides its bytes, where they go, and what it may say on the way."""

    stage: str
    settings: Mapping[str, Json]
    """The stage's section, as plain JSON types."""
    role: str = ""
    """`corpus` or `chats` where a stage runs twice."""
    seed: int = 0
    """The run's seed; each use derives its own from it."""
    inputs: Mapping[str, str] = field(default_factory=dict[str, str])
    """Folder of each input artifact by name."""
    input_digests: Mapping[str, str] = field(default_factory=dict[str, str])
    """Content digest of each input by name."""
    code: Mapping[str, str] = field(default_factory=dict[str, str])
    """The code the cache key was computed from; empty skips the comparison."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Where and how."""
    out: Path = Path("out")
    """Folder the finished artifact is made in; emptied at the start."""
    work: Path = Path("work")
    """Folder that outlives kills: checkpoints, partial downloads, progress and metrics."""
    shard: Mapping[str, Json] = field(default_factory=dict[str, Json])
    """Which part of the stage to do alone, as llm.runtime.shards says; empty for the whole."""
    report: "Callable[[int, int, str], None] | None" = field(default=None, repr=False)
    """Takes the progress in place of the file, of a shard done within its stage's process."""
    _next_progress_at: float = field(default=0.0, repr=False)

    def report_progress(self, done: int, total: int, unit: str) -> None:
        """Say how far the stage is: `done` of `total` (0: unknown) `unit`s. Call it in every loop.

        Raises:
            Interrupted: the stage was asked to stop.
        """
        self.raise_if_stopping()
        if self.report is not None:
            self.report(done, total, unit)
            return
        now = time.monotonic()
        if now >= self._next_progress_at or done == total:
            self._next_progress_at = now + SECONDS_BETWEEN_PROGRESS
            write_json_atomically(
                self.work / PROGRESS, {"done": done, "total": total, "unit": unit}, is_durable=False
            )

    def raise_if_stopping(self) -> None:
        """Raise Interrupted when a signal asked this process to stop."""
        if _is_stopping:
            raise Interrupted(f"{self.stage} was asked to stop")

    @property
    def is_stopping(self) -> bool:
        """Whether a signal asked this process to stop."""
        return _is_stopping


StageFunction = Callable[[Job, ArtifactWriter], Mapping[str, Json]]


def run_job(
    function: StageFunction,
    shard_function: StageFunction | None = None,
    *,
    saves_when_stopped: bool = False,
) -> None:
    """Be the process of one stage: read the job named on the command line and run it.

    `function(job, writer)` writes the files and returns the summary; `shard_function` does so for a
    job that is one shard of a stage. In a distributed stage every rank runs it and only rank 0
    writes. `saves_when_stopped` gives it time for that when its parent is gone.
    """
    if len(sys.argv) != 2:
        sys.exit(
            f"usage: python -m llm.{function.__name__} JOB.json   (`fromscratch run` makes one)"
        )
    die_with_parent(saves_first=saves_when_stopped)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, _stop)
    job = read_job(Path(sys.argv[1]))
    rank = int(os.environ.get("RANK", "0"))
    with contextlib.ExitStack() as stack:
        try:
            with refuse_full_disk(job.work):
                job.work.mkdir(parents=True, exist_ok=True)
                alive = stack.enter_context((job.work / "alive.lock").open("w"))
                # kept until this process ends: whoever starts the stage anew waits for it
                fcntl.flock(alive, fcntl.LOCK_SH)
                _refuse_changed_code(job)
                _do(job, rank, function, shard_function)
        except Interrupted as stop:
            print(f"{stop}; it can go on from here", file=sys.stderr)
            sys.exit(EXIT_INTERRUPTED)
        except DiskFullError as error:
            _end_of_room(job, error, rank)
        except BaseException as error:
            write_error(job.work, error, rank)
            raise


def _end_of_room(job: Job, error: DiskFullError, rank: int) -> NoReturn:
    """End with EXIT_DISK_FULL, which says what it can where the message finds no room either."""
    if rank == 0 and not job.shard:  # the part of an artifact takes the room of error.json
        shutil.rmtree(job.out, ignore_errors=True)
    with contextlib.suppress(DiskFullError):
        write_error(job.work, error, rank)
    with contextlib.suppress(OSError):  # what is printed goes to the same disk
        print(error, file=sys.stderr, flush=True)
    sys.stderr = None  # Python's own last flush would end it with another code
    sys.exit(EXIT_DISK_FULL)


def _do(job: Job, rank: int, function: StageFunction, shard_function: StageFunction | None) -> None:
    if job.shard and shard_function is not None:
        make_shard(job, shard_function)
    elif rank == 0:
        writer = ArtifactWriter(job.out)
        finish(job, writer, function(job, writer))
    else:
        function(job, ArtifactWriter(job.work / f"rank-{rank}"))


def command(stage: str, job_path: Path) -> list[str]:
    """Return the command that runs a stage, or one shard of it, by itself."""
    return [sys.executable, "-m", f"llm.{stage}", str(job_path)]


def child_environment() -> dict[str, str]:
    """Return the environment of a process that finds this `llm` and ends with this process."""
    source = str(Path(__file__).parents[2])
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), PARENT_PID: str(os.getpid())}
    return {**os.environ, **own}


def finish(job: Job, writer: ArtifactWriter, summary: Mapping[str, Json]) -> None:
    """Write the manifest, which makes the artifact whole."""
    writer.finish(
        stage=job.stage,
        summary=summary,
        settings=job.settings,
        inputs=job.input_digests,
        code=job.code,
        provenance=provenance(),
    )


def make_shard(job: Job, function: StageFunction) -> None:
    """Do one shard in a folder of this process's own, and give it its name when it is whole.

    Two processes may do the same shard at once, on a cluster that took one for dead: the bytes are
    the same, and the first to finish names them.
    """
    who = f"{platform.node()}-{os.getpid()}"
    folder = job.out.with_name(f".{job.out.name}.{who}")
    try:
        writer = ArtifactWriter(folder)
        finish(job, writer, function(job, writer))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    try:
        folder.rename(job.out)
    except OSError:
        if not is_finished(job.out):
            raise
        shutil.rmtree(folder)


def read_job(path: Path) -> Job:
    """Read a job file as `write_job` wrote it."""
    data = json.loads(path.read_bytes())
    data["runtime"] = RuntimeConfig(**data["runtime"])
    data["out"], data["work"] = Path(data["out"]), Path(data["work"])
    return Job(**data)


def write_job(path: Path, job: Job) -> None:
    """Write the job file that `python -m llm.<stage>` takes."""
    names = ("stage", "role", "seed", "settings", "inputs", "input_digests", "code", "runtime",
             "shard")  # fmt: skip
    data = {name: getattr(job, name) for name in names}
    write_json_atomically(
        path, {**data, "out": str(job.out), "work": str(job.work)}, is_durable=False
    )


def provenance() -> dict[str, Json]:
    """Return where and by what an artifact was made. It never enters a digest."""
    libraries = ("torch", "accelerate", "tokenizers", "safetensors", "numpy", "datasets")
    versions: dict[str, Json] = {}
    for library in libraries:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return {
        "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def die_with_parent(*, saves_first: bool = False) -> None:
    """Have the kernel end this process when its parent is gone (Linux).

    At once: a library's call of minutes would keep a signal handler waiting. With `saves_first` by
    SIGTERM, whose handler may save, and SECONDS_TO_SAVE_ALONE later whatever is left.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    number = signal.SIGTERM if saves_first else signal.SIGKILL
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
    if saves_first:
        watcher = threading.Thread(
            target=_outlive, args=(parent,), name="parent-watch", daemon=True
        )
        watcher.start()
    expected = os.environ.get(PARENT_PID)
    if expected is not None and os.getppid() != int(expected):
        sys.exit(EXIT_INTERRUPTED)  # it was gone before the kernel was asked


def _outlive(parent: int) -> None:
    """End this process, with its group where it leads one, a while after its parent is gone."""
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_PARENT_LOOKS)
    time.sleep(SECONDS_TO_SAVE_ALONE)
    if os.getpgrp() == os.getpid():  # its ranks would wait as long again
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _stop(number: int, frame: FrameType | None) -> None:
    global _is_stopping
    _is_stopping = True


def _refuse_changed_code(job: Job) -> None:
    if job.code and (now := code_digests(job.stage)) != dict(job.code):
        changed = sorted(
            name for name in now.keys() | job.code.keys() if now.get(name) != job.code.get(name)
        )
        raise StageError(
            f"the code of {', '.join(changed)} changed after the run began, so its output would be"
            " filed under the old code; start the run again"
        )


def is_finished(out: Path) -> bool:
    """Tell whether the artifact in a staging folder got its manifest."""
    return (out / MANIFEST).is_file()
