"""What each event of a run becomes in MLflow. Applying one again changes nothing.

Two experiments: `<project>/pipelines` has a run for each flow run with a child for each stage that
was built; `<project>/models` has one flat run for each model, because MLflow's compare pages do not
show nested ones.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

from tasks.store import Store
from tasks.tracking.client import (
    DIGEST_TAG,
    KEY_TAG,
    STAGE_TAG,
    MlflowStore,
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

log = logging.getLogger("fromscratch")


class PipelineRuns:
    """The run of the pipeline and its children, one for each stage that is built."""

    def __init__(self, book: RunBook, artifacts_dir: Path) -> None:
        """Keep the runs in `book`."""
        self._book = book
        self._store = book.store
        self._artifacts_dir = artifacts_dir
        self.title = ""
        """What the flow run is called: what differs from a recipe, and the recipe."""
        self.sweep = ""
        """The sweep it belongs to, if any."""
        self._settings: Mapping[str, object] = {}

    def start(self, event: PipelineStarted, at_ms: int) -> None:
        """Begin the pipeline's run with every setting."""
        self.title, self._settings = event.name, event.settings
        self.sweep = event.links.get("sweep", "")
        run_id = self._book.begin("pipeline", "pipelines", event.name, {}, at_ms)
        self._store.set_tags(run_id, described(event.links))
        self._store.log_parameters(run_id, event.settings)

    def start_stage(self, event: StageStarted, at_ms: int) -> None:
        """Begin a child with the stage's own settings."""
        title = f"{event.stage} {event.role}".strip()
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
        self._store.log_parameters(run_id, section)

    def finish_stage(self, event: StageFinished, at_ms: int) -> None:
        """End a child with what the stage says of its artifact."""
        name = f"stage/{event.stage} {event.role}".strip()
        run_id = self._book.run_ids[name]
        figures, texts = split_summary(without_funnel(event.summary))
        self._store.log_metrics(run_id, {"seconds": event.seconds, **figures}, at_ms)
        self._store.set_tags(run_id, {**texts, DIGEST_TAG: event.digest})
        log_funnel(self._store, run_id, f"{event.stage} {event.role}".strip(), event.summary)
        if event.stage == "train_tokenizer" and event.digest:
            folder = Store(self._artifacts_dir).folder(event.stage, event.digest)
            log_tokenizer_report(self._store, run_id, folder)
        self._book.end(name, event.status, at_ms)

    def note_cached(self, event: StageCached) -> None:
        """Tag the pipeline's run with the run that made a cached stage; there is no empty child."""
        made_in = event.run_id
        if not made_in:
            tags = {STAGE_TAG: event.stage, DIGEST_TAG: event.digest}
            found = self._store.find_run("pipelines", tags)
            made_in = found.info.run_id if found else "unknown"
        name = f"{event.stage} {event.role}".strip()
        told = {f"cached/{name}": f"{event.digest} made in run {made_in}"}
        self._store.set_tags(self._book.run_ids["pipeline"], told)


class MlflowRuns:
    """Tells MLflow the events of one journal."""

    def __init__(self, store: MlflowStore, journal_name: str, artifacts_dir: Path) -> None:
        """Prepare to tell; nothing is asked of MLflow yet."""
        self._book = RunBook(store, journal_name)
        self._pipeline = PipelineRuns(self._book, artifacts_dir)
        self._models = ModelRuns(self._book)

    @property
    def run_ids(self) -> Mapping[str, str]:
        """MLflow run by its name: `pipeline`, `stage/pack chats`, `model/pretrain`."""
        return self._book.run_ids

    def apply(self, entry: Entry) -> None:
        """Tell MLflow one event."""
        match entry.event:
            case PipelineStarted() as event:
                self._pipeline.start(event, entry.at_ms)
            case StageStarted() as event:
                self._pipeline.start_stage(event, entry.at_ms)
            case StageFinished() as event:
                self._pipeline.finish_stage(event, entry.at_ms)
            case StageCached() as event:
                self._pipeline.note_cached(event)
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
        """Send the points that trainings wrote since the last call."""
        self._models.follow()

    def end_open_runs(self, status: Status, at_ms: int) -> None:
        """Give every run that has none its end state, the pipeline's last. One that someone deleted
        keeps no other from its own.
        """
        self._models.stop_following()
        for name in sorted(self._book.open, key=lambda name: name == "pipeline"):
            try:
                self._book.end(name, status, at_ms)
            except Exception as error:
                if not is_refusal(error):
                    raise
                log.warning("MLflow refuses the end of %s: %s", name, one_line(error))
                self._book.open.discard(name)

    def release(self) -> None:
        """Leave the trainings to whoever follows them next."""
        self._models.release()
