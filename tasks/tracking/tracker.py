"""Log a run to MLflow: events go to a journal, and a background thread sends them in order.

Neither start-up nor training waits for MLflow: `Tracker.log` appends one line to a file. While
MLflow is down, slow or locked, the thread retries with growing pauses. Events left at the end stay
in the journal; the next run sends them, as it does for a run that was killed.
"""

import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from llm.config import RunConfig
from tasks.tracking.client import (
    MlflowConnection,
    is_refusal,
    known_as,
    one_line,
    tracking_uri,
    without_password,
)
from tasks.tracking.journal import (
    Event,
    Journal,
    ModelFinished,
    ModelStarted,
    PipelineFinished,
    PipelineStarted,
    ReportFinished,
    Status,
)
from tasks.tracking.runs import MlflowRuns

METRICS_POLL_SECONDS = 2.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 30.0
SECONDS_FOR_OUTAGE = 5.0  # how long `close` waits when MLflow is already unreachable
logger = logging.getLogger("fromscratch")


class Tracker:
    """Logs the events of a run to MLflow. Every method but `close` returns at once."""

    def __init__(self, config: RunConfig, artifacts_dir: Path) -> None:
        """Prepare; nothing is written or started before the first event."""
        self._artifacts_dir = artifacts_dir.absolute()
        self._uri = tracking_uri(config.runtime.tracking_uri, self._artifacts_dir)
        self._delivery: Delivery | None = None
        self._lock = threading.Lock()

    def log(self, event: Event) -> None:
        """Log one event. A failure is a warning: tracking never ends a run."""
        try:
            with self._lock:
                if self._delivery is None:
                    journal = Journal.create(self._artifacts_dir / "tracking")
                    self._delivery = Delivery(journal, self._uri, self._artifacts_dir)
            self._delivery.append(self._portable(event))
        except (OSError, TypeError, ValueError) as error:
            logger.warning("could not log %s to MLflow: %s", type(event).__name__, error)

    def close(self, status: Status = "FINISHED", timeout_seconds: float = 60.0) -> None:
        """End the run and wait until MLflow has all of it, but only briefly during an outage."""
        if self._delivery is None:
            return
        self.log(PipelineFinished(status=status))
        self._delivery.finish(timeout_seconds)

    @property
    def pipeline_run_id(self) -> str:
        """The MLflow run of the pipeline; empty until MLflow has created it."""
        return self._delivery.run_ids.get("pipeline", "") if self._delivery else ""

    def model_run_id(self, step: str) -> str:
        """Return the MLflow run of the model that a step trains, even if it was cached."""
        return self._delivery.run_ids.get(f"model/{step}", "") if self._delivery else ""

    def _portable(self, event: Event) -> Event:
        """Return `event` without passwords, its paths relative to the artifacts folder: it may be
        sent after the folder was moved.
        """
        match event:
            case PipelineStarted():
                uri = known_as(self._uri, self._artifacts_dir)
                return replace(event, tracking_uri=uri, settings=_without_passwords(event.settings))
            case ModelStarted():
                datasets = [
                    replace(dataset, path=self._relative(dataset.path))
                    for dataset in event.datasets
                ]
                return replace(
                    event,
                    settings=_without_passwords(event.settings),
                    datasets=datasets,
                    work_folder=self._relative(event.work_folder),
                )
            case ModelFinished() | ReportFinished():
                return replace(event, folder=self._relative(event.folder))
            case _:
                return event

    def _relative(self, path: str) -> str:
        absolute = Path(path).absolute()
        if path and absolute.is_relative_to(self._artifacts_dir):
            return str(absolute.relative_to(self._artifacts_dir))
        return path and str(absolute)


