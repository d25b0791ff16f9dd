"""The view of the models' run list that draws their curves first.

MLflow draws charts in sections by the first part of a metric's name, in alphabetical order: bars of
single figures come before the curves. A shared view, which is a tag of the experiment, has an order
of its own.
"""

import json

CURVES_VIEW = "curves"
VIEW_TAG = f"mlflow.sharedViewState.{CURVES_VIEW}"
SECTIONS = (
    "train", "val", "eval", "Model metrics", "throughput", "memory",
    "final", "baseline", "leak", "data", "x-axis", "System metrics",
)  # fmt: skip
"""In this order; metrics without a `/` are in MLflow's `Model metrics`."""


def curves_first() -> str:
    """Return the state of the run list, as MLflow's page reads it from `VIEW_TAG`."""
    shown = {"display": True, "isReordered": False, "deleted": False, "isGenerated": True}
    sections = [{"uuid": f"section-{name}", "name": name, **shown} for name in SECTIONS]
    return json.dumps(
        {"compareRunCharts": [], "compareRunSections": sections, "isAccordionReordered": True}
    )
