"""Start and stop the Prefect server, its worker and the MLflow server: `up` and `down`.

Both servers listen on 127.0.0.1 alone, behind the checks of `flows.services.guard`.
"""

import contextlib
import socket
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from flows.live_runs import close_dead_runs, has_process, live_runs
from flows.services.environments import (
    client_environment,
    mlflow_environment,
    prefect_environment,
    without_prefect,
)
from flows.services.processes import (
    HOST,
    SERVICE_POLL_SECONDS,
    Service,
    ServiceError,
    listening_socket,
    start_error,
    start_service,
    stop_services,
)
from flows.services.registry import (
    DEFAULT_PORTS,
    ServiceName,
    Services,
    errors_in_logs,
    record_services,
    recorded_services,
    service_log,
    services_lock,
)
from tasks.direct_http import fetch_or_none
from tasks.launch import SECONDS_TO_SAVE
from tasks.prefect_api import PrefectApi
from tasks.tracking.client import tracking_uri
from tasks.tracking.journal import Journal
from tasks.tracking.tracker import Delivery

Notify = Callable[[str], None]

WORK_POOL, WORKER = "local", "fromscratch"
PORT_TIMEOUT_SECONDS = 5.0
START_TIMEOUT_SECONDS = 300.0  # a new database takes 15 s, on an overloaded machine minutes
DELIVERY_TIMEOUT_SECONDS = 60.0


def up(artifacts_dir: Path, notify: Notify | None = None) -> Services:
    """Start the services that do not run yet, and return when all are ready.

    Raises:
        ServiceError: a server ended or was not ready in time; those just started are stopped.
    """
    artifacts_dir = artifacts_dir.absolute()
    notify = notify or _print
    with services_lock(artifacts_dir):
        known = recorded_services(artifacts_dir)
        running: dict[ServiceName, Service] = {
            name: service for name, service in known.items() if service.is_alive
        }
        for name in known.keys() - running.keys():
            notify(f"{name} had stopped; restarting it")
            stop_services([known[name].id])  # its child processes may still hold the port
        started: dict[ServiceName, Service] = {}
        try:
            for name in DEFAULT_PORTS:
                if name not in running:
                    started[name] = _start_server(name, known.get(name), artifacts_dir, notify)
                    record_services(artifacts_dir, running | started)
            for name in started:
                _wait_until_ready(started[name], notify)
            prefect = (running | started)["prefect"]
            has_moved = "prefect" in known and prefect.port != known["prefect"].port
            if "worker" not in running or has_moved:
                if "worker" in running:
                    stop_services([running.pop("worker").id])
                started["worker"] = _start_worker(prefect, artifacts_dir)
                record_services(artifacts_dir, running | started)
                _wait_until_ready(started["worker"], notify, prefect)
        except BaseException:
            stop_services([service.id for service in started.values()])
            record_services(artifacts_dir, running)
            raise
        if not started:
            notify("all services are running")
        _close_dead_runs(artifacts_dir, prefect, notify)
        for error in errors_in_logs(artifacts_dir):
            notify(error)
        return Services(**(running | started))


def down(artifacts_dir: Path, notify: Notify | None = None) -> list[str]:
    """Stop the services and all they started; return the names of those that were running.

    Runs of the worker are canceled first, so that their stages save. Runs of a command line
    continue, each with a temporary server (flows.services.temporary_server).
    """
    artifacts_dir = artifacts_dir.absolute()
    if not (artifacts_dir / "services").is_dir():
        return []
    with services_lock(artifacts_dir):
        known = recorded_services(artifacts_dir)
        running = [name for name, service in known.items() if service.is_alive]
        if "prefect" in running:
            _cancel_runs_of_worker(artifacts_dir, known["prefect"], notify or _print)
        # the worker first: its runs report their end to the server
        stop_services([known[name].id for name in ("worker",) if name in known])
        stop_services([service.id for service in known.values()])
        record_services(artifacts_dir, {})
        return sorted(running)


def restart_prefect(artifacts_dir: Path, api_url: str) -> bool:
    """Restart the recorded Prefect server, which has died, if it was at `api_url`. Return whether
    it was. The caller holds `services_lock`.

    Raises:
        ServiceError: it did not start, or another program has taken its port.
    """
    known = recorded_services(artifacts_dir)
    if "prefect" not in known or _api(known["prefect"]).url != api_url:
        return False
    server = _start_server("prefect", known["prefect"], artifacts_dir, lambda _: None)
    try:
        if server.port != known["prefect"].port:
            raise ServiceError(f"port {known['prefect'].port} was taken by another program")
        _wait_until_ready(server, lambda _: None)
    except BaseException:
        stop_services([server.id])
        raise
    record_services(artifacts_dir, {**known, "prefect": server})
    return True


