"""MLflow runs of trained models, one flat run per model, made to be compared."""

import fcntl
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from llm.artifact import Json, write_json_atomically
from llm.models import MODELS, model_name
from llm.monitoring.metrics import METRICS_FILE, MetricsReader, read_num_parameters
from tasks.stages import step_name
from tasks.tracking.client import (
    DIGEST_TAG,
    KEY_TAG,
    NOTE,
    STAGE_TAG,
    SWEEP_TAG,
    UID_TAG,
    RunBook,
    described,
    is_refusal,
    one_line,
    split_summary,
)
from tasks.tracking.curves import Curves, draw_losses
from tasks.tracking.journal import Dataset, ModelFinished, ModelStarted, ReportFinished, StageCached
from tasks.tracking.logged_model import log_model, logged_model_id

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

RUN_FILE, LOCK_FILE = "tracking.json", ".tracking.lock"
SAMPLE_TABLE = "samples.json"
SAMPLES_FILE, SAMPLED_TABLE = "samples.jsonl", "sampled_answers.json"
"""Answers that a training by rewards sampled: in its artifact, and as a table in MLflow."""
OTHER_COLUMNS = ("expected", "kind")
logger = logging.getLogger("fromscratch")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedTraining:
    """A model in training. Only the holder of the lock sends its metrics."""

    pipeline_title: str
    file: MetricsReader
    curves: Curves
    lock: IO[bytes] | None


