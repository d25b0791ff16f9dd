"""An artifacts folder with an MLflow database, and events as a run logs them."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm.artifact import ArtifactWriter, Json
from llm.config import RunConfig, RuntimeConfig, flatten
from tasks.tracking.client import MlflowConnection
from tasks.tracking.journal import (
    Dataset,
    ModelFinished,
    ModelStarted,
    PipelineStarted,
    StageFinished,
    StageStarted,
)
from tasks.tracking.tracker import Tracker

SUMMARY: dict[str, Json] = {"num_parameters": 3_200_000, "val_loss": 1.5}
SAMPLES: list[dict[str, Json]] = [
    {"kind": "instruction", "prompt": "2+2?", "expected": "4", "base": "five", "chat": "4"},
    {"kind": "continuation", "prompt": "The ", "expected": None, "base": "cat", "chat": "dog"},
]


class TrackedFolder:
    """An artifacts folder, and the MLflow that its runs are logged to."""

    def __init__(self, path: Path, uri: str = "", project: str = "fromscratch") -> None:
        self.path = path
        self.work = path / "work"
        self.config = RunConfig(
            name="tiny", runtime=RuntimeConfig(tracking_uri=uri, project=project)
        )
        self.uri = uri or f"sqlite:///{path / 'mlflow.db'}"

    @property
    def client(self) -> Any:
        return MlflowConnection(self.uri, self.path, "unused").client

    def start(self, name: str = "lr=1 tiny", **links: str) -> Tracker:
        tracker = Tracker(self.config, self.path)
        settings = {**flatten(self.config), "evaluate.prompts": "long " * 2000}
        links = {"prefect_url": "http://127.0.0.1:4200/runs/1"} | links
        project = self.config.runtime.project
        tracker.log(PipelineStarted(project=project, name=name, settings=settings, links=links))
        return tracker

    def runs(self, experiment: str) -> dict[str, Any]:
        """Every run of an experiment by its name; no two may have the same."""
        found = self.client.get_experiment_by_name(f"{self.config.runtime.project}/{experiment}")
        listed = self.client.search_runs([found.experiment_id])
        by_name = {run.info.run_name: self.client.get_run(run.info.run_id) for run in listed}
        assert len(by_name) == len(listed)
        return by_name

    def steps(self, run_id: str, key: str = "train/loss") -> list[int]:
        history = self.client.get_metric_history(run_id, key)
        return [point.step for point in sorted(history, key=lambda point: point.timestamp)]


def start_stage(tracker: Tracker, stage: str, role: str = "", **tags: str) -> None:
    tracker.log(StageStarted(stage=stage, role=role, key="key", tags=tags))


def finish_stage(
    tracker: Tracker, stage: str, role: str = "", seconds: float = 1.0, **event: Any
) -> None:
    tracker.log(StageFinished(stage=stage, role=role, seconds=seconds, **event))


def start_model(tracker: Tracker, work: Path, stage: str = "pretrain") -> None:
    work.mkdir(parents=True, exist_ok=True)
    start_stage(tracker, stage, reason="pretrain.num_steps: 1 to 2")
    dataset = Dataset(name="pack corpus", digest="d" * 32, path=str(work))
    tracker.log(
        ModelStarted(
            stage=stage,
            role="",
            key="key",
            settings={"pretrain.num_steps": 2},
            datasets=[dataset],
            work_folder=str(work),
        )
    )


def finish_model(
    tracker: Tracker, work: Path, folder: Path, stage: str = "pretrain", samples: str = ""
) -> str:
    writer = ArtifactWriter(folder)
    if samples:
        writer.write_bytes("samples.jsonl", samples.encode(), is_log=True)
    writer.write_bytes("model.safetensors", stage.encode())
    writer.write_json("model.json", {})
    writer.write_bytes("tokenizer.json", b"{}")
    writer.write_bytes("metrics.jsonl", (work / "metrics.jsonl").read_bytes(), is_log=True)
    digest = writer.finish(stage=stage, summary=SUMMARY).digest
    finish_stage(tracker, stage, seconds=12.5, digest=digest, summary=SUMMARY)
    tracker.log(
        ModelFinished(stage=stage, role="", digest=digest, folder=str(folder), summary=SUMMARY)
    )
    return digest


def write_points(work: Path, steps: range) -> None:
    work.mkdir(parents=True, exist_ok=True)
    with (work / "metrics.jsonl").open("a") as file:
        for step in steps:
            metrics = {"train/loss": 9.0 / (step + 1), "learning_rate": 0.1}
            line = {"step": step, "tokens": 10 * step, "seconds": step / 100, "metrics": metrics}
            file.write(json.dumps(line) + "\n")


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_the_thread() -> None:
    wait_for(lambda: all(thread.name != "mlflow" for thread in threading.enumerate()))
