"""MLflow down, silent or locked: the run continues, and every point arrives once."""

import contextlib
import logging
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tasks.tracked_folder import (
    TrackedFolder,
    finish_model,
    start_model,
    wait_for,
    wait_for_the_thread,
    write_points,
)

pytestmark = [
    pytest.mark.flaky(reason="real servers that stop answering, on a machine that may be busy"),
    pytest.mark.slow,
]


class Line:
    """A wire to a server that can be cut, and left silent: connected, but nothing passes."""

    def __init__(self, server: tuple[str, int]) -> None:
        self._server = server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self._connections: list[socket.socket] = []
        threading.Thread(target=self._serve, args=[self._listener], daemon=True).start()

    def cut(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self._connections.clear()

    def mend(self) -> None:
        self._listener = socket.create_server(self.address)
        threading.Thread(target=self._serve, args=[self._listener], daemon=True).start()

    def _serve(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(self._server)
                self._connections += [near, far]
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=ends, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, empty_database: bytes
) -> Iterator[tuple[str, int]]:
    """A real MLflow server."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "mlflow.db").write_bytes(empty_database)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        variables = {
            "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{folder / 'mlflow.db'}",
            "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(folder / "files"),
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        app = ["-m", "uvicorn", "mlflow.server.fastapi_app:app", "--log-level", "error"]
        process = subprocess.Popen(
            [sys.executable, *app, "--fd", str(listener.fileno())],
            env={**os.environ, **variables},
            pass_fds=[listener.fileno()],
            stderr=subprocess.DEVNULL,
        )
        try:
            yield address  # what connects now waits until it serves
        finally:
            process.kill()
            process.wait()


@pytest.fixture
def line(server: tuple[str, int]) -> Iterator[Line]:
    line = Line(server)
    yield line
    line.cut()


@pytest.fixture
def remote(
    line: Line, tmp_path: Path, short_waits: None, request: pytest.FixtureRequest
) -> TrackedFolder:
    """An artifacts folder whose runs are logged to the server, over a line that can be cut."""
    uri = f"http://127.0.0.1:{line.address[1]}"
    return TrackedFolder(tmp_path, uri, project=request.node.name)


def test_a_silent_mlflow_delays_nothing_and_is_one_warning(
    tmp_path: Path,
    short_waits: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent, caplog.at_level(logging.INFO):
        tracked = TrackedFolder(tmp_path, f"http://user:secret@127.0.0.1:{silent.getsockname()[1]}")
        tracker = tracked.start()
        start_model(tracker, tracked.work)
        write_points(tracked.work, range(5))
        wait_for(lambda: "is unreachable" in caplog.text)
        tracker.close()
        wait_for_the_thread()
    assert tracker.pipeline_run_id == ""
    said = [record.message for record in caplog.records if record.name == "fromscratch"]
    assert len(said) == 2
    assert "the next run sends the rest" in said[1]
    assert "secret" not in "".join(said)
    (journal,) = (tracked.path / "tracking").glob("*.journal")
    assert "secret" not in journal.read_text()
    assert len(journal.read_text().splitlines()) == 4


def test_a_locked_database_is_waited_for(tracked: TrackedFolder) -> None:
    with contextlib.closing(sqlite3.connect(tracked.path / "mlflow.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        tracker = tracked.start()
        start_model(tracker, tracked.work)
        write_points(tracked.work, range(5))
        time.sleep(1)
        assert tracker.pipeline_run_id == ""
    tracker.close()
    assert tracked.steps(tracker.model_run_id("pretrain")) == list(range(5))


def test_events_held_back_by_an_outage_come_with_the_next_run(
    remote: TrackedFolder, line: Line, caplog: pytest.LogCaptureFixture
) -> None:
    line.cut()
    first = remote.start("first")
    start_model(first, remote.work)
    write_points(remote.work, range(100))
    finish_model(first, remote.work, remote.path / "base")
    wait_for(lambda: "is unreachable" in caplog.text)
    first.close()
    wait_for_the_thread()
    shutil.rmtree(remote.work)  # as is done when a run ends
    line.mend()
    remote.start("second").close()
    (run,) = remote.runs("models").values()
    assert remote.steps(run.info.run_id) == list(range(100))
    assert run.info.status == "FINISHED"
    assert run.data.metrics["final/val_loss"] == 1.5
    assert sorted(remote.runs("pipelines")) == ["first", "pretrain", "second"]


def test_outages_in_the_middle_lose_and_double_nothing(remote: TrackedFolder, line: Line) -> None:
    tracker = remote.start()
    start_model(tracker, remote.work)
    for begin in range(0, 400, 100):
        for step in range(begin, begin + 100):
            write_points(remote.work, range(step, step + 1))
            time.sleep(0.005)
            if step % 100 == 20:
                line.cut()
            if step % 100 == 60:
                line.mend()
    finish_model(tracker, remote.work, remote.path / "base")
    tracker.close()
    (run,) = remote.runs("models").values()
    assert remote.steps(run.info.run_id) == list(range(400))
    assert run.info.status == "FINISHED"
    assert sorted(remote.runs("pipelines")) == ["lr=1 tiny", "pretrain"]