def server_command(name: ServiceName, artifacts_dir: Path, listener: socket.socket) -> list[str]:
    """Return the command of a server that inherits the socket `listener`."""
    command = [sys.executable, "-m", "flows.services.guard", name, str(artifacts_dir)]
    return [*command, "--fd", str(listener.fileno())]


def _start_server(
    name: ServiceName, before: Service | None, artifacts_dir: Path, notify: Notify
) -> Service:
    """Start a server, on the port it had `before` if that is free."""
    port = before.port if before else DEFAULT_PORTS[name]
    with listening_socket(port, PORT_TIMEOUT_SECONDS if before else 0.0) as listener:
        taken: int = listener.getsockname()[1]
        if taken != port:
            notify(f"port {port} is in use; {name} uses {taken}")
        make_environment = prefect_environment if name == "prefect" else mlflow_environment
        return start_service(
            name,
            server_command(name, artifacts_dir, listener),
            make_environment(artifacts_dir, taken),
            service_log(artifacts_dir, name),
            port=taken,
            descriptors=[listener.fileno()],
        )


def _start_worker(prefect: Service, artifacts_dir: Path) -> Service:
    command = [sys.executable, "-m", "prefect", "worker", "start", "--name", WORKER]
    command += ["--pool", WORK_POOL, "--type", "process"]  # creates the pool if necessary
    variables = without_prefect(client_environment(artifacts_dir, prefect.port))
    return start_service("worker", command, variables, service_log(artifacts_dir, "worker"))


def _wait_until_ready(service: Service, notify: Notify, prefect: Service | None = None) -> None:
    """Wait until a server answers, or until the worker has registered with the server `prefect`."""
    reported_at = started_at = time.time()
    while not _is_ready(service, prefect, started_at):
        now = time.time()
        if not service.is_alive or now - started_at > START_TIMEOUT_SECONDS:
            raise start_error(service.name, Path(service.log))
        if now - reported_at > 2:
            reported_at = now
            notify(f"{service.name} is starting ({now - started_at:.0f} s)")
        time.sleep(SERVICE_POLL_SECONDS)
    notify(f"{service.name} is ready")


def _is_ready(service: Service, prefect: Service | None, started_at: float) -> bool:
    if prefect is not None:
        return _last_heartbeat(prefect) > started_at
    path = "/api/health" if service.name == "prefect" else "/health"
    return fetch_or_none(f"http://{HOST}:{service.port}{path}") is not None


def _close_dead_runs(artifacts_dir: Path, prefect: Service, notify: Notify) -> None:
    """Close the Prefect and MLflow runs of processes that were killed."""
    with contextlib.suppress(OSError):  # the next `up` or run closes them
        for name in close_dead_runs(artifacts_dir, _api(prefect)):
            notify(f"{name}: its process was killed; Prefect shows it as crashed now")
    journals = artifacts_dir / "tracking"
    with contextlib.suppress(OSError):
        if any(journals.glob("*.journal")):
            # a delivery sends the journals of dead processes first; its own stays empty
            uri = tracking_uri("", artifacts_dir)
            delivery = Delivery(Journal.create(journals), uri, artifacts_dir)
            delivery.finish(DELIVERY_TIMEOUT_SECONDS)


def _last_heartbeat(prefect: Service) -> float:
    """Return the time of the worker's last heartbeat, in seconds since 1970."""
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


def _cancel_runs_of_worker(artifacts_dir: Path, prefect: Service, notify: Notify) -> None:
    """Cancel the worker's runs, and wait until their stages have saved."""
    runs = [run for run in live_runs(artifacts_dir) if run.is_of_worker]
    for run in runs:
        notify(f"canceling {run.name}; its running stages save first")
        with contextlib.suppress(OSError):  # then `stop_services` ends it
            message = "Canceled by `fromscratch down`"
            _api(prefect).set_state("flow_runs", run.id, "CANCELLING", message)
    deadline = time.monotonic() + SECONDS_TO_SAVE
    while any(has_process(artifacts_dir, run) for run in runs) and time.monotonic() < deadline:
        time.sleep(SERVICE_POLL_SECONDS)


def _api(prefect: Service) -> PrefectApi:
    return PrefectApi(f"http://{HOST}:{prefect.port}/api")


def _print(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
