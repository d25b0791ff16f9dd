"""MLflow for a run: it says what happens, and one background thread tells MLflow, in order.

Neither start-up nor training ever waits for MLflow: a call here writes one line to a journal. When
MLflow is down, slow or locked, the thread tries again with growing pauses; what is left at the end
stays in the journal and is told by the next run. A run that was killed is told to its end so too.
"""

import contextlib
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from llm.artifact import Json
from llm.config import RunConfig
from tasks.tracking.client import (
    MlflowStore,
    is_refusal,
    known_as,
    one_line,
    tracking_uri,
    without_password,
)
from tasks.tracking.journal import (
    Dataset,
    Event,
    Journal,
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
from tasks.tracking.runs import MlflowRuns

SECONDS_BETWEEN_LOOKS = 2.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 30.0
SECONDS_FOR_OUTAGE = 5.0  # at the end of a run, when MLflow was not answering before either
log = logging.getLogger("fromscratch")


class Tracker:
    """Tells MLflow what a run does. Every method returns at once, except `close`."""

    def __init__(self, config: RunConfig, artifacts_dir: Path) -> None:
        """Prepare; nothing is written or started before the first event."""
        self._artifacts_dir = artifacts_dir.absolute()
        self._project = config.runtime.project
        self._uri = tracking_uri(config.runtime.tracking_uri, self._artifacts_dir)
        self._delivery: Delivery | None = None
        self._lock = threading.Lock()

    def start_pipeline(
        self, name: str, settings: Mapping[str, object], links: Mapping[str, str] | None = None
    ) -> None:
        """Begin the run `name` with every setting by dotted key and links to its other pages."""
        self._tell(
            PipelineStarted(
                tracking_uri=known_as(self._uri, self._artifacts_dir),
                project=self._project,
                name=name,
                settings=_shown(settings),
                links=links or {},
            )
        )

    def stage_started(
        self, stage: str, role: str, key: str, tags: Mapping[str, str] | None = None
    ) -> None:
        """A stage is being built."""
        self._tell(StageStarted(stage=stage, role=role, key=key, tags=tags or {}))

    def stage_finished(
        self,
        stage: str,
        role: str,
        digest: str,
        seconds: float,
        summary: Mapping[str, Json],
        status: Status = "FINISHED",
    ) -> None:
        """A stage is built, or, with another status, will not be."""
        self._tell(
            StageFinished(
                stage=stage,
                role=role,
                digest=digest,
                seconds=seconds,
                summary=summary,
                status=status,
            )
        )

    def stage_cached(self, stage: str, role: str, digest: str, run_id: str = "") -> None:
        """A stage was there already, made in the MLflow run `run_id`, if that is known."""
        self._tell(StageCached(stage=stage, role=role, digest=digest, run_id=run_id))

    def model_started(
        self,
        stage: str,
        key: str,
        settings: Mapping[str, object],
        datasets: Sequence[Dataset],
        work_folder: Path,
        links: Mapping[str, str] | None = None,
    ) -> None:
        """A model is being trained, or trained on; follow `work_folder/metrics.jsonl` from here."""
        with contextlib.suppress(OSError):  # then the training itself will say why
            work_folder.mkdir(parents=True, exist_ok=True)
        self._tell(
            ModelStarted(
                stage=stage,
                key=key,
                settings=_shown(settings),
                datasets=[
                    dataclasses.replace(dataset, path=self._relative(Path(dataset.path)))
                    for dataset in datasets
                ],
                work_folder=self._relative(work_folder),
                links=links or {},
            )
        )

    def model_finished(
        self,
        stage: str,
        digest: str,
        folder: Path,
        summary: Mapping[str, Json],
        status: Status = "FINISHED",
    ) -> None:
        """A model lies in `folder`."""
        self._tell(
            ModelFinished(
                stage=stage,
                digest=digest,
                folder=self._relative(folder),
                summary=summary,
                status=status,
            )
        )

    def model_interrupted(self, stage: str, status: Status) -> None:
        """A training ended early. Its run goes on when the training does."""
        self._tell(ModelFinished(stage=stage, digest="", folder="", summary={}, status=status))

    def report_finished(self, folder: Path, metrics: Mapping[str, Json]) -> None:
        """The report lies in `folder`; a model's metrics begin with its name."""
        self._tell(ReportFinished(folder=self._relative(folder), metrics=metrics))

    def close(self, status: Status = "FINISHED", timeout_seconds: float = 60.0) -> None:
        """End the run and wait until MLflow knows all of it, but not for an MLflow that is away."""
        if self._delivery is None:
            return
        self._tell(PipelineFinished(status=status))
        self._delivery.finish(timeout_seconds)

    @property
    def pipeline_run_id(self) -> str:
        """The MLflow run of the pipeline; empty as long as MLflow does not know it."""
        return self._delivery.run_ids.get("pipeline", "") if self._delivery else ""

    def model_run_id(self, stage: str) -> str:
        """Return the MLflow run of the model that `stage` makes, also when it was cached."""
        return self._delivery.run_ids.get(f"model/{stage}", "") if self._delivery else ""

    def _relative(self, path: Path) -> str:
        """Return a path for an event, which may be told after the artifacts folder was moved."""
        path = path.absolute()
        if path.is_relative_to(self._artifacts_dir):
            return str(path.relative_to(self._artifacts_dir))
        return str(path)

    def _tell(self, event: Event) -> None:
        try:
            with self._lock:
                if self._delivery is None:
                    journal = Journal.create(self._artifacts_dir / "tracking")
                    self._delivery = Delivery(journal, self._uri, self._artifacts_dir)
            self._delivery.tell(event)
        except (OSError, TypeError, ValueError) as error:  # tracking must never end a run
            log.warning("MLflow will not know of %s: %s", type(event).__name__, error)


class Delivery:
    """The background thread that tells MLflow what journals hold, oldest first."""

    def __init__(self, journal: Journal, uri: str, artifacts_dir: Path) -> None:
        """Start to tell what earlier runs left, and then what `journal` will hold."""
        self.run_ids: Mapping[str, str] = {}
        self._journal = journal
        self._uri = uri
        self._artifacts_dir = artifacts_dir
        self._has_news = threading.Event()
        self._is_closing = threading.Event()
        self._gives_up = threading.Event()
        self._is_away = False
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self._thread.start()

    def tell(self, event: Event) -> None:
        """Have `event` told."""
        self._journal.append(event)
        self._has_news.set()

    def finish(self, timeout_seconds: float) -> None:
        """Wait until all is told, at most so long, and shorter when MLflow is away."""
        started_at = time.monotonic()
        self._is_closing.set()
        self._has_news.set()
        while self._thread.is_alive():
            self._thread.join(0.05)
            waited_seconds = time.monotonic() - started_at
            if waited_seconds > (SECONDS_FOR_OUTAGE if self._is_away else timeout_seconds):
                log.warning("MLflow does not know all of this run yet; the next run tells the rest")
                self._gives_up.set()
                return

    def _run(self) -> None:
        try:
            for journal in Journal.abandoned(self._journal.path.parent):
                self._deliver(journal, is_own=False)
            self._deliver(self._journal, is_own=True)
        except Exception as error:
            log.warning("MLflow is told no more: %s: %s", type(error).__name__, error)
            self._journal.close()

    def _deliver(self, journal: Journal, *, is_own: bool) -> None:
        """Tell a journal from its beginning; remove it at its end, or leave it when giving up."""
        first = journal.next_entry()
        while first is None and is_own and not self._is_closing.is_set():
            self._has_news.wait()
            self._has_news.clear()
            first = journal.next_entry()
        if first is None or not isinstance(first.event, PipelineStarted):
            journal.remove()  # it was killed before its first word was whole
            return
        if first.event.tracking_uri != known_as(self._uri, self._artifacts_dir):
            journal.close()  # of a run with another MLflow, told when that is in use again
            return
        store = MlflowStore(self._uri, self._artifacts_dir, first.event.project)
        runs = MlflowRuns(store, journal.name, self._artifacts_dir)
        if is_own:
            self.run_ids = runs.run_ids
        if self._tell_all(journal, runs, store, is_own=is_own):
            journal.remove()
        else:
            runs.release()
            journal.close()

    def _tell_all(
        self, journal: Journal, runs: MlflowRuns, store: MlflowStore, *, is_own: bool
    ) -> bool:
        """Tell every event; of an own journal also those to come. False when giving up."""
        while True:
            entry = journal.next_entry()
            if entry is not None:
                kind = type(entry.event).__name__
                if not self._insist(store, functools.partial(runs.apply, entry), kind):
                    return False
                journal.acknowledge()
                if isinstance(entry.event, PipelineFinished):
                    return True
            elif not is_own:
                end = functools.partial(runs.end_open_runs, "KILLED", journal.last_change_ms)
                return self._insist(store, end, "end")
            elif self._is_closing.is_set():
                return False  # the disk was too full for the last word
            else:
                self._has_news.wait(SECONDS_BETWEEN_LOOKS)
                self._has_news.clear()
                if not self._insist(store, runs.follow, "points", on_refusal=runs.release):
                    return False

    def _insist(
        self,
        store: MlflowStore,
        action: Callable[[], None],
        what: str,
        on_refusal: Callable[[], None] = lambda: None,
    ) -> bool:
        """Do `action`, again and again as long as MLflow is away. False when giving up."""
        pause_seconds = FIRST_PAUSE_SECONDS
        while not self._gives_up.is_set():
            is_connected = False
            try:
                store.connect()
                is_connected = True
                action()
            except Exception as error:
                if is_connected and is_refusal(error):
                    log.warning("MLflow refuses %s: %s", what, one_line(error))
                    on_refusal()
                    return True
                self._say_away(error)
                if self._is_closing.is_set():
                    self._gives_up.wait(FIRST_PAUSE_SECONDS)
                else:
                    self._is_closing.wait(pause_seconds)
                    pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)
            else:
                if self._is_away:
                    log.info("MLflow answers again; what it missed is told")
                self._is_away = False
                return True
        return False

    def _say_away(self, error: Exception) -> None:
        if not self._is_away:
            log.warning(
                "MLflow at %s does not answer (%s); the run goes on and it is told later",
                without_password(self._uri),
                one_line(error),
            )
        self._is_away = True


def _shown(settings: Mapping[str, object]) -> dict[str, object]:
    """Return settings without the passwords that addresses among them may hold."""
    return {
        key: without_password(value) if isinstance(value, str) else value
        for key, value in settings.items()
    }
