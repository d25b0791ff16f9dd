"""Prefect and MLflow over the data of one artifacts folder: `up`, `down`, where they are.

They listen on 127.0.0.1 alone, as `flows.services.guard` guards them; there is no password to type.
"""

import contextlib
import fcntl
import json
import re
import socket
import sys
import time
import urllib.parse
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Literal, cast

from flows.prefect_api import PrefectApi
from flows.running import close_dead_runs, has_process, running_runs
from flows.services.environments import (
    client_environment,
    mlflow_environment,
    prefect_environment,
    without_prefect,
)
from flows.services.processes import (
    HOST,
    SECONDS_BETWEEN_LOOKS,
    Service,
    ServiceError,
    failure,
    fetch,
    free_port,
    start,
    stop,
)
from llm.artifact import write_json_atomically
from llm.config import RuntimeConfig
from tasks.launch import SECONDS_TO_SAVE
from tasks.tracking.client import tracking_uri, without_password
from tasks.tracking.view import CURVES_VIEW, VIEW_TAG

Name = Literal["prefect", "mlflow", "worker"]
Say = Callable[[str], None]

FIRST_PORTS: Mapping[Name, int] = {"prefect": 4200, "mlflow": 5000}
WORK_POOL, WORKER = "local", "fromscratch"
# of Prefect, MLflow and uvicorn; what Prefect calls transient it has done again
LOGGED_ERROR = re.compile(r"^(?!.*\btransient\b).*\b(?:ERROR|CRITICAL)\b.*$", re.M)
SECONDS_TO_FREE_A_PORT = 5.0
SECONDS_TO_START = 300.0  # a fresh database takes 15 s, on an overloaded machine minutes


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
    with only_one(artifacts_dir):
        known = recorded(artifacts_dir)
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
            has_moved = "prefect" in known and prefect.port != known["prefect"].port
            if "worker" not in running or has_moved:
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
        _close_dead_runs(artifacts_dir, prefect, say)
        for found in log_errors(artifacts_dir):
            say(found)
        return Services(**(running | started))


def down(artifacts_dir: Path, say: Say | None = None) -> list[str]:
    """End the services and all they started; return the names of those that were running.

    Runs of the worker are cancelled first, which lets their stages save. Runs of a command line go
    on: each brings itself a server (flows.services.temporary_server).
    """
    artifacts_dir = artifacts_dir.absolute()
    if not (artifacts_dir / "services").is_dir():
        return []
    with only_one(artifacts_dir):
        known = recorded(artifacts_dir)
        running = [name for name, service in known.items() if service.is_alive]
        if "prefect" in running:
            _cancel_runs_of_worker(artifacts_dir, known["prefect"], say or _say)
        # the worker first: what it runs still has a server to tell its end to
        stop([known[name].id for name in ("worker",) if name in known])
        stop([service.id for service in known.values()])
        _write(artifacts_dir, {})
        return sorted(running)


def restart_prefect(artifacts_dir: Path, api_url: str) -> bool:
    """Start the Prefect server of `up` again where that was at `api_url` and has died. False where
    `up` has none there. Call it under `only_one`.

    Raises:
        ServiceError: it did not start, or something else took its port.
    """
    known = recorded(artifacts_dir)
    if "prefect" not in known or _api(known["prefect"]).url != api_url:
        return False
    server = _start_server("prefect", known["prefect"], artifacts_dir, lambda _: None)
    try:
        if server.port != known["prefect"].port:
            raise ServiceError(f"port {known['prefect'].port} was taken by another program")
        _wait_until_ready(server, lambda _: None)
    except BaseException:
        stop([server.id])
        raise
    _write(artifacts_dir, {**known, "prefect": server})
    return True


def status(artifacts_dir: Path) -> Services | None:
    """Return the services when all are running, from what is recorded, without asking them."""
    known = recorded(artifacts_dir.absolute())
    if len(known) < 3 or not all(service.is_alive for service in known.values()):
        return None
    return Services(**known)


def log_errors(artifacts_dir: Path) -> list[str]:
    """Return, for each server that is running, how many errors its log holds and the last of them:
    a service inside Prefect that fails says so nowhere else.
    """
    found: list[str] = []
    known = recorded(artifacts_dir.absolute())
    for service in (known[name] for name in FIRST_PORTS if name in known):
        if service.is_alive:
            text = Path(service.log).read_text(encoding="utf-8", errors="replace")
            if errors := LOGGED_ERROR.findall(text):
                last = errors[-1].strip()
                found.append(f"{len(errors)} errors in {service.log}, the last: {last}")
    return found


