"""Journals: the MLflow events of a run in an append-only file that survives kills and outages.

A run only appends (microseconds); delivery reads the file and removes it once everything is sent. A
journal whose owner has died (its lock is free) is sent by the next run from the beginning. Sending
an event twice changes nothing, so no record of progress is kept.
"""

import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from llm.artifact import Json, canonical

Status = Literal["FINISHED", "FAILED", "KILLED"]
logger = logging.getLogger("fromscratch")


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """A training dataset, shown by MLflow beside the run."""

    name: str
    digest: str
    path: str
    context: str = "training"


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineStarted:
    """A pipeline run begins. `links` holds ids and URLs, such as that of the Prefect run."""

    project: str
    name: str
    settings: Mapping[str, object]
    links: Mapping[str, str] = field(default_factory=dict[str, str])
    tracking_uri: str = ""
    """Filled in by the tracker, without password; a database in artifacts_dir by its file name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageStarted:
    """A stage is being built."""

    stage: str
    role: str
    key: str
    tags: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, kw_only=True, slots=True)
class StageFinished:
    """A stage was built, or failed."""

    stage: str
    role: str
    seconds: float
    digest: str = ""
    summary: Mapping[str, Json] = field(default_factory=dict[str, Json])
    status: Status = "FINISHED"


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCached:
    """A stage was cached; MLflow run `run_id` built it (empty: unknown)."""

    stage: str
    role: str
    digest: str
    run_id: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelStarted:
    """Training begins; its metrics file grows in `work_folder`."""

    stage: str
    role: str
    key: str
    settings: Mapping[str, object]
    datasets: Sequence[Dataset]
    work_folder: str
    links: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFinished:
    """Training ended. `folder` holds the model, unless `status` says that it was cut short."""

    stage: str
    role: str
    digest: str = ""
    folder: str = ""
    summary: Mapping[str, Json] = field(default_factory=dict[str, Json])
    status: Status = "FINISHED"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportFinished:
    """The models were evaluated; `folder` holds the report and the samples."""

    folder: str
    models: Sequence[str]
    """Their names."""
    metrics: Mapping[str, Json]


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineFinished:
    """The pipeline run ended."""

    status: Status


Event = (
    PipelineStarted
    | StageStarted
    | StageFinished
    | StageCached
    | ModelStarted
    | ModelFinished
    | ReportFinished
    | PipelineFinished
)
EVENTS: Mapping[str, type[Event]] = {kind.__name__: kind for kind in get_args(Event)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One line of a journal: an event and its time in milliseconds since 1970."""

    at_ms: int
    event: Event


class Journal:
    """The events of one run. The owner holds the file's lock while it lives."""

    def __init__(self, path: Path) -> None:
        """Open or create the journal at `path` and take its lock.

        Raises:
            BlockingIOError: a live process holds the lock.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("ab", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or not os.path.samestat(
                os.fstat(self._file.fileno()), path.stat()
            ):
                raise BlockingIOError(f"{path}: removed by another process")
        except BlockingIOError:
            self._file.close()
            raise
        self._reader = path.open("rb")
        self._pending: Entry | None = None

    @classmethod
    def create(cls, folder: Path) -> "Journal":
        """Create a journal in `folder`; names sort by time."""
        while True:
            now_ns = time.time_ns()
            begin = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now_ns // 10**9))
            # another process may take it for abandoned before it is locked; then try another name
            with contextlib.suppress(BlockingIOError):
                return cls(folder / f"{begin}-{now_ns % 10**9:09d}-{os.getpid()}.journal")

    @classmethod
    def abandoned(cls, folder: Path) -> Iterator["Journal"]:
        """Yield and lock, oldest first, each journal whose owner has died."""
        for path in sorted(folder.glob("*.journal")):
            try:
                journal = cls(path)
            except BlockingIOError:
                continue
            if journal.path.stat().st_size:
                yield journal
            else:  # the owner died before its first event, or another process just removed it
                journal.remove()

    @property
    def name(self) -> str:
        """The journal's name, unique in its folder for all time."""
        return self.path.stem

    @property
    def last_change_ms(self) -> int:
        """When the last event was written: the last sign of life of a killed run."""
        return self.path.stat().st_mtime_ns // 1_000_000

    def append(self, event: Event) -> None:
        """Write one event as one line, with one system call."""
        line = {
            "event": type(event).__name__,
            "at_ms": time.time_ns() // 1_000_000,
            "content": canonical(event),
        }
        self._file.write(json.dumps(line).encode() + b"\n")

    def next_entry(self) -> Entry | None:
        """Return the oldest unacknowledged entry, or None if there is no complete one."""
        while self._pending is None:
            line = self._reader.readline()
            if not line.endswith(b"\n"):
                self._reader.seek(-len(line), os.SEEK_CUR)
                return None
            try:
                self._pending = _decode(line)
            except (ValueError, TypeError, KeyError) as error:
                logger.warning("%s: skipped an event of another version (%s)", self.path, error)
        return self._pending

    def acknowledge(self) -> None:
        """Advance past the entry that `next_entry` returned."""
        self._pending = None

    def close(self) -> None:
        """Free the lock; the next run delivers the rest."""
        self._reader.close()
        self._file.close()

    def remove(self) -> None:
        """Remove a journal that was sent completely."""
        self.path.unlink(missing_ok=True)
        self.close()


def _decode(line: bytes) -> Entry:
    data: dict[str, Any] = json.loads(line)
    content = cast(dict[str, Any], data["content"])
    if "datasets" in content:
        content["datasets"] = [Dataset(**dataset) for dataset in content["datasets"]]
    return Entry(at_ms=int(data["at_ms"]), event=EVENTS[data["event"]](**content))
