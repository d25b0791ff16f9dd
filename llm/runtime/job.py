"""A stage as a process of its own: `python -m llm.<stage> JOB.json`.

The process writes three files in its work folder, which outlives kills: `progress.json`,
`metrics.jsonl` (training curves) and `error.json` (why it failed). It ends with its parent, and on
a stop signal saves its work and exits with EXIT_INTERRUPTED.
"""

import contextlib
import fcntl
import json
import os
import platform
import shutil
import sys
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
from llm.runtime.termination import PARENT_PID, die_with_parent, on_stop_signal

PROGRESS = "progress.json"
STARTING_MODEL = "base"  # name of the input whose weights a stage continues to train
SECONDS_BETWEEN_PROGRESS = 0.2

_is_stopping = False


@dataclass(kw_only=True, slots=True)
class Job:
    """One stage to run: its settings and inputs, where its output goes, and how it reports."""

    stage: str
    settings: Mapping[str, Json]
    """The stage's section, as plain JSON types."""
    role: str = ""
    """`corpus` or `chats`, of a stage that runs twice."""
    seed: int = 0
    """The run's seed; each use derives its own from it."""
    inputs: Mapping[str, str] = field(default_factory=dict[str, str])
    """Folder of each input artifact by name."""
    input_digests: Mapping[str, str] = field(default_factory=dict[str, str])
    """Content digest of each input by name."""
    code: Mapping[str, str] = field(default_factory=dict[str, str])
    """Code digests that the cache key was computed from; empty: not compared."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Where and how."""
    out: Path = Path("out")
    """Folder to write the artifact in; emptied at the start."""
    work: Path = Path("work")
    """Folder that outlives kills: checkpoints, partial downloads, progress and metrics."""
    shard: Mapping[str, Json] = field(default_factory=dict[str, Json])
    """The shard to do, as in llm.runtime.shards; empty: the whole stage."""
    report: "Callable[[int, int, str], None] | None" = field(default=None, repr=False)
    """Takes the progress instead of the file, for a shard done in its stage's process."""
    _next_progress_at: float = field(default=0.0, repr=False)

    def report_progress(self, done: int, total: int, unit: str) -> None:
        """Report `done` of `total` (0: unknown) `unit`s. Call it in every loop.

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
    """Run the job named on the command line and exit.

    `function(job, writer)` writes the files and returns the summary; `shard_function` does so for
    one shard. Every rank of a distributed stage runs it; only rank 0's files are kept.
    `saves_when_stopped` gives it time to save when its parent is gone.
    """
    if len(sys.argv) != 2:
        sys.exit(
            f"usage: python -m llm.{function.__name__} JOB.json   (`fromscratch run` makes one)"
        )
    die_with_parent(saves_first=saves_when_stopped)
    on_stop_signal(_request_stop)
    job = read_job(Path(sys.argv[1]))
    rank = int(os.environ.get("RANK", "0"))
    with contextlib.ExitStack() as stack:
        try:
            with refuse_full_disk(job.work):
                job.work.mkdir(parents=True, exist_ok=True)
                alive = stack.enter_context((job.work / "alive.lock").open("w"))
                # held until this process ends: the next attempt waits for it
                fcntl.flock(alive, fcntl.LOCK_SH)
                _refuse_changed_code(job)
                _run_function(job, rank, function, shard_function)
        except Interrupted as stop:
            print(f"{stop}; it can go on from here", file=sys.stderr)
            sys.exit(EXIT_INTERRUPTED)
        except DiskFullError as error:
            _exit_disk_full(job, error, rank)
        except BaseException as error:
            write_error(job.work, error, rank)
            raise


def _exit_disk_full(job: Job, error: DiskFullError, rank: int) -> NoReturn:
    """Exit with EXIT_DISK_FULL, since there may be no room for the error file either."""
    if rank == 0 and not job.shard:  # the unfinished artifact takes the room of error.json
        shutil.rmtree(job.out, ignore_errors=True)
    with contextlib.suppress(DiskFullError):
        write_error(job.work, error, rank)
    with contextlib.suppress(OSError):  # what is printed goes to the same disk
        print(error, file=sys.stderr, flush=True)
    sys.stderr = None  # Python's own last flush would end it with another code
    sys.exit(EXIT_DISK_FULL)


def _run_function(
    job: Job, rank: int, function: StageFunction, shard_function: StageFunction | None
) -> None:
    if job.shard and shard_function is not None:
        make_shard(job, shard_function)
    elif rank == 0:
        writer = ArtifactWriter(job.out)
        finish(job, writer, function(job, writer))
    else:
        function(job, ArtifactWriter(job.work / f"rank-{rank}"))


def command(stage: str, job_path: Path) -> list[str]:
    """Return the command that runs a stage or one of its shards."""
    return [sys.executable, "-m", f"llm.{stage}", str(job_path)]


def child_environment() -> dict[str, str]:
    """Return the environment of a child that imports this `llm` and ends with this process."""
    source = str(Path(__file__).parents[2])
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), PARENT_PID: str(os.getpid())}
    return {**os.environ, **own}


def finish(job: Job, writer: ArtifactWriter, summary: Mapping[str, Json]) -> None:
    """Write the manifest, which completes the artifact."""
    writer.finish(
        stage=job.stage,
        summary=summary,
        settings=job.settings,
        inputs=job.input_digests,
        code=job.code,
        provenance=provenance(),
    )


def make_shard(job: Job, function: StageFunction) -> None:
    """Make one shard in a folder of this process's own, renamed when it is complete."""
    # A cluster that takes a worker for dead has a second one do its shard. Their bytes are equal,
    # and the first to finish publishes them.
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
    """Write a job file."""
    names = ("stage", "role", "seed", "settings", "inputs", "input_digests", "code", "runtime",
             "shard")  # fmt: skip
    data = {name: getattr(job, name) for name in names}
    write_json_atomically(
        path, {**data, "out": str(job.out), "work": str(job.work)}, is_durable=False
    )


def provenance() -> dict[str, Json]:
    """Return time, host and library versions of an artifact. Never part of a digest."""
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


def _request_stop(number: int, frame: FrameType | None) -> None:
    global _is_stopping
    _is_stopping = True


def _refuse_changed_code(job: Job) -> None:
    if job.code and (now := code_digests(job.stage)) != dict(job.code):
        changed = sorted(
            name for name in now.keys() | job.code.keys() if now.get(name) != job.code.get(name)
        )
        raise StageError(
            f"the code of {', '.join(changed)} changed after the run began, so its output would be"
            " cached under the old code; start the run again"
        )


def is_finished(out: Path) -> bool:
    """Tell whether the artifact in a folder is complete: it has its manifest."""
    return (out / MANIFEST).is_file()
