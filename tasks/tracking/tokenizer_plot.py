"""Tokenizer report: document length in tokens over length in characters, as a plot."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.tokenizer.report import REPORT_JSON

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tasks.tracking.client import MlflowConnection


def log_tokenizer_report(mlflow: "MlflowConnection", run_id: str, folder: Path) -> None:
    """Log the report of a `train_tokenizer` artifact and its plot, if the artifact still exists."""
    if not (folder / REPORT_JSON).is_file():
        return
    report: dict[str, Any] = json.loads((folder / REPORT_JSON).read_bytes())
    mlflow.client.log_artifact(run_id, str(folder / REPORT_JSON))
    figure = draw_lengths({f"{report['vocab_size']:,} tokens": report["lengths"]})
    mlflow.client.log_figure(run_id, figure, "lengths.png")


def draw_lengths(lengths: Mapping[str, Sequence[Sequence[int]]]) -> "Figure":
    """Plot each document's length in tokens over its length in characters, per tokenizer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, documents in lengths.items():
        characters, tokens = [n for n, _ in documents], [n for _, n in documents]
        axes.scatter(characters, tokens, s=9, label=name)
    longest = max((n for documents in lengths.values() for n, _ in documents), default=1)
    axes.plot([0, longest], [0, longest], color="gray", linewidth=1, label="one per character")
    axes.set(xlabel="characters", ylabel="tokens", title="length of documents")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
