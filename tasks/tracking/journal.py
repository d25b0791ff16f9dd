"""What a run has to tell MLflow, as events in a file that outlives kills and outages.

The run only appends, which costs microseconds; delivery reads from the file. One that is told whole
is removed. One whose owner is gone (its lock is free) is told by the next run from its beginning:
telling an event twice changes nothing, so there is no record of delivery that could be wrong.
"""

import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from llm.artifact import Json, canonical

Status = Literal["FINISHED", "FAILED", "KILLED"]
log = logging.getLogger("fromscratch")


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """Data a model learns from, as MLflow shows it beside the run."""

    name: str
    digest: str
    path: str
    context: str
    """What it is used for: `training`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineStarted:
    """A run of the whole pipeline begins. `links` names the Prefect run, say."""

    tracking_uri: str
    """Where this run is told, without user and password; the database in the folder by its name."""
    project: str
    name: str
    settings: Mapping[str, object]
    links: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageStarted:
    """A stage is being built."""

    stage: str
    role: str
    key: str
    tags: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageFinished:
    """A stage is built, or will not be."""

    stage: str
    role: str
    digest: str
    seconds: float
    summary: Mapping[str, Json]
    status: Status


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCached:
    """A stage was there already, made in the MLflow run `run_id` (empty: not known)."""

    stage: str
    role: str
    digest: str
    run_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelStarted:
    """A model is being trained; its curves grow in `work_folder`."""

    stage: str
    key: str
    settings: Mapping[str, object]
    datasets: Sequence[Dataset]
    work_folder: str
    links: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFinished:
    """A model lies in `folder`; or, with another status and no folder, its training ended early."""

    stage: str
    digest: str
    folder: str
    summary: Mapping[str, Json]
    status: Status


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportFinished:
    """Both models were measured; the report and the samples lie in `folder`."""

    folder: str
    metrics: Mapping[str, Json]


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineFinished:
    """The run is over."""

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
EVENTS: Mapping[str, type[Event]] = {
    event.__name__: event
    for event in (
        PipelineStarted,
        StageStarted,
        StageFinished,
        StageCached,
        ModelStarted,
        ModelFinished,
        ReportFinished,
        PipelineFinished,
    )
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One line of a journal: what happened, and when, in milliseconds since 1970."""

    at_ms: int
    event: Event


class Journal:
    """The events of one run. Its owner holds the file's lock for as long as it lives."""

    def __init__(self, path: Path) -> None:
        """Open or create the journal at `path` and take its lock.

        Raises:
            BlockingIOError: the process that holds it is alive.
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
        """Begin a new journal in `folder`; names sort by time."""
        while True:
            now_ns = time.time_ns()
            begin = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now_ns // 10**9))
            with contextlib.suppress(BlockingIOError):  # taken for abandoned before it was locked
                return cls(folder / f"{begin}-{now_ns % 10**9:09d}-{os.getpid()}.journal")

    @classmethod
    def abandoned(cls, folder: Path) -> Iterator["Journal"]:
        """Yield, oldest first and locked, each journal whose owner is gone."""
        for path in sorted(folder.glob("*.journal")):
            try:
                journal = cls(path)
            except BlockingIOError:
                continue
            if journal.path.stat().st_size:
                yield journal
            else:  # its owner died before the first word, or another process just removed it
                journal.remove()

    @property
    def name(self) -> str:
        """A name that no other journal of this folder ever had."""
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
        """Return the oldest entry not yet acknowledged, or None where no whole one is there."""
        while self._pending is None:
            line = self._reader.readline()
            if not line.endswith(b"\n"):
                self._reader.seek(-len(line), os.SEEK_CUR)
                return None
            try:
                self._pending = _decode(line)
            except (ValueError, TypeError, KeyError) as error:
                log.warning("%s: an event of another version is skipped (%s)", self.path, error)
        return self._pending

    def acknowledge(self) -> None:
        """Go on to the entry after the one `next_entry` gave."""
        self._pending = None

    def close(self) -> None:
        """Free the lock; whoever comes next delivers the rest."""
        self._reader.close()
        self._file.close()

    def remove(self) -> None:
        """Remove a journal that is told whole."""
        self.path.unlink(missing_ok=True)
        self.close()


def _decode(line: bytes) -> Entry:
    data: dict[str, Any] = json.loads(line)
    content = cast(dict[str, Any], data["content"])
    if "datasets" in content:
        content["datasets"] = [Dataset(**dataset) for dataset in content["datasets"]]
    return Entry(at_ms=int(data["at_ms"]), event=EVENTS[data["event"]](**content))
