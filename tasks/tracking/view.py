"""Shared view of the models experiment that shows training curves first.

By default MLflow sorts chart sections by the first part of a metric's name, so bars of single
values come before the curves. A shared view, a tag of the experiment, sets another order.
"""

import json

CURVES_VIEW = "curves"
VIEW_TAG = f"mlflow.sharedViewState.{CURVES_VIEW}"
SECTIONS = (
    "train", "val", "eval", "Model metrics", "throughput", "memory",
    "final", "baseline", "leak", "data", "x-axis", "System metrics",
)  # fmt: skip
"""Sections in order; MLflow puts metrics without a `/` into `Model metrics`."""


def curves_first() -> str:
    """Return the value of `VIEW_TAG`: the state of MLflow's run list page."""
    shown = {"display": True, "isReordered": False, "deleted": False, "isGenerated": True}
    sections = [{"uuid": f"section-{name}", "name": name, **shown} for name in SECTIONS]
    return json.dumps(
        {"compareRunCharts": [], "compareRunSections": sections, "isAccordionReordered": True}
    )
