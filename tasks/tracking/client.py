"""Client for MLflow: its address, the two experiments, and which errors are worth a retry.

mlflow is imported at first use, because that takes two seconds.
"""

import json
import logging
import os
import re
import sqlite3
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from llm.artifact import Json
from llm.config import flatten
from tasks.tracking.files import (
    DATABASE,
    FOLDER,
    ROOT,
    SCHEME,
    correct_locations,
    database_uri,
    local_files,
)
from tasks.tracking.journal import Status
from tasks.tracking.view import VIEW_TAG, curves_first

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Experiment = Literal["pipelines", "models"]

MAX_PARAMETER_CHARACTERS = 6000  # MLflow truncates longer ones silently
MAX_TAG_CHARACTERS = 8000
PARAMETERS_PER_BATCH = 100
NOTE, TABLES_TAG = "mlflow.note.content", "mlflow.loggedArtifacts"
UID_TAG = "fromscratch.uid"
STAGE_TAG, DIGEST_TAG, KEY_TAG = "fromscratch.stage", "fromscratch.digest", "fromscratch.key"
SWEEP_TAG = "fromscratch.sweep"  # the runs of one sweep are grouped by it
# Defaults for what the user has not set: an outage is noticed in seconds instead of minutes, and
# MLflow prints and reports nothing by itself.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
}
DESCRIPTIONS: Mapping[Experiment, str] = {
    "pipelines": "One run per pipeline run, with a child run per built stage. A cached stage is a"
    " tag that names the run which built it.",
    "models": "One run per trained model. The chart view overlays their curves, the table view"
    " shows their samples side by side; select some and press Compare to see how settings differ.",
}
# Errors that a retry cannot cure; every other error may be an outage.
REFUSALS = frozenset(
    {
        "BAD_REQUEST",
        "INVALID_PARAMETER_VALUE",
        "INVALID_STATE",
        "RESOURCE_ALREADY_EXISTS",
        "RESOURCE_DOES_NOT_EXIST",
    }
)