class ModelRuns:
    """The model runs of one journal."""

    def __init__(self, book: RunBook) -> None:
        """Record the runs in `book`."""
        self._book = book
        self._mlflow = book.mlflow
        self._trainings: dict[str, TrackedTraining] = {}
        self._sized: set[str] = set()
        """Steps whose run name already shows the model's size."""
        self._names: dict[str, str] = {}
        """Names of the models by step, in the order of training."""

    def start(self, event: ModelStarted, pipeline_title: str, at_ms: int) -> None:
        """Start the model's run, or continue the run of an interrupted training."""
        step = step_name(event.stage, event.role)
        if step in self._trainings:
            self._release(step)  # of a first attempt that MLflow interrupted
        self._names[step] = model_name(event.stage, event.role)
        work_folder = self._mlflow.path(event.work_folder)
        try:
            lock = _lock(work_folder)
        except BlockingIOError:
            return  # another process continues this training and logs its end
        name = f"model/{step}"
        run_id = self._started_run(self._book.uid(name), work_folder)
        is_new = run_id is None
        if run_id is not None:
            self._book.reopen(name, run_id)
            self._mlflow.set_tags(run_id, {UID_TAG: self._book.uid(name)})
            self._mlflow.client.update_run(run_id, status="RUNNING")
        else:
            tags = {STAGE_TAG: event.stage, KEY_TAG: event.key}
            title = _title(pipeline_title, self._names[step])
            run_id = self._book.begin(name, "models", title, tags, at_ms)
        if lock is not None:
            known: dict[str, Json] = {"uri": self._mlflow.known_as, "run_id": run_id}
            write_json_atomically(work_folder / RUN_FILE, known, is_durable=False)
        self._trainings[step] = TrackedTraining(
            pipeline_title=pipeline_title,
            file=MetricsReader(work_folder / METRICS_FILE),
            curves=Curves(self._mlflow, run_id, is_new=is_new),
            lock=lock,
        )
        self._describe(run_id, step, event)

    def find_cached(self, event: StageCached, sweep: str) -> None:
        """Find the run of a cached model: it gets the new report, and its sweep's tag."""
        if event.stage in MODELS:
            tags = {STAGE_TAG: event.stage, DIGEST_TAG: event.digest}
            if (run := self._mlflow.find_run("models", tags)) is not None:
                step = step_name(event.stage, event.role)
                self._names[step] = model_name(event.stage, event.role)
                self._book.run_ids[f"model/{step}"] = run.info.run_id
                self._mlflow.set_tags(run.info.run_id, {SWEEP_TAG: sweep})

    def follow(self) -> None:
        """Send the metrics that training wrote since the last call."""
        for step, training in self._trainings.items():
            training.curves.send_new(training.file)
            self._name_with_size(step, training)

    def finish(self, event: ModelFinished, at_ms: int) -> None:
        """Log a finished model and end its run."""
        step = step_name(event.stage, event.role)
        training = self._trainings.get(step)
        if training is None:
            return
        training.curves.send_new(training.file)
        name = f"model/{step}"
        if event.status == "FINISHED":
            training.curves.send_new(MetricsReader(self._mlflow.path(event.folder) / METRICS_FILE))
            size = event.summary.get("num_parameters")
            title = _title(training.pipeline_title, self._names[step], size)
            self._log_final(self._book.run_ids[name], title, event, at_ms)
        self._book.end(name, event.status, at_ms)
        self._release(step)

    def log_report(self, event: ReportFinished, at_ms: int) -> None:
        """Log each model's metrics and samples to its run."""
        folder = self._mlflow.path(event.folder)
        metrics, _ = split_summary(event.metrics)
        samples: list[dict[str, Json]] = json.loads((folder / "samples.json").read_bytes())
        for step, model in self._names.items():
            if (run_id := self._book.run_ids.get(f"model/{step}")) is None:
                continue
            known = self._mlflow.client.get_run(run_id).data.metrics
            own = _metrics_of(model, metrics, event.models)
            changed = {key: value for key, value in own.items() if known.get(key) != value}
            model_id = logged_model_id(self._mlflow, run_id)
            self._mlflow.log_metrics(run_id, changed, at_ms, model_id=model_id)
            for file in ("report.md", "report.json"):
                self._mlflow.client.log_artifact(run_id, str(folder / file))
            if samples:  # masked language models have none
                self._mlflow.log_table(run_id, SAMPLE_TABLE, _sample_rows(samples, model))

    def _name_with_size(self, step: str, training: TrackedTraining) -> None:
        """Add the model's size to the run's name once training has written it."""
        if step in self._sized:
            return
        num_parameters = read_num_parameters(training.file.path.parent)
        if num_parameters is not None:
            title = _title(training.pipeline_title, self._names[step], num_parameters)
            self._mlflow.client.update_run(self._book.run_ids[f"model/{step}"], name=title)
            self._sized.add(step)

    def stop_following(self) -> None:
        """Send the last metrics of trainings that ended without an event."""
        try:
            self.follow()
        except Exception as error:
            if not is_refusal(error):
                raise
            logger.warning("could not log metrics to MLflow: %s", one_line(error))
        self.release()

    def release(self) -> None:
        """Free the locks of trainings, so that another process can follow them."""
        for step in list(self._trainings):
            self._release(step)

    def _release(self, step: str) -> None:
        lock = self._trainings.pop(step).lock
        if lock is not None:
            lock.close()

    def _describe(self, run_id: str, step: str, event: ModelStarted) -> None:
        """Log settings, links, datasets and the starting model."""
        from mlflow.entities import LoggedModelInput

        self._mlflow.log_parameters(run_id, event.settings)
        pipeline_run = self._book.run_ids.get("pipeline", "")
        tags = described({**event.links, "pipeline_run": pipeline_run})
        self._mlflow.set_tags(run_id, tags)
        datasets = [_dataset_input(dataset) for dataset in event.datasets]
        earlier = [
            self._book.run_ids.get(f"model/{name}", "") for name in self._names if name != step
        ]
        models: list[LoggedModelInput] = []
        if known := [earlier_id for earlier_id in earlier if earlier_id]:
            start_id = logged_model_id(self._mlflow, known[-1])
            models = [LoggedModelInput(start_id)] if start_id else []
        self._mlflow.client.log_inputs(run_id, datasets=datasets, models=models)

    def _log_final(self, run_id: str, title: str, event: ModelFinished, at_ms: int) -> None:
        client, folder = self._mlflow.client, self._mlflow.path(event.folder)
        metrics, texts = split_summary(event.summary)
        run = client.get_run(run_id)
        client.update_run(run_id, name=title)
        links = run.data.tags.get(NOTE, "").partition("Model:")[0].rstrip()
        note = f"{links}\n\nModel: `{event.folder}`"
        self._mlflow.set_tags(run_id, {**texts, DIGEST_TAG: event.digest, NOTE: note})
        for file in (folder / "model.json", *sorted(folder.glob("tokenizer.*"))):
            client.log_artifact(run_id, str(file))
        if (sampled := folder / SAMPLES_FILE).is_file():
            rows = [json.loads(line) for line in sampled.read_text(encoding="utf-8").splitlines()]
            self._mlflow.log_table(run_id, SAMPLED_TABLE, [_sampled_row(row) for row in rows])
        points = MetricsReader(folder / METRICS_FILE).read_new()
        client.log_figure(run_id, draw_losses(points, title), "loss.png")
        last_step = points[-1].step if points else 0
        name = model_name(event.stage, event.role)
        is_chat = event.summary.get("content") != "text"
        model_id = log_model(self._mlflow, run, folder, name, is_chat=is_chat, step=last_step)
        final = {f"final/{key}": value for key, value in metrics.items()}
        self._mlflow.log_metrics(run_id, final, at_ms, model_id=model_id)

    def _started_run(self, uid: str, work_folder: Path) -> str | None:
        """Return the run that an earlier delivery of this event started, or the unfinished run of
        an earlier training in `work_folder`.
        """
        from mlflow.exceptions import MlflowException

        found = self._mlflow.find_run("models", {UID_TAG: uid})
        if found is not None:
            return found.info.run_id
        try:
            known = json.loads((work_folder / RUN_FILE).read_bytes())
            if known["uri"] != self._mlflow.known_as:
                return None
            run = self._mlflow.client.get_run(known["run_id"])
        except FileNotFoundError:
            return None
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        is_open = run.info.status != "FINISHED" and run.info.lifecycle_stage == "active"
        return run.info.run_id if is_open else None


