"""What a tokenizer makes of text, as a plot on its stage's run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.tokenizer.report import REPORT_JSON

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tasks.tracking.client import MlflowStore


def log_tokenizer_report(store: "MlflowStore", run_id: str, folder: Path) -> None:
    """Log the report in the artifact of `train_tokenizer`, if it is still there, and its plot."""
    if not (folder / REPORT_JSON).is_file():
        return
    report: dict[str, Any] = json.loads((folder / REPORT_JSON).read_bytes())
    store.client.log_artifact(run_id, str(folder / REPORT_JSON))
    figure = draw_lengths({f"{report['vocab_size']:,} tokens": report["lengths"]})
    store.client.log_figure(run_id, figure, "lengths.png")


def draw_lengths(lengths: Mapping[str, Sequence[Sequence[int]]]) -> "Figure":
    """Draw the length of documents in tokens over that in characters, by tokenizer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, documents in lengths.items():
        characters, tokens = [n for n, _ in documents], [n for _, n in documents]
        axes.scatter(characters, tokens, s=9, label=name)
    longest = max((n for documents in lengths.values() for n, _ in documents), default=1)
    axes.plot([0, longest], [0, longest], color="gray", linewidth=1, label="one a character")
    axes.set(xlabel="characters", ylabel="tokens", title="length of documents")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