class MlflowConnection:
    """An MLflow server or database with the two experiments of a project; sets no global state."""

    def __init__(self, uri: str, artifacts_dir: Path, project: str) -> None:
        """Keep the address; nothing is imported or opened yet."""
        self.uri = uri
        self.known_as = known_as(uri, artifacts_dir)
        self._artifacts_dir = artifacts_dir
        self._project = project
        self._is_connected = False
        self._experiment_ids: dict[Experiment, str] = {}

    @cached_property
    def client(self) -> "MlflowClient":
        """The client, created at first use."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # deprecations between mlflow and the libraries it uses
        warnings.filterwarnings("ignore", module=r"mlflow\b")
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic", "sqlalchemy.engine", "urllib3", "matplotlib"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        if self.uri.startswith("sqlite:"):
            self._artifacts_dir.mkdir(parents=True, exist_ok=True)
        if self._is_own:
            from mlflow.store.artifact import artifact_repository_registry as registry

            known = registry.get_registered_artifact_repositories()
            cast(dict[str, object], known)[SCHEME] = local_files
        return MlflowClient(tracking_uri=self.uri)

    def path(self, text: str) -> Path:
        """Return the absolute path of an event's path, which may be relative to artifacts_dir."""
        return self._artifacts_dir / text

    def scratch_folder(self) -> Path:
        """Return a folder for temporary files, on the artifacts' disk because /tmp may be small."""
        folder = self._artifacts_dir / "tracking"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def connect(self) -> None:
        """Open both experiments. Any exception counts as an outage."""
        if self._is_connected:
            return
        for experiment in DESCRIPTIONS:
            self.experiment_id(experiment)
        if self._is_own:
            correct_locations(self._artifacts_dir)
        self._is_connected = True

    def experiment_id(self, experiment: Experiment) -> str:
        """Return the id of `<project>/pipelines` or `<project>/models`, created if missing."""
        if experiment not in self._experiment_ids:
            self._experiment_ids[experiment] = self._find_or_create(experiment)
        return self._experiment_ids[experiment]

    def create_run(
        self,
        experiment: Experiment,
        uid: str,
        name: str,
        tags: Mapping[str, str],
        started_at_ms: int,
    ) -> str:
        """Return the run with the tag `uid`, created if there is none: an earlier call that timed
        out may have succeeded.
        """
        found = self.find_run(experiment, {UID_TAG: uid})
        if found is not None:
            return found.info.run_id
        run = self.client.create_run(
            self.experiment_id(experiment),
            start_time=started_at_ms,
            tags={UID_TAG: uid, **_cut(tags)},
            run_name=name,
        )
        return run.info.run_id

    def find_run(self, experiment: Experiment, tags: Mapping[str, str]) -> "Run | None":
        """Return the newest run with these tags."""
        terms = [f"tags.`{key}` = '{value}'" for key, value in tags.items()]
        runs = self.client.search_runs(
            [self.experiment_id(experiment)],
            filter_string=" and ".join(terms),
            max_results=1,
            order_by=["attributes.start_time DESC"],
        )
        return runs[0] if runs else None

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags; those too long for MLflow are truncated visibly."""
        from mlflow.entities import RunTag

        entities = [RunTag(key, value) for key, value in _cut(tags).items()]
        if entities:
            self.client.log_batch(run_id, tags=entities)

    def log_parameters(self, run_id: str, parameters: Mapping[str, object]) -> None:
        """Log new parameters (logged ones can never change), and all of them, not truncated, as
        `settings.json`.
        """
        from mlflow.entities import Param

        known = self.client.get_run(run_id).data.params
        texts = {
            key: _shortened(str(value), MAX_PARAMETER_CHARACTERS)
            for key, value in parameters.items()
            if key not in known
        }
        entities = [Param(key, text) for key, text in texts.items()]
        for begin in range(0, len(entities), PARAMETERS_PER_BATCH):
            self.client.log_batch(run_id, params=entities[begin : begin + PARAMETERS_PER_BATCH])
        self.client.log_dict(run_id, dict(parameters), "settings.json")

    def log_metrics(
        self,
        run_id: str,
        metrics: Mapping[str, float],
        at_ms: int,
        *,
        model_id: str = "",
    ) -> None:
        """Log metrics without a step, which MLflow draws as bars, to the run and the logged model.
        MLflow drops a point with the same key, step, time and value, so repeating adds nothing.
        """
        from mlflow.entities import Metric

        entities = [
            Metric(key, value, at_ms, 0, model_id=model_id or None)
            for key, value in metrics.items()
        ]
        self.client.log_batch(run_id, metrics=entities)

    def log_table(self, run_id: str, file: str, rows: Sequence[Mapping[str, object]]) -> None:
        """Log `rows` as a table that MLflow shows and compares; replaces an earlier one.

        MLflow's own `log_table` appends, so a retry would duplicate the rows.
        """
        columns = list(rows[0]) if rows else []
        table = {"columns": columns, "data": [[row[name] for name in columns] for row in rows]}
        self.client.log_text(run_id, json.dumps(table), file)
        tables = json.loads(self.client.get_run(run_id).data.tags.get(TABLES_TAG, "[]"))
        entry = {"path": file, "type": "table"}
        tables = [*(known for known in tables if known != entry), entry]
        self.client.set_tag(run_id, TABLES_TAG, json.dumps(tables))

    def _find_or_create(self, experiment: Experiment) -> str:
        from mlflow.exceptions import MlflowException

        name = f"{self._project}/{experiment}"
        found = self.client.get_experiment_by_name(name)
        views = {VIEW_TAG: curves_first()} if experiment == "models" else {}
        if found is None:
            tags = {
                NOTE: DESCRIPTIONS[experiment],
                "mlflow.experimentKind": "custom_model_development",
                **views,
            }
            try:
                return self.client.create_experiment(name, self._artifact_location(), tags)
            except MlflowException:
                found = self.client.get_experiment_by_name(name)  # another process created it first
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        for key, view in views.items():
            if found.tags.get(key) != view:  # written by an earlier version of this project
                self.client.set_experiment_tag(found.experiment_id, key, view)
        return found.experiment_id

    @property
    def _is_own(self) -> bool:
        """Whether this is the database in the artifacts folder."""
        return self.uri == database_uri(self._artifacts_dir)

    def _artifact_location(self) -> str | None:
        """Return where artifact files go: into artifacts_dir for any database; None lets a server
        decide.
        """
        if re.match(r"https?:|databricks", self.uri):
            return None
        return ROOT if self._is_own else (self._artifacts_dir / FOLDER).as_uri()


class RunBook:
    """The runs of one journal by name: `pipeline`, `stage/pack chats`, `model/pretrain`."""

    def __init__(self, mlflow: MlflowConnection, journal_name: str) -> None:
        """Start with no runs."""
        self.mlflow = mlflow
        self.run_ids: dict[str, str] = {}
        self.open: set[str] = set()
        """Names of runs that have not ended."""
        self._journal_name = journal_name

    def begin(
        self, name: str, experiment: Experiment, title: str, tags: Mapping[str, str], at_ms: int
    ) -> str:
        """Create the run, or find the one that an earlier delivery of the event created."""
        run_id = self.mlflow.create_run(experiment, self.uid(name), title, tags, at_ms)
        self.reopen(name, run_id)
        return run_id

    def reopen(self, name: str, run_id: str) -> None:
        """Continue a run that exists."""
        self.run_ids[name] = run_id
        self.open.add(name)

    def end(self, name: str, status: Status, at_ms: int) -> None:
        """End a run."""
        self.mlflow.client.set_terminated(self.run_ids[name], status, at_ms)
        self.open.discard(name)

    def uid(self, name: str) -> str:
        """Return the unique id of a run, the same at every delivery."""
        return f"{self._journal_name}/{name}"


def tracking_uri(setting: str, artifacts_dir: Path) -> str:
    """Return MLflow's address: the setting, MLFLOW_TRACKING_URI, or a database in artifacts_dir."""
    return setting or os.environ.get("MLFLOW_TRACKING_URI", "") or database_uri(artifacts_dir)


