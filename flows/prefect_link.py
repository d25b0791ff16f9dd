"""What a run tells Prefect and hears from it while its stages work: one thread, one look at a time.

No stage waits for Prefect. The thread sees that someone cancelled the run, sends how far the stages
are, and brings the server back when it is gone: a run outlives the server it was started with.
"""

import logging
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from flows.prefect_api import PrefectApi, state_type
from flows.running import close_dead_runs
from flows.services.processes import ServiceError
from flows.services.temporary_server import TemporaryPrefectServer, bring_back
from tasks.launch import Progress

SECONDS_BETWEEN_LOOKS = 2.0
log = logging.getLogger("fromscratch")


@dataclass(kw_only=True, slots=True)
class _Shown:
    """A stage's progress as Prefect shows it: an artifact, and what it has to say."""

    name: str
    task_run_id: str
    progress: Progress
    sent: Progress | None = field(default=None)
    id: str = ""


class PrefectLink:
    """A flow run's link to Prefect, open in a `with`."""

    def __init__(self, api_url: str, flow_run_id: str, artifacts_dir: Path | None) -> None:
        """Prepare. `artifacts_dir` is the folder that holds the server's data, None where the
        server is the user's own, which is not ours to bring back.
        """
        self._api = PrefectApi(api_url)
        self._flow_run_id = flow_run_id
        self._artifacts_dir = artifacts_dir
        self._stop = threading.Event()
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self._shown: dict[str, _Shown] = {}
        self._is_lost = False
        self._thread = threading.Thread(target=self._run, name="prefect-link", daemon=True)

    def __enter__(self) -> "PrefectLink":
        """Begin to look."""
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Send what is left to send."""
        self._is_over.set()
        self._thread.join()

    def stop(self) -> None:
        """Have every stage stop and save."""
        self._stop.set()

    def is_stopping(self) -> bool:
        """Tell whether the run was cancelled, or `stop` was called."""
        return self._stop.is_set()

    def progressed(self, name: str, task_run_id: str, progress: Progress) -> None:
        """Note how far the stage `name` is."""
        if progress.total:
            with self._lock:
                new = _Shown(name=name, task_run_id=task_run_id, progress=progress)
                self._shown.setdefault(name, new).progress = progress

    def finished(self, name: str) -> None:
        """Note that the stage `name` is built: what it said last may be a moment old."""
        with self._lock:
            if shown := self._shown.get(name):
                total = shown.progress.total
                shown.progress = Progress(done=total, total=total, unit=shown.progress.unit)

    def _run(self) -> None:
        self._try(self._close_dead_runs)
        while not self._is_over.wait(SECONDS_BETWEEN_LOOKS):
            self._try(self._look)
            self._try(self._send_progress)
        self._try(self._look)  # Prefect's own client is about to tell how the run ended
        self._try(self._send_progress)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except ConnectionRefusedError:
            self._bring_back()
        except OSError:
            pass  # it is busy; the next look comes soon

    def _look(self) -> None:
        run = self._api.get(f"flow_runs/{self._flow_run_id}")
        if state_type(run) in ("CANCELLING", "CANCELLED"):
            self._stop.set()

    def _close_dead_runs(self) -> None:
        if self._artifacts_dir is not None:
            close_dead_runs(self._artifacts_dir, self._api)

    def _bring_back(self) -> None:
        if self._artifacts_dir is None or self._is_lost:
            return
        log.warning("Prefect's server is gone; the run goes on and starts it again")
        try:
            server = bring_back(self._artifacts_dir, self._api.url)
        except (ServiceError, OSError) as error:
            self._is_lost = True
            log.warning("Prefect will not know how this run ends: %s", error)
        else:
            _servers.append(server)

    def _send_progress(self) -> None:
        with self._lock:
            waiting = [shown for shown in self._shown.values() if shown.progress != shown.sent]
        for shown in waiting:
            progress = shown.progress
            text = f"{shown.name}: {progress.done:,} of {progress.total:,} {progress.unit}"
            content = {"data": 100 * progress.done / progress.total, "description": text}
            if not shown.id:
                shown.id = self._find_or_create(shown, content)
            self._api.patch(f"artifacts/{shown.id}", content)
            shown.sent = progress

    def _find_or_create(self, shown: _Shown, content: dict[str, Any]) -> str:
        """Return the id of the stage's artifact: a run that is run again has it already."""
        key = re.sub(r"[^a-z0-9-]", "-", f"progress-{shown.name}")
        wanted = {"key": {"any_": [key]}, "flow_run_id": {"any_": [self._flow_run_id]}}
        if found := self._api.post("artifacts/filter", {"artifacts": wanted}):
            return found[0]["id"]
        runs = {"flow_run_id": self._flow_run_id, "task_run_id": shown.task_run_id}
        return self._api.post("artifacts/", {"key": key, "type": "progress", **content, **runs})[
            "id"
        ]


_servers: list[TemporaryPrefectServer | None] = []  # they end with the process
