"""Training curves: read the growing metrics file and send each point to MLflow once, live.

After an outage, or when training continues in another process, MLflow is asked for the last step of
each metric. No second record is kept, and a step that a resumed training repeats is not sent twice.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llm.monitoring.metrics import MetricsReader, Point
from tasks.tracking.client import MlflowConnection

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow.entities import Metric

METRICS_PER_BATCH = 900  # MLflow accepts 1000 entities per call
TOKENS_AXIS, SECONDS_AXIS = "x-axis/tokens", "x-axis/seconds"  # listed after the curves


class Curves:
    """Sends points to one run, in order, each once."""

    def __init__(self, mlflow: MlflowConnection, run_id: str, *, is_new: bool) -> None:
        """Send to `run_id`; `is_new` says that it has no points yet."""
        self._mlflow = mlflow
        self._run_id = run_id
        self._last_step: dict[str, int] = {}
        self._is_certain = is_new
        self._pending: list[Point] = []

    def send_new(self, file: MetricsReader) -> None:
        """Send the points that the run lacks. After an error, call it again."""
        self._pending += file.read_new()
        try:
            batch: list[Metric] = []
            for point in self._pending:
                missing = self._missing(point, file.started_at_ms)
                if len(batch) + len(missing) > METRICS_PER_BATCH:
                    self._mlflow.client.log_batch(self._run_id, metrics=batch)
                    batch = []
                batch += missing
            if batch:
                self._mlflow.client.log_batch(self._run_id, metrics=batch)
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
                shown = math.nan if math.isinf(value) else value  # MLflow would draw 1.8e308
                missing.append(Metric(key, shown, at_ms, point.step))
        return missing

    def _last_delivered_step(self, key: str) -> int:
        history = self._mlflow.client.get_metric_history(self._run_id, key)
        return max((metric.step for metric in history), default=-1)


def draw_losses(points: Sequence[Point], title: str) -> "Figure":
    """Plot training and validation loss over tokens."""
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
