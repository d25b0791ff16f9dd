"""Shards: independent parts of a stage's work, each done once by any process and kept.

    work/shards/<name>/           a finished shard: a small artifact, its manifest written last
    work/shards/.<name>.<who>/    a shard being made
    work/shards/<name>.work/      its job file, progress and errors
    work/shards/wanted.json       shards left to a cluster; touched while the stage waits

A shard is a job like a stage: `python -m llm.<stage> work/shards/<name>.work/job.json` does it, on
any machine that sees the folders. Its bytes depend on its settings and the stage's only. A killed
process loses one shard; a killed stage resumes with the shards that are missing.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from llm.artifact import (
    ArtifactWriter,
    FileRecord,
    Json,
    file_sha256,
    read_manifest,
    write_json_atomically,
)
from llm.errors import ArtifactError, StageError
from llm.runtime.failures import forget_errors, how_it_ended, read_failure
from llm.runtime.job import (
    PROGRESS,
    Job,
    child_environment,
    command,
    is_finished,
    make_shard,
    write_job,
)
from llm.runtime.termination import POLL_SECONDS, end_processes

JOB, WANTED = "job.json", "wanted.json"
MAX_ATTEMPTS = 3
HEARTBEAT_SECONDS = 5.0  # how often a waiting stage touches wanted.json
CLUSTER_POLL_SECONDS = 0.2  # over a network file system

ShardFunction = Callable[[Job, ArtifactWriter], Mapping[str, Json]]
"""Does the shard that `job.shard` describes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """A part of a stage's work."""

    name: str
    """Unique within the stage; a file name."""
    settings: Mapping[str, Json]
    """Which part it is: `job.shard`. Never empty."""
    size: int
    """How much work it is, in the unit of the stage's progress."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedShard:
    """The files and summary of a shard."""

    folder: Path
    files: Sequence[FileRecord]
    summary: Mapping[str, Json]

    def adopt(self, writer: ArtifactWriter, names: Mapping[str, str]) -> None:
        """Make its files part of the stage's artifact; `names` maps old names to new ones."""
        records = {record.path: record for record in self.files}
        for name, new_name in names.items():
            writer.adopt(self.folder / name, records[name], new_name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """The shards that a stage leaves to a cluster."""

    id: str
    """New each time a process starts to wait: work for an earlier id is no longer wanted."""
    names: Sequence[str]


def do_shards(
    job: Job, function: ShardFunction, shards: Sequence[Shard], unit: str
) -> list[FinishedShard]:
    """Do the shards that are missing; return all in order.

    Raises:
        DataError, ...: raised by a shard for the user.
        StageError: a shard failed otherwise, or its process was killed MAX_ATTEMPTS times.
    """
    folder = job.work / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    missing = [shard for shard in shards if not _is_whole(folder / shard.name)]
    for shard in missing:
        shutil.rmtree(folder / shard.name, ignore_errors=True)  # it may be there, damaged
    progress = _Progress(job, shards, missing, unit)
    progress.update([])
    num_workers = job.runtime.shard_workers or len(os.sched_getaffinity(0))
    if len(missing) > 1 and job.runtime.shard_runner != "processes":
        _leave_to_cluster(job, missing, progress)
    elif min(len(missing), num_workers) > 1:
        _do_in_processes(job, missing, num_workers, progress)
    else:
        # one alone: a process of its own would only cost its start
        for shard in missing:
            make_shard(progress.part_of(_shard_job(job, shard), shard), function)
            progress.finished(shard)
    return [_finished(folder / shard.name) for shard in shards]


def read_wanted(folder: Path) -> Wanted | None:
    """Return the shards that the stage waits for a cluster to do; `folder` holds its shards."""
    try:
        return Wanted(**json.loads((folder / WANTED).read_bytes()))
    except FileNotFoundError:
        return None


def shard_work(folder: Path, name: str) -> Path:
    """Return the work folder of a shard: job file, progress, errors."""
    return folder / f"{name}.work"


def start_shard(work: Path, stage: str, output: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    """Start the process of a shard, given its work folder. It ends with this process."""
    one_thread = {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # the cores are divided
    environment = child_environment() | one_thread
    return subprocess.Popen(
        command(stage, work / JOB), env=environment, stdout=output, stderr=output
    )


def _shard_job(job: Job, shard: Shard) -> Job:
    folder = job.work / "shards"
    work = shard_work(folder, shard.name)
    work.mkdir(exist_ok=True)
    return replace(job, shard=shard.settings, out=folder / shard.name, work=work)


def _prepare(job: Job) -> None:
    """Write the job file of a shard and remove the reports of an earlier attempt."""
    forget_errors(job.work)
    (job.work / PROGRESS).unlink(missing_ok=True)
    write_job(job.work / JOB, job)


class _Progress:
    """Adds up the progress of the shards."""

    def __init__(
        self, job: Job, shards: Sequence[Shard], missing: Sequence[Shard], unit: str
    ) -> None:
        self._job, self._unit = job, unit
        self._total = sum(shard.size for shard in shards)
        self._done = self._total - sum(shard.size for shard in missing)
        self._most = 0

    def part_of(self, job: Job, shard: Shard) -> Job:
        """Return `job` with its progress reported as part of the stage's."""

        def report(done: int, total: int, unit: str) -> None:
            self._report(shard.size * done // max(total, 1))

        return replace(job, report=report)

    def update(self, running: Sequence[Shard]) -> None:
        """Report the sum of finished shards and of the progress of those running."""
        self._report(sum(self._reported(shard) for shard in running))

    def finished(self, shard: Shard) -> None:
        """Count a shard as done."""
        self._done += shard.size
        self._report(0)

    def _report(self, more: int) -> None:
        self._most = max(
            self._most, self._done + more
        )  # a shard that starts over does not count back
        self._job.report_progress(self._most, self._total, self._unit)

    def _reported(self, shard: Shard) -> int:
        try:
            text = (shard_work(self._job.work / "shards", shard.name) / PROGRESS).read_text()
        except FileNotFoundError:
            return 0
        found = json.loads(text)
        return shard.size * found["done"] // max(found["total"], 1)


def _do_in_processes(
    job: Job, missing: Sequence[Shard], num_workers: int, progress: _Progress
) -> None:
    """Do each shard in a process of its own, `num_workers` at a time."""
    waiting = [(shard, 1) for shard in reversed(missing)]
    running: dict[subprocess.Popen[bytes], tuple[Shard, int]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < num_workers:
                shard, attempt = waiting.pop()
                running[_start(_shard_job(job, shard))] = shard, attempt
            time.sleep(POLL_SECONDS)
            progress.update([shard for shard, _ in running.values()])
            for process in [process for process in running if process.poll() is not None]:
                shard, attempt = running.pop(process)
                if is_finished(job.work / "shards" / shard.name):
                    progress.finished(shard)
                    continue
                code = process.returncode
                _raise_failure(job, shard, code)
                how = f"the process of shard {shard.name} {how_it_ended(code)}"
                if attempt == MAX_ATTEMPTS:
                    raise StageError(f"{how}, {attempt} times; lower runtime.shard_workers")
                print(f"{how}; it is started again", flush=True)
                waiting.append((shard, attempt + 1))
    finally:
        end_processes(list(running))


def _start(job: Job) -> subprocess.Popen[bytes]:
    _prepare(job)
    return start_shard(job.work, job.stage)


def _leave_to_cluster(job: Job, missing: Sequence[Shard], progress: _Progress) -> None:
    """Publish `wanted.json`, which the parent process hands to a cluster, and wait."""
    for shard in missing:
        _prepare(_shard_job(job, shard))
    path = job.work / "shards" / WANTED
    who = f"{os.getpid()}-{time.time_ns()}"
    write_json_atomically(path, Wanted(id=who, names=[shard.name for shard in missing]))
    next_heartbeat_at = time.monotonic() + HEARTBEAT_SECONDS
    try:
        left = list(missing)
        while left:
            time.sleep(CLUSTER_POLL_SECONDS)
            if time.monotonic() >= next_heartbeat_at:
                next_heartbeat_at = time.monotonic() + HEARTBEAT_SECONDS
                path.touch()
            progress.update(left)
            for shard in list(left):
                if is_finished(job.work / "shards" / shard.name):
                    left.remove(shard)
                    progress.finished(shard)
                else:
                    _raise_failure(job, shard)
    finally:
        path.unlink(missing_ok=True)


def _raise_failure(job: Job, shard: Shard, code: int | None = None) -> None:
    """Raise the error of a shard that failed; one killed by a signal is done again."""
    work = shard_work(job.work / "shards", shard.name)
    if (failure := read_failure(work, code, f"shard {shard.name}")) is not None:
        raise failure


def _finished(folder: Path) -> FinishedShard:
    manifest = read_manifest(folder)
    return FinishedShard(folder=folder, files=manifest.files, summary=manifest.summary)


def _is_whole(folder: Path) -> bool:
    """Tell whether a shard is finished and its files have their recorded bytes."""
    try:
        manifest = read_manifest(folder)
    except ArtifactError:
        return False
    return all(
        (folder / record.path).is_file() and file_sha256(folder / record.path) == record.sha256
        for record in manifest.files
    )
