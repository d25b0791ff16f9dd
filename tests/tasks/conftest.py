"""MLflow for tests: a database that need not be made, and no long waits."""

from pathlib import Path

import pytest

from tasks.tracking import tracker as tracking
from tests.tasks.mlflow_place import Place


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A database with MLflow's tables, which take a second to make."""
    place = Place(tmp_path_factory.mktemp("database"))
    place.client.search_experiments()
    return (place.folder / "mlflow.db").read_bytes()


@pytest.fixture
def place(
    tmp_path: Path, empty_database: bytes, short_waits: None, monkeypatch: pytest.MonkeyPatch
) -> Place:
    """An artifacts folder with an empty database; nothing of the user's settings."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlflow.db").write_bytes(empty_database)
    return Place(tmp_path)


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for points and try again sooner than in life."""
    monkeypatch.setattr(tracking, "SECONDS_BETWEEN_LOOKS", 0.1)
    monkeypatch.setattr(tracking, "FIRST_PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(tracking, "SECONDS_FOR_OUTAGE", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
