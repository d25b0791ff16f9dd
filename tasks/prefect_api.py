"""Minimal client of Prefect's REST API: one request without retries, a timeout of seconds.

Prefect's own client retries for minutes, which would stall the threads that follow a training, and
takes two seconds to import, which would slow down `up` and `down`.
"""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, Literal

from tasks.direct_http import open_direct

CSRF_CLIENT = "fromscratch"
REQUEST_TIMEOUT_SECONDS = 10.0
FINAL_STATES = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
RunKind = Literal["flow_runs", "task_runs"]


class PrefectApi:
    """The API of one server. Every method raises OSError if the server fails or refuses."""

    def __init__(self, url: str) -> None:
        """Use the API at `url`, in the form of PREFECT_API_URL."""
        self.url = url.rstrip("/")

    def get(self, path: str) -> Any:
        """Send a GET request."""
        return self._send("GET", path, None, {})

    def post(self, path: str, body: Mapping[str, Any] | list[Any]) -> Any:
        """Send a POST request: create, filter or set."""
        return self._send("POST", path, body, self._csrf_headers())

    def patch(self, path: str, body: Mapping[str, Any]) -> None:
        """Send a PATCH request: update."""
        self._send("PATCH", path, body, self._csrf_headers())

    def delete(self, path: str) -> None:
        """Send a DELETE request."""
        self._send("DELETE", path, None, self._csrf_headers())

    def set_state(self, kind: RunKind, run_id: str, state: str, message: str) -> None:
        """Set the state of a run, bypassing Prefect's orchestration rules."""
        body = {"state": {"type": state, "message": message}, "force": True}
        self.post(f"{kind}/{run_id}/set_state", body)

    def is_canceled(self, flow_run_id: str) -> bool:
        """Tell whether someone canceled a flow run."""
        return state_type(self.get(f"flow_runs/{flow_run_id}")) in ("CANCELLING", "CANCELLED")

    def _csrf_headers(self) -> dict[str, str]:
        token = self.get(f"csrf-token?client={CSRF_CLIENT}")["token"]
        return {"Prefect-Csrf-Client": CSRF_CLIENT, "Prefect-Csrf-Token": token}

    def _send(self, method: str, path: str, body: object, headers: Mapping[str, str]) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.url}/{path}",
            data,
            {"Content-Type": "application/json", **headers},
            method=method,
        )
        try:
            with open_direct(request, REQUEST_TIMEOUT_SECONDS) as response:
                return json.loads(response.read() or b"null")
        except http.client.HTTPException as error:
            raise ConnectionError(f"{self.url}: {type(error).__name__}: {error}") from error
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError as error:  # it wraps the OSError that callers distinguish
            raise (error.reason if isinstance(error.reason, OSError) else error) from error


def state_type(run: Mapping[str, Any]) -> str:
    """Return the type of a run's state: `RUNNING`, `CANCELLING`, one of FINAL_STATES."""
    return (run.get("state") or {}).get("type", "")
