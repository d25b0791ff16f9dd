"""MLflow's artifact files: in `mlruns` beside the database, with locations relative to it.

The database says `mlflow-artifacts:/RUN/artifacts`, which a server resolves in its own folder
(`--artifacts-destination`), so that artifacts_dir can be moved and copied. MLflow's Python client
resolves it only through a server; `local_files` is a plugin (registered in pyproject.toml) for a
client without one. Databases with absolute paths, MLflow's default, are corrected when opened.
"""

import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlparse

if TYPE_CHECKING:
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

SCHEME = "mlflow-artifacts"
ROOT = f"{SCHEME}:/"
DATABASE, FOLDER = "mlflow.db", "mlruns"
LOCATION_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Every column of MLflow's database that holds a location of files."""
SECONDS_TO_WAIT_FOR_A_WRITER = 20.0


def database_uri(artifacts_dir: Path) -> str:
    """Return the tracking URI of the database in an artifacts folder."""
    return f"sqlite:///{artifacts_dir / DATABASE}"


def local_files(
    artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None
) -> "ArtifactRepository":
    """Return MLflow's repository for `mlflow-artifacts:/PATH`: `mlruns/PATH` beside an SQLite
    database, or the server that the tracking URI names.
    """
    from mlflow import get_tracking_uri
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
    from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository

    uri = tracking_uri or get_tracking_uri()
    if not uri.startswith("sqlite:///"):
        return MlflowArtifactsRepository(artifact_uri, tracking_uri, registry_uri)
    database = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    path = unquote(urlparse(artifact_uri).path).lstrip("/")
    folder = database.absolute().with_name(FOLDER) / path
    return LocalArtifactRepository(folder.as_uri(), tracking_uri, registry_uri)


def correct_locations(artifacts_dir: Path) -> int:
    """Make absolute locations in the database of an artifacts folder relative; return how many.

    A location is kept if its files exist there and not in this folder.
    """
    database = artifacts_dir / DATABASE
    if not database.is_file():
        return 0
    num_corrected = 0
    timeout = SECONDS_TO_WAIT_FOR_A_WRITER
    with closing(sqlite3.connect(database, timeout=timeout)) as connection, connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        for table, column in LOCATION_COLUMNS:
            if table not in tables:
                continue
            select = f"SELECT rowid, {column} FROM {table} WHERE {column} LIKE '%/{FOLDER}%'"
            for rowid, location in connection.execute(select).fetchall():
                if corrected := _relative(location, artifacts_dir):
                    update = f"UPDATE {table} SET {column} = ? WHERE rowid = ?"
                    connection.execute(update, (corrected, rowid))
                    num_corrected += 1
    return num_corrected


def _relative(location: str, artifacts_dir: Path) -> str:
    """Return an absolute path inside some `mlruns` as a relative location, else an empty string."""
    found = re.fullmatch(rf"(?:file://)?(/.*/{FOLDER})((?:/.*)?)", location)
    if found is None:
        return ""
    old, path = Path(unquote(found[1])), unquote(found[2]).lstrip("/")
    is_here = (artifacts_dir / FOLDER / path).exists()
    return ROOT + found[2].lstrip("/") if is_here or not (old / path).exists() else ""
