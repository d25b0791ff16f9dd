"""The cleaning funnel: documents left after each step, as a table and a plot."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from llm.artifact import Json
from tasks.tracking.client import MlflowConnection

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FUNNEL = "funnel"
"""Its key in a summary: a list of steps, each with `step`, `dropped` and `left`."""


def without_funnel(summary: Mapping[str, Json]) -> dict[str, Json]:
    """Return a summary without its funnel, for metrics and tags."""
    return {key: value for key, value in summary.items() if key != FUNNEL}


def log_funnel(
    mlflow: MlflowConnection, run_id: str, title: str, summary: Mapping[str, Json]
) -> None:
    """Log the funnel of a summary, if it has one."""
    steps = cast(Sequence[Mapping[str, Any]], summary.get(FUNNEL) or ())
    if not steps:
        return
    mlflow.log_table(run_id, "funnel.json", steps)
    mlflow.client.log_figure(run_id, draw_funnel(steps, title), "funnel.png")


def draw_funnel(steps: Sequence[Mapping[str, Any]], title: str) -> "Figure":
    """Plot the documents left after each step and the documents the step dropped."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    names = [step["step"] for step in steps]
    left, dropped = ([step[key] for step in steps] for key in ("left", "dropped"))
    axes.barh(names, left, label="left")
    axes.barh(names, dropped, left=left, label="dropped")
    for name, step in zip(names, steps, strict=True):
        axes.annotate(f" {step['left']:,} (-{step['dropped']:,})", (0, name), va="center")
    axes.invert_yaxis()
    axes.set(title=title, xlabel="documents")
    axes.legend()
    return figure
