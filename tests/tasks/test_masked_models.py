"""A pipeline of masked language models, from raw text to MLflow."""

from pathlib import Path
from typing import Any

import pytest

from tasks.tracking.journal import ReportFinished
from tests import tiny
from tests.tasks.tracked_folder import TrackedFolder

pytestmark = pytest.mark.slow

FIGURES = {
    *(f"{prefix}masked_{figure}" for prefix in ("", "answer_") for figure in ("loss", "accuracy")),
    "pseudo_perplexity",
    "pseudo_loss",
}


def test_a_masked_model_is_trained_measured_and_tracked(tracked: TrackedFolder) -> None:
    settings = [
        *tiny.write_sources(tracked.path),
        "pretrain.model.is_causal=false",
        "pretrain.model.dropout=0.1",
        "finetune.masked_fraction=0.5",
    ]
    tracker = tracked.start()
    artifacts = tracked.path / "artifacts"
    outcomes = tiny.build(artifacts, settings, tracker=tracker)
    report = outcomes["evaluate"]
    tracker.log(ReportFinished(folder=report.path, models=["base", "chat"], metrics=report.summary))
    tracker.close()

    assert {outcome.status for outcome in outcomes.values()} == {"built"}
    summary = outcomes["finetune"].summary
    assert "val_masked_accuracy" in summary and "val_bits_per_byte" not in summary
    assert summary["throughput_peak_teraflops"] == "unknown"
    by_model = {f"{model}/{figure}" for model in ("base", "chat") for figure in FIGURES}
    found = {name for name in report.summary if name.startswith(("base/", "chat/"))}
    assert found == by_model
    assert not any(name.startswith("leak/") for name in report.summary)
    text = (Path(report.path) / "report.md").read_text()
    assert "These models fill in masked tokens" in text
    assert "pseudo-perplexity" in text and "gzip -9" in text
    assert "Held-out instructions" not in text

    runs: dict[str, Any] = tracked.runs("models")
    assert len(runs) == 2
    for run in runs.values():
        metrics = run.data.metrics
        assert {f"eval/{figure}" for figure in FIGURES} <= metrics.keys()
        shown = {
            "val/masked_accuracy",
            "train/loss",
            "gradient_norm",
            "throughput/tokens_per_second",
        }
        assert shown <= metrics.keys()
        assert run.data.tags["summary.throughput_peak_teraflops"] == "unknown"
    base = next(run for name, run in runs.items() if name.startswith("base"))
    assert {"update_norm", "update_norm_relative", "memory/peak_gb"} <= base.data.metrics.keys()
