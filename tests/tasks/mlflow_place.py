"""An artifacts folder and its MLflow, a model that is said to be trained there, and short waits."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm.artifact import ArtifactWriter, Json
from llm.config import RunConfig, RuntimeConfig, flatten
from tasks.tracking.client import MlflowStore
from tasks.tracking.tracker import Dataset, Tracker

FIGURES: dict[str, Json] = {"num_parameters": 3_200_000, "val_loss": 1.5}
SAMPLES: list[dict[str, Json]] = [
    {"kind": "instruction", "prompt": "2+2?", "expected": "4", "base": "five", "chat": "4"},
    {"kind": "continuation", "prompt": "The ", "expected": None, "base": "cat", "chat": "dog"},
]


class Place:
    """An artifacts folder, and the MLflow that is told of the runs in it."""

    def __init__(self, folder: Path, uri: str = "", project: str = "fromscratch") -> None:
        self.folder = folder
        self.work = folder / "work"
        self.config = RunConfig(
            name="tiny", runtime=RuntimeConfig(tracking_uri=uri, project=project)
        )
        self.uri = uri or f"sqlite:///{folder / 'mlflow.db'}"

    @property
    def client(self) -> Any:
        return MlflowStore(self.uri, self.folder, "unused").client

    def start(self, name: str = "lr=1 tiny", **links: str) -> Tracker:
        tracker = Tracker(self.config, self.folder)
        settings = {**flatten(self.config), "evaluate.prompts": "long " * 2000}
        links = {"prefect_url": "http://127.0.0.1:4200/runs/1"} | links
        tracker.start_pipeline(name, settings, links)
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


def start_model(tracker: Tracker, work: Path, stage: str = "pretrain") -> None:
    tracker.stage_started(stage, "", "key", {"reason": "pretrain.num_steps: 1 to 2"})
    dataset = Dataset(name="pack corpus", digest="d" * 32, path=str(work), context="training")
    tracker.model_started(stage, "key", {"pretrain.num_steps": 2}, [dataset], work, {})


def finish_model(tracker: Tracker, work: Path, folder: Path, stage: str = "pretrain") -> str:
    writer = ArtifactWriter(folder)
    writer.write_bytes("model.safetensors", stage.encode())
    writer.write_json("model.json", {})
    writer.write_bytes("tokenizer.json", b"{}")
    writer.write_bytes("metrics.jsonl", (work / "metrics.jsonl").read_bytes(), is_log=True)
    digest = writer.finish(stage=stage, summary=FIGURES).digest
    tracker.stage_finished(stage, "", digest, 12.5, FIGURES)
    tracker.model_finished(stage, digest, folder, FIGURES)
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
