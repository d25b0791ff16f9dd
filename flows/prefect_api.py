"""Prefect's REST API, asked once and for seconds only.

Prefect's own client tries again for minutes, which nothing beside a training may wait for, and
importing it takes two seconds, which `up` and `down` do not.
"""

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, Literal

CLIENT = "fromscratch"
TIMEOUT_SECONDS = 10.0
FINAL_STATES = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
RUN_KINDS = Literal["flow_runs", "task_runs"]
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class PrefectApi:
    """One server's API. Every method raises OSError where it does not answer or refuses."""

    def __init__(self, url: str) -> None:
        """Ask the API at `url`, as PREFECT_API_URL names it."""
        self.url = url.rstrip("/")

    def get(self, path: str) -> Any:
        """Read what is at `path`."""
        return self._send("GET", path, None, {})

    def post(self, path: str, body: Mapping[str, Any] | list[Any]) -> Any:
        """Create, search or set."""
        return self._send("POST", path, body, self._csrf_headers())

    def patch(self, path: str, body: Mapping[str, Any]) -> None:
        """Change what is at `path`."""
        self._send("PATCH", path, body, self._csrf_headers())

    def delete(self, path: str) -> None:
        """Remove what is at `path`."""
        self._send("DELETE", path, None, self._csrf_headers())

    def set_state(self, kind: RUN_KINDS, run_id: str, state: str, message: str) -> None:
        """Put a run into a state, whatever Prefect's rules say of its last one."""
        body = {"state": {"type": state, "message": message}, "force": True}
        self.post(f"{kind}/{run_id}/set_state", body)

    def _csrf_headers(self) -> dict[str, str]:
        token = self.get(f"csrf-token?client={CLIENT}")["token"]
        return {"Prefect-Csrf-Client": CLIENT, "Prefect-Csrf-Token": token}

    def _send(self, method: str, path: str, body: object, headers: Mapping[str, str]) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.url}/{path}",
            data,
            {"Content-Type": "application/json", **headers},
            method=method,
        )
        try:
            with _DIRECT.open(request, timeout=TIMEOUT_SECONDS) as response:
                return json.loads(response.read() or b"null")
        except http.client.HTTPException as error:
            raise ConnectionError(f"{self.url}: {type(error).__name__}: {error}") from error
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError as error:  # it hides what kind of error it was
            raise (error.reason if isinstance(error.reason, OSError) else error) from error


def state_type(run: Mapping[str, Any]) -> str:
    """Return the type of a run's state: `RUNNING`, `CANCELLING`, one of FINAL_STATES."""
    return (run.get("state") or {}).get("type", "")
