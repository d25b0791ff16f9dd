"""The curves of a model: from the file its training writes to its MLflow run, live and once each.

MLflow itself is asked how far a run's curves are, per metric, whenever that is not certain: after
an outage, or when a training goes on in another process. So there is no second record to be wrong,
and a step that a resumed training repeats is not drawn twice.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llm.monitoring.metrics import MetricsReader, Point
from tasks.tracking.client import MlflowStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow.entities import Metric

METRICS_PER_BATCH = 900  # MLflow takes 1000 entities in a call
TOKENS_AXIS, SECONDS_AXIS = "x-axis/tokens", "x-axis/seconds"  # listed after the curves


class Curves:
    """Sends points to one run, in order, each once."""

    def __init__(self, store: MlflowStore, run_id: str, *, is_new: bool) -> None:
        """Send to `run_id`, which has no points at all if it `is_new`."""
        self._store = store
        self._run_id = run_id
        self._last_step: dict[str, int] = {}
        self._is_certain = is_new
        self._pending: list[Point] = []

    def send_new(self, file: MetricsReader) -> None:
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
        for key, value in _with_axes(point).items():
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


def _with_axes(point: Point) -> dict[str, float]:
    """Return the metrics with the two other axes one may want to see them over."""
    return {**point.metrics, TOKENS_AXIS: point.tokens, SECONDS_AXIS: point.seconds}