class Delivery:
    """The background thread that sends journals to MLflow, oldest first."""

    def __init__(self, journal: Journal, uri: str, artifacts_dir: Path) -> None:
        """Start sending what earlier runs left, then the events of `journal`."""
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

    def append(self, event: Event) -> None:
        """Queue `event`."""
        self._journal.append(event)
        self._has_news.set()

    def finish(self, timeout_seconds: float) -> None:
        """Wait until everything is sent, at most `timeout_seconds`, and less during an outage."""
        started_at = time.monotonic()
        self._is_closing.set()
        self._has_news.set()
        while self._thread.is_alive():
            self._thread.join(0.05)
            waited_seconds = time.monotonic() - started_at
            if waited_seconds > (SECONDS_FOR_OUTAGE if self._is_away else timeout_seconds):
                logger.warning("not all of this run is in MLflow yet; the next run sends the rest")
                self._gives_up.set()
                return

    def _run(self) -> None:
        try:
            for journal in Journal.abandoned(self._journal.path.parent):
                self._deliver(journal, is_own=False)
            self._deliver(self._journal, is_own=True)
        except Exception as error:
            logger.warning("MLflow logging stopped: %s: %s", type(error).__name__, error)
            self._journal.close()

    def _deliver(self, journal: Journal, *, is_own: bool) -> None:
        """Send a journal from the beginning; remove it at its end, or keep it when giving up."""
        first = journal.next_entry()
        while first is None and is_own and not self._is_closing.is_set():
            self._has_news.wait()
            self._has_news.clear()
            first = journal.next_entry()
        if first is None or not isinstance(first.event, PipelineStarted):
            journal.remove()  # its owner was killed before the first event was complete
            return
        if first.event.tracking_uri != known_as(self._uri, self._artifacts_dir):
            journal.close()  # of a run with another MLflow; sent when that one is in use again
            return
        mlflow = MlflowConnection(self._uri, self._artifacts_dir, first.event.project)
        runs = MlflowRuns(mlflow, journal.name, self._artifacts_dir)
        if is_own:
            self.run_ids = runs.run_ids
        if self._send_all(journal, runs, mlflow, is_own=is_own):
            journal.remove()
        else:
            runs.release()
            journal.close()

    def _send_all(
        self, journal: Journal, runs: MlflowRuns, mlflow: MlflowConnection, *, is_own: bool
    ) -> bool:
        """Send every event; of the run's own journal also those to come. False when giving up."""
        while True:
            entry = journal.next_entry()
            if entry is not None:
                kind = type(entry.event).__name__
                if not self._insist(mlflow, functools.partial(runs.apply, entry), kind):
                    return False
                journal.acknowledge()
                if isinstance(entry.event, PipelineFinished):
                    return True
            elif not is_own:
                end = functools.partial(runs.end_open_runs, "KILLED", journal.last_change_ms)
                return self._insist(mlflow, end, "the end of a killed run")
            elif self._is_closing.is_set():
                return False  # the disk was too full for PipelineFinished
            else:
                self._has_news.wait(METRICS_POLL_SECONDS)
                self._has_news.clear()
                if not self._insist(mlflow, runs.follow, "metrics", on_refusal=runs.release):
                    return False

    def _insist(
        self,
        mlflow: MlflowConnection,
        action: Callable[[], None],
        what: str,
        on_refusal: Callable[[], None] = lambda: None,
    ) -> bool:
        """Do `action`, retrying while MLflow is unreachable. False when giving up."""
        pause_seconds = FIRST_PAUSE_SECONDS
        while not self._gives_up.is_set():
            is_connected = False
            try:
                mlflow.connect()
                is_connected = True
                action()
            except Exception as error:
                if is_connected and is_refusal(error):
                    logger.warning("could not log %s to MLflow: %s", what, one_line(error))
                    on_refusal()
                    return True
                self._note_outage(error)
                if self._is_closing.is_set():
                    self._gives_up.wait(FIRST_PAUSE_SECONDS)
                else:
                    self._is_closing.wait(pause_seconds)
                    pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)
            else:
                if self._is_away:
                    logger.info("MLflow is reachable again; backlog sent")
                self._is_away = False
                return True
        return False

    def _note_outage(self, error: Exception) -> None:
        if not self._is_away:
            logger.warning(
                "MLflow at %s is unreachable (%s); the run continues and is logged later",
                without_password(self._uri),
                one_line(error),
            )
        self._is_away = True


def _without_passwords(settings: Mapping[str, object]) -> dict[str, object]:
    return {
        key: without_password(value) if isinstance(value, str) else value
        for key, value in settings.items()
    }