def known_as(uri: str, artifacts_dir: Path) -> str:
    """Return the name of a tracking URI in files: independent of where artifacts_dir is."""
    return DATABASE if uri == database_uri(artifacts_dir) else without_password(uri)


def without_password(uri: str) -> str:
    """Return `uri` without user and password."""
    return re.sub(r"//[^/@]*@", "//", uri)


def described(links: Mapping[str, str], *lines: str) -> dict[str, str]:
    """Return links as tags, and a description that shows them."""
    shown = [
        f"[{name.removesuffix('_url').capitalize()}]({link})"
        for name, link in links.items()
        if link.startswith("http")
    ]
    tags = {f"fromscratch.{name}": link for name, link in links.items()}
    return {**tags, NOTE: "\n\n".join([*shown, *lines])}


def split_summary(summary: Mapping[str, Json]) -> tuple[dict[str, float], dict[str, str]]:
    """Split a stage's summary into metrics and, for everything else, tags."""
    metrics: dict[str, float] = {}
    texts: dict[str, str] = {}
    for key, value in flatten(summary).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            metrics[_allowed(key)] = float(value)
        else:
            texts[f"summary.{_allowed(key)}"] = str(value)
    return metrics, texts


def is_refusal(error: Exception) -> bool:
    """Tell a permanent error from an outage, which delivery waits out."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code in REFUSALS and not _is_locked(error)
    return isinstance(error, ValueError | TypeError | KeyError | FileNotFoundError)


def one_line(error: Exception) -> str:
    """Return an error as one line without passwords."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {without_password(lines[0])[:200]}"


def _is_locked(error: BaseException) -> bool:
    """Tell whether SQLite was locked or out of space, which MLflow reports as a bad request."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(getattr(cause, "orig", cause), sqlite3.OperationalError):
            return True
        cause = cause.__cause__
    return False


def _cut(tags: Mapping[str, str]) -> dict[str, str]:
    return {key: _shortened(value, MAX_TAG_CHARACTERS) for key, value in tags.items() if value}


def _allowed(key: str) -> str:
    """Return `key` with the characters MLflow allows; drop reasons may hold any text."""
    return re.sub(r"[^\w\-. /]", "_", key, flags=re.ASCII)


def _shortened(text: str, max_characters: int) -> str:
    if len(text) <= max_characters:
        return text
    end = f"... ({len(text):,} characters, whole in the artifacts)"
    return text[: max_characters - len(end)] + end
