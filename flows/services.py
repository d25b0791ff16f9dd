"""Prefect and MLflow over the data of one artifacts folder: `up`, `down`, and a server for one run.

They listen on 127.0.0.1 alone, as `flows.serve` guards them; there is no password to type.
"""

import contextlib
import fcntl
import json
import logging
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, cast

from flows.environments import (
    client_environment,
    mlflow_environment,
    prefect_environment,
    without_prefect,
)
from flows.processes import (
    HOST,
    SECONDS_BETWEEN_LOOKS,
    Service,
    failure,
    fetch,
    free_port,
    start,
    stop,
)
from llm.artifact import write_json_atomically
from llm.config import RuntimeConfig
from tasks.mlflow_store import tracking_uri, without_password

Name = Literal["prefect", "mlflow", "worker"]
Say = Callable[[str], None]

FIRST_PORTS: Mapping[Name, int] = {"prefect": 4200, "mlflow": 5000}
WORK_POOL, WORKER = "local", "fromscratch"
SECONDS_TO_FREE_A_PORT = 5.0
SECONDS_TO_START = 120.0  # a fresh database on a busy machine takes Prefect half a minute


@dataclass(frozen=True, kw_only=True, slots=True)
class Services:
    """What is up, and where to look at it."""

    prefect: Service
    mlflow: Service
    worker: Service

    @property
    def prefect_url(self) -> str:
        """Prefect's pages."""
        return f"http://{HOST}:{self.prefect.port}"

    @property
    def mlflow_url(self) -> str:
        """MLflow's pages."""
        return f"http://{HOST}:{self.mlflow.port}"


def up(artifacts_dir: Path, say: Say | None = None) -> Services:
    """Start what is not running yet, and return when everything answers.

    Raises:
        ServiceError: a server ended or did not answer in time; what had been started is ended.
    """
    artifacts_dir = artifacts_dir.absolute()
    say = say or _say
    with _lock(artifacts_dir):
        known = _read(artifacts_dir)
        running: dict[Name, Service] = {
            name: service for name, service in known.items() if service.is_alive
        }
        for name in known.keys() - running.keys():
            say(f"{name} had ended; starting it again")
            stop([known[name].id])  # what it had started may still hold its port
        started: dict[Name, Service] = {}
        try:
            for name in FIRST_PORTS:
                if name not in running:
                    started[name] = _start_server(name, known.get(name), artifacts_dir, say)
                    _write(artifacts_dir, running | started)
            for name in started:
                _wait_until_ready(started[name], say)
            prefect = (running | started)["prefect"]
            if "worker" not in running or "prefect" in started:
                if "worker" in running:
                    stop([running.pop("worker").id])
                started["worker"] = _start_worker(prefect, artifacts_dir)
                _write(artifacts_dir, running | started)
                _wait_until_ready(started["worker"], say, prefect)
        except BaseException:
            stop([service.id for service in started.values()])
            _write(artifacts_dir, running)
            raise
        if not started:
            say("everything is running")
        return Services(**(running | started))


def down(artifacts_dir: Path) -> list[str]:
    """End the services and all they started; return the names of those that were running."""
    artifacts_dir = artifacts_dir.absolute()
    if not (artifacts_dir / "services").is_dir():
        return []
    with _lock(artifacts_dir):
        known = _read(artifacts_dir)
        running = [name for name, service in known.items() if service.is_alive]
        # the worker first: what it runs still has a server to tell its end to
        stop([known[name].id for name in ("worker",) if name in known])
        stop([service.id for service in known.values()])
        _write(artifacts_dir, {})
        return sorted(running)


def status(artifacts_dir: Path) -> Services | None:
    """Return the services when all are running, from what is recorded, without asking them."""
    known = _read(artifacts_dir.absolute())
    if len(known) < 3 or not all(service.is_alive for service in known.values()):
        return None
    return Services(**known)


def environment(artifacts_dir: Path) -> dict[str, str]:
    """Return what a Prefect client needs to use the server that is up; empty when none is.

    Set it before the first import of prefect, which reads it then.
    """
    prefect = _read(artifacts_dir.absolute()).get("prefect")
    if prefect is None or not prefect.is_alive:
        return {}
    return client_environment(artifacts_dir.absolute(), prefect.port)


def addresses(runtime: RuntimeConfig, artifacts_dir: Path) -> dict[str, str]:
    """Return where to look at runs and models, or how to start the pages."""
    found = status(artifacts_dir)
    prefect = mlflow = "fromscratch up"
    if found is not None:
        prefect, mlflow = found.prefect_url, found.mlflow_url
    uri = tracking_uri(runtime.tracking_uri, artifacts_dir)
    if uri.startswith(("http://", "https://")):  # a server of the user's own
        mlflow = without_password(uri)
    if mlflow != "fromscratch up":
        mlflow = _models_page(mlflow, runtime.project)
    return {"MLflow": mlflow, "Prefect": prefect}


def _models_page(server_url: str, project: str) -> str:
    """Return the page that lays the curves of the project's models over each other; MLflow's first
    where there is none yet.
    """
    name = urllib.parse.quote(f"{project}/models")
    path = f"/api/2.0/mlflow/experiments/get-by-name?experiment_name={name}"
    found = fetch(server_url.rstrip("/") + path)
    if found is None:
        return server_url
    page = f"#/experiments/{json.loads(found)['experiment']['experiment_id']}/runs"
    # without the query MLflow shows traces of conversations
    query = "workflowType=machine_learning&compareRunsMode=CHART"
    return f"{server_url.rstrip('/')}/{page}?{query}"