def environment(artifacts_dir: Path) -> dict[str, str]:
    """Return what a Prefect client needs to use the server that is up; empty when none is.

    Set it before the first import of prefect, which reads it then.
    """
    prefect = recorded(artifacts_dir.absolute()).get("prefect")
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
    experiment = json.loads(found)["experiment"]
    page = f"#/experiments/{experiment['experiment_id']}/runs"
    # without the query MLflow shows traces of conversations
    query = "workflowType=machine_learning&compareRunsMode=CHART"
    if any(tag["key"] == VIEW_TAG for tag in experiment.get("tags", [])):
        query += f"&viewStateShareKey={CURVES_VIEW}"
    return f"{server_url.rstrip('/')}/{page}?{query}"


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
            server_command(name, artifacts_dir, listener),
            make_environment(artifacts_dir, taken),
            server_log(artifacts_dir, name),
            port=taken,
            descriptors=[listener.fileno()],
        )


def _start_worker(prefect: Service, artifacts_dir: Path) -> Service:
    command = [sys.executable, "-m", "prefect", "worker", "start", "--name", WORKER]
    command += ["--pool", WORK_POOL, "--type", "process"]  # makes the pool where there is none
    variables = without_prefect(client_environment(artifacts_dir, prefect.port))
    return start("worker", command, variables, server_log(artifacts_dir, "worker"))


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
        return _last_heartbeat(prefect) > started_at
    path = "/api/health" if service.name == "prefect" else "/health"
    return fetch(f"http://{HOST}:{service.port}{path}") is not None


def _close_dead_runs(artifacts_dir: Path, prefect: Service, say: Say) -> None:
    with contextlib.suppress(OSError):  # the next `up` or run closes them
        for name in close_dead_runs(artifacts_dir, _api(prefect)):
            say(f"{name}: its process was killed; it is shown as crashed now")


def _last_heartbeat(prefect: Service) -> float:
    """Return when the worker last told Prefect that it is there, in seconds since 1970."""
    try:
        workers = _api(prefect).post(f"work_pools/{WORK_POOL}/workers/filter", {})
    except OSError:
        return 0.0
    beats = [
        datetime.fromisoformat(worker["last_heartbeat_time"]).timestamp()
        for worker in workers
        if worker["name"] == WORKER and worker["last_heartbeat_time"]
    ]
    return max(beats, default=0.0)


def _cancel_runs_of_worker(artifacts_dir: Path, prefect: Service, say: Say) -> None:
    """Cancel what the worker runs, and wait until its stages have saved."""
    runs = [run for run in running_runs(artifacts_dir) if run.is_of_worker]
    for run in runs:
        say(f"cancelling {run.name}; a stage that is running saves first")
        with contextlib.suppress(OSError):  # then `stop` ends it, a little less politely
            _api(prefect).set_state("flow_runs", run.id, "CANCELLING", "`fromscratch down`")
    deadline = time.monotonic() + SECONDS_TO_SAVE
    while any(has_process(artifacts_dir, run) for run in runs) and time.monotonic() < deadline:
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _api(prefect: Service) -> PrefectApi:
    return PrefectApi(f"http://{HOST}:{prefect.port}/api")


def server_command(name: Name, artifacts_dir: Path, listener: socket.socket) -> list[str]:
    command = [sys.executable, "-m", "flows.services.guard", name, str(artifacts_dir)]
    return [*command, "--fd", str(listener.fileno())]


def _folder(artifacts_dir: Path) -> Path:
    folder = artifacts_dir / "services"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def server_log(artifacts_dir: Path, name: str) -> Path:
    return _folder(artifacts_dir) / f"{name}.log"


@contextlib.contextmanager
def only_one(artifacts_dir: Path) -> Generator[None]:
    """Let one `up` or `down` work at a time."""
    with (_folder(artifacts_dir) / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def recorded(artifacts_dir: Path) -> dict[Name, Service]:
    """Return the services of this folder. In a copy of a folder the services of the original are
    recorded too, which are left alone. Those of a folder that was moved have paths that are gone:
    they count as ended.
    """
    folder = artifacts_dir / "services"
    try:
        data = json.loads((folder / "services.json").read_bytes())
        services = {name: Service(**service) for name, service in data.items()}
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return {}
    found: dict[Name, Service] = {}
    for name, service in services.items():
        log = Path(service.log)
        if log.parent == folder:
            found[cast(Name, name)] = service
        elif not log.exists():
            found[cast(Name, name)] = replace(service, pid=0)
    return found


def _write(artifacts_dir: Path, services: Mapping[Name, Service]) -> None:
    data = {name: asdict(service) for name, service in services.items()}
    write_json_atomically(_folder(artifacts_dir) / "services.json", data, is_durable=False)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
