"""Findings of `fromscratch doctor`, and the record of services it reads."""

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows import doctor
from flows.services.processes import Service, start_service, stop_services
from flows.services.registry import (
    record_services,
    recorded_services,
    running_prefect_environment,
    service_log,
)
from flows.services.servers import down


@pytest.fixture
def port() -> Iterator[int]:
    """A port that something listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def prefect(tmp_path: Path, port: int) -> Iterator[Service]:
    """A process recorded as the Prefect server of an artifacts folder."""
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    log = service_log(tmp_path, "prefect")
    service = start_service("prefect", sleeping, os.environ, log, port=port)
    record_services(tmp_path, {"prefect": service})
    yield service
    stop_services([service.id])


def printed(artifacts: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the doctor's output."""
    doctor.examine(artifacts)
    return capsys.readouterr().out


def test_the_servers_of_this_folder_do_not_block_their_own_ports(
    tmp_path: Path,
    prefect: Service,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(doctor, "DEFAULT_PORTS", {"prefect": prefect.port})
    assert f"ok    prefect runs on port {prefect.port}" in printed(tmp_path, capsys)
    stop_services([prefect.id])
    in_use = f"note  port {prefect.port} is in use; `fromscratch up` uses another for prefect"
    assert in_use in printed(tmp_path, capsys)


def test_a_port_in_use_by_others_is_noted(
    tmp_path: Path,
    port: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(doctor, "DEFAULT_PORTS", {"mlflow": port})
    assert f"note  port {port} is in use" in printed(tmp_path, capsys)


def test_a_copy_leaves_the_services_of_the_original_alone_and_a_moved_folder_ends_them(
    tmp_path: Path, prefect: Service
) -> None:
    copy, original = tmp_path.with_name(f"{tmp_path.name}-copy"), recorded_services(tmp_path)
    record_services(copy, original)
    assert recorded_services(copy) == {} and running_prefect_environment(copy) == {}
    assert down(copy) == [] and prefect.is_alive
    moved = tmp_path.rename(tmp_path.with_name(f"{tmp_path.name}-moved"))
    assert running_prefect_environment(moved) == {}
    down(moved)
    assert not prefect.is_alive
