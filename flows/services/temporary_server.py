"""A Prefect server that lasts as long as one process: for a run where `up` has started none, or in
place of one that was stopped or killed while a run was using it.
"""

import logging
import subprocess
import time
import urllib.parse
from pathlib import Path

from flows.services.environments import client_environment, prefect_environment
from flows.services.processes import (
    HOST,
    SECONDS_BETWEEN_LOOKS,
    ServiceError,
    failure,
    fetch,
    free_port,
)
from flows.services.servers import (
    FIRST_PORTS,
    SECONDS_TO_FREE_A_PORT,
    SECONDS_TO_START,
    only_one,
    recorded,
    restart_prefect,
    server_command,
    server_log,
)


class TemporaryPrefectServer:
    """A Prefect server for one run, started at once in the background. It ends with its parent,
    however that ends, because the kernel then closes the pipe that is its standard input.
    """

    def __init__(self, artifacts_dir: Path, port: int = 0) -> None:
        """Start the server, on `port` where that is free; `wait_ready` says when it answers."""
        self._artifacts_dir = artifacts_dir.absolute()
        self._log = server_log(self._artifacts_dir, "temporary")
        wait_seconds = SECONDS_TO_FREE_A_PORT if port else 0.0
        with free_port(port, wait_seconds) as listener, self._log.open("wb") as log:
            self.port: int = listener.getsockname()[1]
            self._process = subprocess.Popen(
                [*server_command("prefect", self._artifacts_dir, listener), "--temporary"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=prefect_environment(self._artifacts_dir, self.port)
                | {"PREFECT_SERVER_UI_ENABLED": "false"},
                pass_fds=[listener.fileno()],
                start_new_session=True,  # Ctrl-C is for the run, which still has to tell its end
            )

    @property
    def pid(self) -> int:
        """The number of its process."""
        return self._process.pid

    @property
    def environment(self) -> dict[str, str]:
        """What a Prefect client needs to use this server. Set it before importing prefect.

        Links lead to where `up` will show the run, since this server will be gone.
        """
        variables = client_environment(self._artifacts_dir, self.port)
        known = recorded(self._artifacts_dir).get("prefect")
        port = known.port if known is not None else FIRST_PORTS["prefect"]
        return {**variables, "PREFECT_UI_URL": f"http://{HOST}:{port}"}

    def wait_ready(self, timeout_seconds: float = SECONDS_TO_START) -> None:
        """Return when the server answers.

        Raises:
            ServiceError: it ended or did not answer in time.
        """
        deadline = time.monotonic() + timeout_seconds
        while fetch(f"http://{HOST}:{self.port}/api/health") is None:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise failure("the temporary Prefect server", self._log)
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def stop(self) -> None:
        """End the server, after Prefect's client sent it the last lines of the run's log."""
        for name in ("prefect.flow_runs", "prefect.task_runs"):
            for handler in logging.getLogger(name).handlers:
                handler.flush()
        self._process.terminate()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()


def bring_back(artifacts_dir: Path, api_url: str) -> TemporaryPrefectServer | None:
    """Start a server at the address of one that is gone: that of `up` anew, or after `down` one for
    this process, which is returned. Its data lies in the artifacts folder, so whoever used the old
    one goes on with the new.

    Raises:
        ServiceError: it did not start, or something else took its port.
    """
    port = urllib.parse.urlsplit(api_url).port or 0
    with only_one(artifacts_dir):
        if fetch(f"{api_url}/health") is not None or restart_prefect(artifacts_dir, api_url):
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
