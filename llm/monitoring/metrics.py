"""The training curves, `metrics.jsonl`: writer, reader and format.

{"step": 50, "tokens": 409600, "seconds": 31.2, "metrics": {"train/loss": 5.1, ...}}

One line per point. Beside it, `size.json` holds the number of parameters.
"""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from llm.artifact import write_json_atomically

METRICS_FILE, SIZE_FILE = "metrics.jsonl", "size.json"
VALIDATION_PREFIX = "val/"
SECONDS_BETWEEN_WRITES = 0.2  # a small model does a hundred steps in that time


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One line of `metrics.jsonl`: the metrics of one step."""

    step: int
    tokens: int
    """Input positions so far."""
    seconds: float
    """Training time so far, without interruptions."""
    metrics: Mapping[str, float]


class MetricsWriter:
    """Appends points to a file, continuing after the checkpoint that training resumes from."""

    def __init__(self, path: Path, step: int) -> None:
        """Open `path` and drop its points after `step`, since these steps are repeated.

        Validation at `step` itself is dropped too: it comes after the checkpoint.
        """
        path.touch()
        self._path = path
        seconds = _truncate(path, step)
        self._started_at = self._written_at = time.perf_counter() - seconds
        self._unwritten: list[bytes] = []

    def append(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """Add one point. It is written at the latest with the next point that comes
        SECONDS_BETWEEN_WRITES after the last write.
        """
        now = time.perf_counter()
        seconds = round(now - self._started_at, 3)
        point = Point(step=step, tokens=tokens, seconds=seconds, metrics=dict(metrics))
        self._unwritten.append(json.dumps(asdict(point), allow_nan=False).encode() + b"\n")
        if now - self._written_at >= SECONDS_BETWEEN_WRITES:
            self.write()

    def write(self) -> None:
        """Write the points added so far, before anything that takes long."""
        if self._unwritten:
            with self._path.open("ab") as file:
                file.write(b"".join(self._unwritten))
            self._unwritten.clear()
        self._written_at = time.perf_counter()

    def make_durable(self) -> None:
        """Write and fsync, before a checkpoint that relies on these points."""
        self.write()
        descriptor = os.open(self._path, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class MetricsReader:
    """Follows a growing file, which a training that resumes may truncate and continue."""

    def __init__(self, path: Path) -> None:
        """Start at the beginning of a file that need not exist yet."""
        self.path = path
        self.started_at_ms = 0
        """When second zero was: the file's time of change less the seconds of its last point."""
        self._offset_bytes = 0
        self._last_line = b""

    def read_new(self) -> list[Point]:
        """Return the points of all complete lines not returned yet; all, if it was rewritten."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            start = self._offset_bytes - len(self._last_line)
            file.seek(start)
            # a file that was truncated and grew again has other bytes where the last line was
            if file.read(len(self._last_line)) != self._last_line:
                self._offset_bytes = 0
                file.seek(0)
            lines = [line for line in file if line.endswith(b"\n")]
            written_at_ms = os.fstat(file.fileno()).st_mtime_ns // 1_000_000
        points = [point for point in map(_parse_point, lines) if point is not None]
        if lines:
            self._offset_bytes += sum(map(len, lines))
            self._last_line = lines[-1]
        if points:
            self.started_at_ms = written_at_ms - int(points[-1].seconds * 1000)
        return points


def write_num_parameters(work: Path, num_parameters: int) -> None:
    """Write the size of the model that is trained in a work folder."""
    write_json_atomically(work / SIZE_FILE, {"num_parameters": num_parameters}, is_durable=False)


def read_num_parameters(work: Path) -> int | None:
    """Return the size of the model, or None before its training wrote it."""
    try:
        return int(json.loads((work / SIZE_FILE).read_bytes())["num_parameters"])
    except FileNotFoundError:
        return None


def _parse_point(line: bytes) -> Point | None:
    """Parse one line; None for a line that a kill tore apart."""
    try:
        data = cast(dict[str, Any], json.loads(line))
        return Point(
            step=int(data["step"]),
            tokens=int(data["tokens"]),
            seconds=float(data["seconds"]),
            metrics={key: float(value) for key, value in data["metrics"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _truncate(path: Path, step: int) -> float:
    """Keep the points up to `step` and return the seconds of the last one kept."""
    # Points are in the order of their steps, so the file is cut, not rewritten. An unfinished last
    # line goes too.
    kept_bytes, seconds = 0, 0.0
    with path.open("rb") as file:
        for line in file:
            point = _parse_point(line)
            if point is None or not line.endswith(b"\n"):
                break
            is_validation = any(name.startswith(VALIDATION_PREFIX) for name in point.metrics)
            if point.step + is_validation > step:
                break
            kept_bytes += len(line)
            seconds = point.seconds
    os.truncate(path, kept_bytes)
    return seconds
