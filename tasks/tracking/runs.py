"""Turn journal events into MLflow runs. Applying an event twice changes nothing.

Two experiments: `<project>/pipelines` has one run per pipeline run with a child per built stage;
`<project>/models` has one flat run per model, since MLflow's compare pages do not show nested runs.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

from tasks.stages import step_name
from tasks.store import ArtifactStore
from tasks.tracking.client import (
    DIGEST_TAG,
    KEY_TAG,
    STAGE_TAG,
    MlflowConnection,
    RunBook,
    described,
    is_refusal,
    one_line,
    split_summary,
)
from tasks.tracking.funnel_plot import log_funnel, without_funnel
from tasks.tracking.journal import (
    Entry,
    ModelFinished,
    ModelStarted,
    PipelineFinished,
    PipelineStarted,
    ReportFinished,
    StageCached,
    StageFinished,
    StageStarted,
    Status,
)
from tasks.tracking.models import ModelRuns
from tasks.tracking.tokenizer_plot import log_tokenizer_report

logger = logging.getLogger("fromscratch")


class PipelineRuns:
    """The run of the pipeline and its children, one per built stage."""

    def __init__(self, book: RunBook, artifacts_dir: Path) -> None:
        """Record the runs in `book`."""
        self._book = book
        self._mlflow = book.mlflow
        self._artifacts_dir = artifacts_dir
        self.title = ""
        """The name of the flow run: the overrides, then the recipe."""
        self.sweep = ""
        """The sweep the run belongs to, if any."""
        self._settings: Mapping[str, object] = {}

    def start(self, event: PipelineStarted, at_ms: int) -> None:
        """Start the pipeline's run with every setting."""
        self.title, self._settings = event.name, event.settings
        self.sweep = event.links.get("sweep", "")
        run_id = self._book.begin("pipeline", "pipelines", event.name, {}, at_ms)
        self._mlflow.set_tags(run_id, described(event.links))
        self._mlflow.log_parameters(run_id, event.settings)

    def start_stage(self, event: StageStarted, at_ms: int) -> None:
        """Start a child run with the stage's own settings."""
        title = step_name(event.stage, event.role)
        tags = {
            "mlflow.parentRunId": self._book.run_ids["pipeline"],
            STAGE_TAG: event.stage,
            KEY_TAG: event.key,
            "fromscratch.role": event.role,
            **{f"fromscratch.{key}": value for key, value in event.tags.items()},
        }
        run_id = self._book.begin(f"stage/{title}", "pipelines", title, tags, at_ms)
        section = {
            key: value for key, value in self._settings.items() if key.startswith(f"{event.stage}.")
        }
        self._mlflow.log_parameters(run_id, section)

    def finish_stage(self, event: StageFinished, at_ms: int) -> None:
        """End a child run with the summary of the stage's artifact."""
        title = step_name(event.stage, event.role)
        name = f"stage/{title}"
        run_id = self._book.run_ids[name]
        metrics, texts = split_summary(without_funnel(event.summary))
        self._mlflow.log_metrics(run_id, {"seconds": event.seconds, **metrics}, at_ms)
        self._mlflow.set_tags(run_id, {**texts, DIGEST_TAG: event.digest})
        log_funnel(self._mlflow, run_id, title, event.summary)
        if event.stage == "train_tokenizer" and event.digest:
            folder = ArtifactStore(self._artifacts_dir).folder(event.stage, event.digest)
            log_tokenizer_report(self._mlflow, run_id, folder)
        self._book.end(name, event.status, at_ms)

    def log_cached(self, event: StageCached) -> None:
        """Tag the pipeline's run with the run that built a cached stage; it gets no child run."""
        built_in = event.run_id
        if not built_in:
            tags = {STAGE_TAG: event.stage, DIGEST_TAG: event.digest}
            found = self._mlflow.find_run("pipelines", tags)
            built_in = found.info.run_id if found else "unknown"
        name = step_name(event.stage, event.role)
        tag = {f"cached/{name}": f"{event.digest} built in run {built_in}"}
        self._mlflow.set_tags(self._book.run_ids["pipeline"], tag)


class MlflowRuns:
    """Sends the events of one journal to MLflow."""

    def __init__(self, mlflow: MlflowConnection, journal_name: str, artifacts_dir: Path) -> None:
        """Prepare; MLflow is not contacted yet."""
        self._book = RunBook(mlflow, journal_name)
        self._pipeline = PipelineRuns(self._book, artifacts_dir)
        self._models = ModelRuns(self._book)

    @property
    def run_ids(self) -> Mapping[str, str]:
        """MLflow run ids by name: `pipeline`, `stage/pack chats`, `model/pretrain`."""
        return self._book.run_ids

    def apply(self, entry: Entry) -> None:
        """Send one event."""
        match entry.event:
            case PipelineStarted() as event:
                self._pipeline.start(event, entry.at_ms)
            case StageStarted() as event:
                self._pipeline.start_stage(event, entry.at_ms)
            case StageFinished() as event:
                self._pipeline.finish_stage(event, entry.at_ms)
            case StageCached() as event:
                self._pipeline.log_cached(event)
                self._models.find_cached(event, self._pipeline.sweep)
            case ModelStarted() as event:
                self._models.start(event, self._pipeline.title, entry.at_ms)
            case ModelFinished() as event:
                self._models.finish(event, entry.at_ms)
            case ReportFinished() as event:
                self._models.log_report(event, entry.at_ms)
            case PipelineFinished() as event:
                self.end_open_runs(event.status, entry.at_ms)

    def follow(self) -> None:
        """Send the metrics that training wrote since the last call."""
        self._models.follow()

    def end_open_runs(self, status: Status, at_ms: int) -> None:
        """End every open run, the pipeline's last. A run deleted in MLflow is skipped."""
        self._models.stop_following()
        for name in sorted(self._book.open, key=lambda name: name == "pipeline"):
            try:
                self._book.end(name, status, at_ms)
            except Exception as error:
                if not is_refusal(error):
                    raise
                logger.warning("could not log the end of %s to MLflow: %s", name, one_line(error))
                self._book.open.discard(name)

    def release(self) -> None:
        """Free the locks of trainings, so that another process can follow them."""
        self._models.release()