class TemporaryPrefectServer:
    """A Prefect server for one run, started at once in the background. It ends with its parent,
    however that ends, because the kernel then closes the pipe that is its standard input.
    """

    def __init__(self, artifacts_dir: Path) -> None:
        """Start the server; `wait_ready` says when it answers."""
        self._artifacts_dir = artifacts_dir.absolute()
        self._log = _log(self._artifacts_dir, "temporary")
        with free_port(0) as listener, self._log.open("wb") as log:
            self._port: int = listener.getsockname()[1]
            self._process = subprocess.Popen(
                [*_server_command("prefect", self._artifacts_dir, listener), "--temporary"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=prefect_environment(self._artifacts_dir, self._port)
                | {"PREFECT_SERVER_UI_ENABLED": "false"},
                pass_fds=[listener.fileno()],
                start_new_session=True,  # Ctrl-C is for the run, which still has to tell its end
            )

    @property
    def environment(self) -> dict[str, str]:
        """What a Prefect client needs to use this server. Set it before importing prefect.

        Links lead to where `up` will show the run, since this server will be gone.
        """
        variables = client_environment(self._artifacts_dir, self._port)
        known = _read(self._artifacts_dir).get("prefect")
        port = known.port if known is not None else FIRST_PORTS["prefect"]
        return {**variables, "PREFECT_UI_URL": f"http://{HOST}:{port}"}

    def wait_ready(self, timeout_seconds: float = SECONDS_TO_START) -> None:
        """Return when the server answers.

        Raises:
            ServiceError: it ended or did not answer in time.
        """
        deadline = time.monotonic() + timeout_seconds
        while fetch(f"http://{HOST}:{self._port}/api/health") is None:
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


def _start_server(name: Name, before: Service | None, artifacts_dir: Path, say: Say) -> Service:
    """Start a server, on the port it had `before` where that is still free."""
    port = before.port if before else FIRST_PORTS[name]
    with free_port(port, SECONDS_TO_FREE_A_PORT if before else 0.0) as listener:
        taken: int = listener.getsockname()[1]
        if taken != port:
            say(f"port {port} is in use; {name} takes {taken}")
        make_environment = prefect_environment if name == "prefect" else mlflow_environment
        return start(
            name,
            _server_command(name, artifacts_dir, listener),
            make_environment(artifacts_dir, taken),
            _log(artifacts_dir, name),
            port=taken,
            descriptors=[listener.fileno()],
        )


def _start_worker(prefect: Service, artifacts_dir: Path) -> Service:
    command = [sys.executable, "-m", "prefect", "worker", "start", "--name", WORKER]
    command += ["--pool", WORK_POOL, "--type", "process"]  # makes the pool where there is none
    variables = without_prefect(client_environment(artifacts_dir, prefect.port))
    return start("worker", command, variables, _log(artifacts_dir, "worker"))


def _wait_until_ready(service: Service, say: Say, prefect: Service | None = None) -> None:
    """Wait until a server answers, or until Prefect (`prefect`) knows that its worker is there."""
    told_at = started_at = time.time()
    while not _is_ready(service, prefect, started_at):
        now = time.time()
        if not service.is_alive or now - started_at > SECONDS_TO_START:
            raise failure(service.name, Path(service.log))
        if now - told_at > 2:
            told_at = now
            say(f"{service.name} is starting ({now - started_at:.0f} s)")
        time.sleep(SECONDS_BETWEEN_LOOKS)
    say(f"{service.name} is ready")


def _is_ready(service: Service, prefect: Service | None, started_at: float) -> bool:
    if prefect is not None:
        return _last_heartbeat(prefect.port) > started_at
    path = "/api/health" if service.name == "prefect" else "/health"
    return fetch(f"http://{HOST}:{service.port}{path}") is not None


def _last_heartbeat(prefect_port: int) -> float:
    """Return when the worker last told Prefect that it is there, in seconds since 1970."""
    api = f"http://{HOST}:{prefect_port}/api"
    token = fetch(f"{api}/csrf-token?client={WORKER}")
    if token is None:
        return 0.0
    headers = {"Prefect-Csrf-Client": WORKER, "Prefect-Csrf-Token": json.loads(token)["token"]}
    workers = fetch(f"{api}/work_pools/{WORK_POOL}/workers/filter", b"{}", headers)
    beats = [
        datetime.fromisoformat(worker["last_heartbeat_time"]).timestamp()
        for worker in json.loads(workers or b"[]")
        if worker["name"] == WORKER and worker["last_heartbeat_time"]
    ]
    return max(beats, default=0.0)


def _server_command(name: Name, artifacts_dir: Path, listener: socket.socket) -> list[str]:
    command = [sys.executable, "-m", "flows.serve", name, str(artifacts_dir)]
    return [*command, "--fd", str(listener.fileno())]


def _folder(artifacts_dir: Path) -> Path:
    folder = artifacts_dir / "services"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _log(artifacts_dir: Path, name: str) -> Path:
    return _folder(artifacts_dir) / f"{name}.log"


@contextlib.contextmanager
def _lock(artifacts_dir: Path) -> Generator[None]:
    """Let one `up` or `down` work at a time."""
    with (_folder(artifacts_dir) / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(artifacts_dir: Path) -> dict[Name, Service]:
    try:
        data = json.loads((artifacts_dir / "services" / "services.json").read_bytes())
        return {cast(Name, name): Service(**service) for name, service in data.items()}
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return {}


def _write(artifacts_dir: Path, services: Mapping[Name, Service]) -> None:
    data = {name: asdict(service) for name, service in services.items()}
    write_json_atomically(_folder(artifacts_dir) / "services.json", data, is_durable=False)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
