"""A flow run's background connection to Prefect: cancellation, progress, and server restarts.

No stage waits for Prefect. One thread polls whether the run was canceled, sends the progress of the
stages, and restarts a server that has died.
"""

import logging
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.live_runs import close_dead_runs
from flows.services.processes import ServiceError
from flows.services.temporary_server import TemporaryPrefectServer, replace_server
from tasks.launch import Progress
from tasks.prefect_api import PrefectApi

PREFECT_POLL_SECONDS = 2.0
log = logging.getLogger("fromscratch")


@dataclass(kw_only=True, slots=True)
class _ProgressArtifact:
    """The Prefect artifact that shows a stage's progress."""

    name: str
    task_run_id: str
    progress: Progress
    sent: Progress | None = field(default=None)
    id: str = ""


class PrefectLink:
    """The connection, open inside a `with` block."""

    def __init__(self, api_url: str, flow_run_id: str, artifacts_dir: Path | None) -> None:
        """Prepare. `artifacts_dir` holds the server's data; None for a server of the user's own,
        which is never restarted.
        """
        self._api = PrefectApi(api_url)
        self._flow_run_id = flow_run_id
        self._artifacts_dir = artifacts_dir
        self._stop = threading.Event()
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self._artifacts: dict[str, _ProgressArtifact] = {}
        self._is_lost = False
        self._thread = threading.Thread(target=self._run, name="prefect-link", daemon=True)

    def __enter__(self) -> "PrefectLink":
        """Start polling."""
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Send the last progress and end the thread."""
        self._is_over.set()
        self._thread.join()

    def stop(self) -> None:
        """Ask every stage to save and stop."""
        self._stop.set()

    def is_stopping(self) -> bool:
        """Tell whether the run was canceled or `stop` was called."""
        return self._stop.is_set()

    def progressed(self, name: str, task_run_id: str, progress: Progress) -> None:
        """Update the progress of the stage `name`."""
        if progress.total:
            with self._lock:
                new = _ProgressArtifact(name=name, task_run_id=task_run_id, progress=progress)
                self._artifacts.setdefault(name, new).progress = progress

    def finished(self, name: str) -> None:
        """Set the stage `name` to 100 %, since its last update may be older than its end."""
        with self._lock:
            if artifact := self._artifacts.get(name):
                total = artifact.progress.total
                artifact.progress = Progress(done=total, total=total, unit=artifact.progress.unit)

    def _run(self) -> None:
        self._try(self._close_dead_runs)
        while not self._is_over.wait(PREFECT_POLL_SECONDS):
            self._try(self._poll)
            self._try(self._send_progress)
        self._try(self._poll)  # restarts a dead server for Prefect's client to send the final state
        self._try(self._send_progress)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except ConnectionRefusedError:
            self._restart_server()
        except OSError:
            pass  # the server is busy; the next poll comes soon

    def _poll(self) -> None:
        if self._api.is_canceled(self._flow_run_id):
            self._stop.set()

    def _close_dead_runs(self) -> None:
        if self._artifacts_dir is not None:
            close_dead_runs(self._artifacts_dir, self._api)

    def _restart_server(self) -> None:
        if self._artifacts_dir is None or self._is_lost:
            return
        log.warning("the Prefect server has died; the run continues and restarts it")
        try:
            server = replace_server(self._artifacts_dir, self._api.url)
        except (ServiceError, OSError) as error:
            self._is_lost = True
            log.warning("Prefect will not record how this run ends: %s", error)
        else:
            _servers.append(server)

    def _send_progress(self) -> None:
        with self._lock:
            changed = [each for each in self._artifacts.values() if each.progress != each.sent]
        for artifact in changed:
            progress = artifact.progress
            text = f"{artifact.name}: {progress.done:,} of {progress.total:,} {progress.unit}"
            content = {"data": 100 * progress.done / progress.total, "description": text}
            if not artifact.id:
                artifact.id = self._find_or_create(artifact, content)
            self._api.patch(f"artifacts/{artifact.id}", content)
            artifact.sent = progress

    def _find_or_create(self, artifact: _ProgressArtifact, content: dict[str, Any]) -> str:
        """Return the id of a stage's artifact, which a rerun of the same flow run already has."""
        key = re.sub(r"[^a-z0-9-]", "-", f"progress-{artifact.name}")
        wanted = {"key": {"any_": [key]}, "flow_run_id": {"any_": [self._flow_run_id]}}
        if found := self._api.post("artifacts/filter", {"artifacts": wanted}):
            return found[0]["id"]
        runs = {"flow_run_id": self._flow_run_id, "task_run_id": artifact.task_run_id}
        body = {"key": key, "type": "progress", **content, **runs}
        return self._api.post("artifacts/", body)["id"]


_servers: list[TemporaryPrefectServer | None] = []  # keeps them running until the process ends
