"""Fixtures for tests with MLflow: an empty database, short waits."""

from pathlib import Path

import pytest

from tasks.tracking import tracker as tracking
from tests.tasks.tracked_folder import TrackedFolder


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A database with MLflow's tables, which take a second to make."""
    tracked = TrackedFolder(tmp_path_factory.mktemp("database"))
    tracked.client.search_experiments()
    return (tracked.path / "mlflow.db").read_bytes()


@pytest.fixture
def tracked(
    tmp_path: Path, empty_database: bytes, short_waits: None, monkeypatch: pytest.MonkeyPatch
) -> TrackedFolder:
    """An artifacts folder with an empty database, without the user's settings."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlflow.db").write_bytes(empty_database)
    return TrackedFolder(tmp_path)


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poll and retry more often than in production."""
    monkeypatch.setattr(tracking, "METRICS_POLL_SECONDS", 0.1)
    monkeypatch.setattr(tracking, "FIRST_PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(tracking, "SECONDS_FOR_OUTAGE", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
