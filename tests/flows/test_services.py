"""The servers start, are recognized, refuse foreign requests, and stop with all they started."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import Request

import psutil
import pytest

from flows.doctor import examine
from flows.services.addresses import addresses
from flows.services.processes import (
    ID_VARIABLE,
    ServiceError,
    listening_socket,
    start_service,
    stop_services,
)
from flows.services.registry import (
    Services,
    errors_in_logs,
    running_prefect_environment,
    running_services,
)
from flows.services.servers import down, up
from flows.services.temporary_server import TemporaryPrefectServer, replace_server
from llm.config import RuntimeConfig
from tasks.direct_http import open_direct
from tests.tasks.tracked_folder import TrackedFolder

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.flaky(reason="real servers start and end, on a machine that may be busy"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture(scope="module")
def services(artifacts: Path) -> Iterator[Services]:
    """All three, for a new folder, while other programs hold their default ports."""
    with contextlib.ExitStack() as others:
        for port in (4200, 5000):
            other = others.enter_context(socket.socket())
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):  # another program holds it already
                other.bind(("127.0.0.1", port))
                other.listen()
        try:
            yield up(artifacts, notify=lambda _: None)
        finally:
            down(artifacts)


def ask(url: str, path: str, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def wait_until_gone(process: psutil.Process) -> None:
    deadline = time.monotonic() + 10
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"{process} is still there"
        time.sleep(0.05)


def test_up_starts_what_answers_on_ports_that_were_free(services: Services) -> None:
    assert services.prefect.port != 4200
    assert services.mlflow.port != 5000
    assert ask(services.prefect_url, "/api/health") == (200, b"true")
    assert ask(services.prefect_url, "/")[0] == 200
    assert ask(services.mlflow_url, "/health") == (200, b"OK")
    assert b"<title>MLflow</title>" in ask(services.mlflow_url, "/")[1]
    status_code, pool = ask(services.prefect_url, "/api/work_pools/local")
    assert (status_code, json.loads(pool)["status"]) == (200, "READY")


def test_mlflows_assistant_which_runs_commands_is_off(services: Services) -> None:
    for prefix in ("api", "ajax-api"):
        path = f"/{prefix}/3.0/mlflow/assistant/config"
        assert ask(services.mlflow_url, path) == (404, b"the assistant is turned off\n")
    assert b"autoOpenedOnFirstLoad_v1" in ask(services.mlflow_url, "/")[1]


def test_every_server_listens_on_loopback_alone(services: Services) -> None:
    listening = {
        connection.laddr.ip
        for service in (services.prefect, services.mlflow, services.worker)
        for connection in psutil.Process(service.pid).net_connections()
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Origin": "http://evil.example"}])
def test_a_foreign_host_or_origin_is_refused(services: Services, headers: dict[str, str]) -> None:
    for url, path in ((services.prefect_url, "/api/health"), (services.mlflow_url, "/health")):
        assert ask(url, path, **headers)[0] == 403


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another account")
def test_another_account_is_refused(services: Services) -> None:
    for port, path in ((services.prefect.port, "/api/health"), (services.mlflow.port, "/health")):
        request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n"
        for account, answer in ((0, b"HTTP/1.1 200"), (12345, b"HTTP/1.1 403")):
            code = f"""
