"""The curves of a model: from the file its training writes to its MLflow run, live and once each.

MLflow itself is asked how far a run's curves are, per metric, whenever that is not certain: after
an outage, or when a training goes on in another process. So there is no second record to be wrong,
and a step that a resumed training repeats is not drawn twice.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tasks.tracking.client import MlflowStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow.entities import Metric

METRICS_PER_BATCH = 900  # MLflow takes 1000 entities in a call
TOKENS_AXIS, SECONDS_AXIS = "x-axis/tokens", "x-axis/seconds"  # listed after the curves


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One line of `metrics.jsonl`: what was measured at a step."""

    step: int
    tokens: int
    seconds: float
    metrics: Mapping[str, float]

    def values(self) -> dict[str, float]:
        """Return the metrics with the two other axes one may want to see them over."""
        return {**self.metrics, TOKENS_AXIS: self.tokens, SECONDS_AXIS: self.seconds}


class PointFile:
    """Reads a growing `metrics.jsonl`; a training that resumes may cut it and write on."""

    def __init__(self, path: Path) -> None:
        """Start at the beginning of a file that need not exist yet."""
        self.path = path
        self.started_at_ms = 0
        """When second zero was, told by the last line and by when the file was last written."""
        self._offset_bytes = 0
        self._last_line = b""

    def read_new(self) -> list[Point]:
        """Return the points of all whole lines not returned yet; all, if the file was rewritten."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            start = self._offset_bytes - len(self._last_line)
            file.seek(start)
            if file.read(len(self._last_line)) != self._last_line:
                self._offset_bytes = 0
                file.seek(0)
            lines = [line for line in file if line.endswith(b"\n")]
            written_at_ms = os.fstat(file.fileno()).st_mtime_ns // 1_000_000
        points = [point for point in map(_point, lines) if point is not None]
        if lines:
            self._offset_bytes += sum(map(len, lines))
            self._last_line = lines[-1]
        if points:
            self.started_at_ms = written_at_ms - int(points[-1].seconds * 1000)
        return points


class Curves:
    """Sends points to one run, in order, each once."""

    def __init__(self, store: MlflowStore, run_id: str, *, is_new: bool) -> None:
        """Send to `run_id`, which has no points at all if it `is_new`."""
        self._store = store
        self._run_id = run_id
        self._last_step: dict[str, int] = {}
        self._is_certain = is_new
        self._pending: list[Point] = []

    def send_new(self, file: PointFile) -> None:
        """Send what `file` has and the run has not. After an error, call it again."""
        self._pending += file.read_new()
        try:
            batch: list[Metric] = []
            for point in self._pending:
                missing = self._missing(point, file.started_at_ms)
                if len(batch) + len(missing) > METRICS_PER_BATCH:
                    self._store.client.log_batch(self._run_id, metrics=batch)
                    batch = []
                batch += missing
            if batch:
                self._store.client.log_batch(self._run_id, metrics=batch)
        except Exception:
            self._last_step.clear()
            self._is_certain = False
            raise
        self._pending.clear()

    def _missing(self, point: Point, started_at_ms: int) -> "list[Metric]":
        from mlflow.entities import Metric

        at_ms = started_at_ms + int(point.seconds * 1000)
        missing: list[Metric] = []
        for key, value in point.values().items():
            if key not in self._last_step:
                self._last_step[key] = -1 if self._is_certain else self._last_delivered_step(key)
            if point.step > self._last_step[key]:
                self._last_step[key] = point.step
                shown = math.nan if math.isinf(value) else value  # drawn as 1.8e308 otherwise
                missing.append(Metric(key, shown, at_ms, point.step))
        return missing

    def _last_delivered_step(self, key: str) -> int:
        history = self._store.client.get_metric_history(self._run_id, key)
        return max((metric.step for metric in history), default=-1)


def draw_losses(points: Sequence[Point], title: str) -> "Figure":
    """Draw training and validation loss over the tokens seen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, marker in (("train/loss", ""), ("val/loss", "o")):
        seen = [(point.tokens, point.metrics[name]) for point in points if name in point.metrics]
        if seen:
            tokens, losses = zip(*seen, strict=True)
            axes.plot(tokens, losses, marker=marker, label=name)
    axes.set(title=title, xlabel="tokens", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    return figure


def _point(line: bytes) -> Point | None:
    """Read one line; one that a kill tore apart is no point."""
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