def _lock(work_folder: Path) -> IO[bytes] | None:
    """Take the lock of a work folder; None if the folder is gone because training has ended.

    Raises:
        BlockingIOError: another process follows the training.
    """
    try:
        lock = (work_folder / LOCK_FILE).open("wb")
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise
    return lock


def _dataset_input(dataset: Dataset) -> "DatasetInput":
    from mlflow.entities import Dataset as MlflowDataset
    from mlflow.entities import DatasetInput, InputTag

    source = json.dumps({"uri": dataset.path})
    entity = MlflowDataset(
        name=dataset.name, digest=dataset.digest, source_type="local", source=source
    )
    return DatasetInput(entity, [InputTag("mlflow.data.context", dataset.context)])


def _title(pipeline_title: str, model: str, num_parameters: Json = None) -> str:
    """Return a model run's name: `chat finetune.num_steps=200 3.2M quickstart`. Overrides come
    before the recipe because MLflow's lists truncate long names.
    """
    differing, _, recipe = pipeline_title.rpartition(" ")
    size = _short(num_parameters) if isinstance(num_parameters, int) else ""
    return " ".join(filter(None, [model, differing, size, recipe]))


def _short(count: int) -> str:
    """Return a parameter count in short form: `28.2K`, `3.2M`, `1.5B`."""
    unit, size = next(
        (unit, size)
        for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3), ("", 1))
        if count >= size
    )
    return f"{count / size:.1f}{unit}"


def _metrics_of(
    model: str, metrics: Mapping[str, float], models: Sequence[str]
) -> dict[str, float]:
    """Return one model's metrics as `eval/...`, and the metrics of the data unchanged."""
    own: dict[str, float] = {}
    for key, value in metrics.items():
        group, _, rest = key.partition("/")
        if group == model:
            own[f"eval/{rest}"] = value
        elif group not in models:
            own[key] = value
    return own


def _sampled_row(sample: Mapping[str, Json]) -> dict[str, Json]:
    names = ("prompt", "answer", "step", "reward", "reference")
    return {name: sample.get(name) for name in names}


def _sample_rows(samples: Sequence[Mapping[str, Json]], model: str) -> list[dict[str, Json]]:
    """Return the samples of one model as table rows. By default MLflow's page groups by the first
    column and compares the second: the completions of every run beside the prompt.
    """
    others = [name for name in OTHER_COLUMNS if any(name in sample for sample in samples)]
    return [
        {
            "prompt": sample["prompt"],
            "completion": sample[model],
            **{name: sample.get(name) for name in others},
        }
        for sample in samples
    ]