import os, socket
os.setuid({account})
connection = socket.socket()
connection.connect(("127.0.0.1", {port}))
connection.send({request.encode()})
print(connection.recv(12).decode())
"""
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
            assert done.stdout.strip() == answer


def test_a_second_up_finds_everything_running(services: Services, artifacts: Path) -> None:
    with Path(services.prefect.log).open("a") as log:
        log.write("12:00:01.000 | ERROR   | prefect.server.services.scheduler - cannot\n")
    said: list[str] = []
    assert up(artifacts, notify=said.append) == services
    assert said[0] == "all services are running"
    assert f"errors in {services.prefect.log}" in said[1]
    assert running_services(artifacts) == services


def test_the_environment_points_a_client_at_the_server(services: Services, artifacts: Path) -> None:
    found = running_prefect_environment(artifacts)
    assert found["PREFECT_API_URL"] == f"{services.prefect_url}/api"
    assert found["PREFECT_HOME"] == str(artifacts / "prefect")


def test_the_addresses_are_those_of_up_or_of_the_users_own_mlflow(
    services: Services, artifacts: Path
) -> None:
    found = addresses(RuntimeConfig(), artifacts)
    assert found == {"MLflow": services.mlflow_url, "Prefect": services.prefect_url}
    body = json.dumps({"name": "fromscratch/models"}).encode()
    create = f"{services.mlflow_url}/api/2.0/mlflow/experiments/create"
    request = Request(create, body, {"Content-Type": "application/json"})
    with open_direct(request, 10) as response:
        made = json.loads(response.read())
    page = f"#/experiments/{made['experiment_id']}/runs"
    page += "?workflowType=machine_learning&compareRunsMode=CHART"
    assert addresses(RuntimeConfig(), artifacts)["MLflow"] == f"{services.mlflow_url}/{page}"
    own = RuntimeConfig(tracking_uri=f"{services.mlflow_url}/")
    elsewhere = addresses(own, artifacts / "none")
    assert elsewhere == {"MLflow": f"{services.mlflow_url}/{page}", "Prefect": "fromscratch up"}


def test_a_server_that_died_is_started_again_on_its_port(
    services: Services, artifacts: Path
) -> None:
    os.kill(services.mlflow.pid, signal.SIGKILL)
    wait_until_gone(psutil.Process(services.mlflow.pid))
    assert running_services(artifacts) is None
    said: list[str] = []
    again = up(artifacts, notify=said.append)
    assert said[0] == "mlflow had stopped; restarting it"
    assert again.mlflow.port == services.mlflow.port
    assert again.prefect == services.prefect
    assert ask(again.mlflow_url, "/health")[0] == 200


def test_a_run_starts_the_server_of_up_again_when_that_died(
    services: Services, artifacts: Path
) -> None:
    before = running_services(artifacts)
    assert before is not None
    os.kill(before.prefect.pid, signal.SIGKILL)
    wait_until_gone(psutil.Process(before.prefect.pid))
    api_url = running_prefect_environment(artifacts).get(
        "PREFECT_API_URL", f"{before.prefect_url}/api"
    )
    assert replace_server(artifacts, api_url) is None, "no temporary server"
    now = running_services(artifacts)
    assert now is not None
    assert now.prefect_url == before.prefect_url
    assert now.worker == before.worker
    assert ask(now.prefect_url, "/api/health") == (200, b"true")
    assert replace_server(artifacts, api_url) is None
    assert running_services(artifacts) == now, "nothing was restarted"


def test_up_closes_the_mlflow_runs_of_a_killed_process(services: Services, artifacts: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from tests.tasks.tracked_folder import TrackedFolder, start_model
tracked = TrackedFolder(Path({str(artifacts)!r}))
start_model(tracked.start("killed"), tracked.work)
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert list((artifacts / "tracking").glob("*.journal"))
    up(artifacts, notify=lambda _: None)
    runs = TrackedFolder(artifacts).runs("pipelines")
    assert {run.info.status for run in runs.values()} == {"KILLED"}
    assert not list((artifacts / "tracking").glob("*.journal"))


def test_errors_in_a_servers_log_are_found_and_printed_by_doctor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "services").mkdir()
    code = "print('a | ERROR | b - cannot\\nTraceback (most recent call last):', flush=True)\n"
    code += "print('c | WARNING | d\\ne | ERROR | f - a transient server error', flush=True)\n"
    code += "import time; time.sleep(60)"
    command = [sys.executable, "-c", code]
    service = start_service("prefect", command, os.environ, tmp_path / "services" / "prefect.log")
    try:
        record = {"prefect": asdict(service)}
        (tmp_path / "services" / "services.json").write_text(json.dumps(record))
        while "transient" not in Path(service.log).read_text():
            time.sleep(0.05)
        assert errors_in_logs(tmp_path) == [
            f"1 errors in {service.log}, the last: a | ERROR | b - cannot"
        ]
        examine(tmp_path)
        assert "b - cannot" in capsys.readouterr().out
    finally:
        stop_services([service.id])
    assert errors_in_logs(tmp_path) == [], "it is not running"


def test_down_stops_the_services_and_what_they_started_and_nothing_else(
    services: Services, artifacts: Path
) -> None:
    running = running_services(artifacts)
    assert running is not None
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    of_a_worker = subprocess.Popen(  # such as a training, which has its own session
        sleeping, env={**os.environ, ID_VARIABLE: running.worker.id}, start_new_session=True
    )
    other = subprocess.Popen(sleeping, env={**os.environ, ID_VARIABLE: "of another folder"})
    mine = [running.prefect.pid, running.mlflow.pid, running.worker.pid]
    processes = [psutil.Process(pid) for pid in mine]
    try:
        assert down(artifacts) == ["mlflow", "prefect", "worker"]
        assert of_a_worker.wait(timeout=5) == -signal.SIGTERM
        for process in processes:
            wait_until_gone(process)
        assert other.poll() is None
    finally:
        for process in (of_a_worker, other):
            process.kill()
            process.wait()
    assert down(artifacts) == []
    assert running_services(artifacts) is None
    assert running_prefect_environment(artifacts) == {}


def test_a_temporary_server_serves_and_stops(services: Services, artifacts: Path) -> None:
    down(artifacts)  # its database is used again, which saves creating one
    with contextlib.ExitStack() as stack:
        server = TemporaryPrefectServer(artifacts)
        stack.callback(server.stop)
        server.wait_ready()
        url = server.environment["PREFECT_API_URL"].removesuffix("/api")
        assert ask(url, "/api/health") == (200, b"true")
        assert ask(url, "/api/health", Host="evil.example")[0] == 403
        assert server.environment["PREFECT_UI_URL"] == "http://127.0.0.1:4200", "the port of `up`"
    with pytest.raises(ConnectionRefusedError):
        ask(url, "/api/health")


def test_a_temporary_server_stops_when_its_run_is_killed(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from flows.services.temporary_server import TemporaryPrefectServer
server = TemporaryPrefectServer(Path({str(tmp_path)!r}))
print(server.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30)
    assert done.returncode == -signal.SIGKILL
    with contextlib.suppress(psutil.NoSuchProcess):
        wait_until_gone(psutil.Process(int(done.stdout)))


def test_a_server_that_cannot_start_reports_why(tmp_path: Path) -> None:
    (tmp_path / "prefect").mkdir()
    (tmp_path / "prefect" / "prefect.db").write_bytes(b"no database " * 1000)
    with pytest.raises(ServiceError, match="not a database"):
        up(tmp_path, notify=lambda _: None)
    assert down(tmp_path) == []


def test_a_reused_process_number_is_not_taken_for_a_service(tmp_path: Path) -> None:
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    service = start_service("prefect", sleeping, os.environ, tmp_path / "log")
    assert service.is_alive
    stop_services([service.id])
    assert not service.is_alive
    other = subprocess.Popen(sleeping)
    record = {**{name: getattr(service, name) for name in ("name", "port", "id", "log")}}
    assert not type(service)(pid=other.pid, **record).is_alive
    other.kill()
    other.wait()


def test_importing_services_imports_neither_prefect_nor_mlflow() -> None:
    code = "import sys, flows.services.servers; print({'prefect', 'mlflow'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout.strip() == b"set()"


def test_a_port_is_taken_before_its_server_answers() -> None:
    with listening_socket(0) as first, listening_socket(first.getsockname()[1]) as second:
        assert second.getsockname()[1] != first.getsockname()[1]
