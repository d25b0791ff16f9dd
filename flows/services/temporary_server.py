"""A Prefect server that lives as long as one process, for a run without the server of `up`: none
was started, or it was stopped or killed during the run.
"""

import logging
import subprocess
import time
import urllib.parse
from pathlib import Path

from flows.services.environments import client_environment, prefect_environment
from flows.services.processes import (
    HOST,
    SERVICE_POLL_SECONDS,
    ServiceError,
    listening_socket,
    start_error,
)
from flows.services.registry import DEFAULT_PORTS, recorded_services, service_log, services_lock
from flows.services.servers import (
    PORT_TIMEOUT_SECONDS,
    START_TIMEOUT_SECONDS,
    restart_prefect,
    server_command,
)
from llm.runtime.termination import end_processes
from tasks.direct_http import fetch_or_none


class TemporaryPrefectServer:
    """A Prefect server for one run, started in the background. It ends with its parent, however
    that ends, because the kernel then closes the pipe that is its standard input.
    """

    def __init__(self, artifacts_dir: Path, port: int = 0) -> None:
        """Start the server, on `port` if that is free; `wait_ready` waits until it answers."""
        self._artifacts_dir = artifacts_dir.absolute()
        self._log = service_log(self._artifacts_dir, "temporary")
        timeout_seconds = PORT_TIMEOUT_SECONDS if port else 0.0
        with listening_socket(port, timeout_seconds) as listener, self._log.open("wb") as log:
            self.port: int = listener.getsockname()[1]
            self._process = subprocess.Popen(
                [*server_command("prefect", self._artifacts_dir, listener), "--temporary"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=prefect_environment(self._artifacts_dir, self.port)
                | {"PREFECT_SERVER_UI_ENABLED": "false"},
                pass_fds=[listener.fileno()],
                start_new_session=True,  # Ctrl-C is for the run, which reports its end to this
            )

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._process.pid

    @property
    def environment(self) -> dict[str, str]:
        """The variables that point a Prefect client to this server. Set them before importing
        prefect. Links go to the port of `up`, which will show the run when this server is gone.
        """
        variables = client_environment(self._artifacts_dir, self.port)
        known = recorded_services(self._artifacts_dir).get("prefect")
        port = known.port if known is not None else DEFAULT_PORTS["prefect"]
        return {**variables, "PREFECT_UI_URL": f"http://{HOST}:{port}"}

    def wait_ready(self, timeout_seconds: float = START_TIMEOUT_SECONDS) -> None:
        """Return when the server answers.

        Raises:
            ServiceError: it ended or did not answer in time.
        """
        deadline = time.monotonic() + timeout_seconds
        while fetch_or_none(f"http://{HOST}:{self.port}/api/health") is None:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise start_error("the temporary Prefect server", self._log)
            time.sleep(SERVICE_POLL_SECONDS)

    def stop(self) -> None:
        """Stop the server, after Prefect's client has sent the last lines of the run's log."""
        for name in ("prefect.flow_runs", "prefect.task_runs"):
            for handler in logging.getLogger(name).handlers:
                handler.flush()
        end_processes([self._process])
        if self._process.stdin is not None:
            self._process.stdin.close()


def replace_server(artifacts_dir: Path, api_url: str) -> TemporaryPrefectServer | None:
    """Start a server at the address of one that has died: that of `up` again, or after `down` a
    temporary one, which is returned. It uses the same database, so clients can continue.

    Raises:
        ServiceError: it did not start, or another program has taken its port.
    """
    port = urllib.parse.urlsplit(api_url).port or 0
    with services_lock(artifacts_dir):
        is_back = fetch_or_none(f"{api_url}/health") is not None
        if is_back or restart_prefect(artifacts_dir, api_url):
            return None
        server = TemporaryPrefectServer(artifacts_dir, port)
        try:
            if server.port != port:
                raise ServiceError(f"port {port} was taken by another program")
            server.wait_ready()
        except BaseException:
            server.stop()
            raise
        return server
