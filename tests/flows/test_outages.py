"""A run whose Prefect server is killed finishes."""

import os
import signal
from pathlib import Path

import pytest

from flows.services.temporary_server import TemporaryPrefectServer
from tasks.prefect_api import PrefectApi
from tests.flows.orchestrated import (
    printed_by,
    run_of,
    start_run,
    tasks_of,
    until_final,
    until_trained,
)

pytestmark = pytest.mark.flaky(
    reason="a real server is killed beside a run, on a machine that may be busy"
)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_whose_server_is_killed_finishes(tmp_path: Path) -> None:
    artifacts = tmp_path / "artifacts"
    server = TemporaryPrefectServer(artifacts)
    server.wait_ready()
    process = start_run(artifacts, "pretrain.num_steps=400", **server.environment)
    run_id = run_of(artifacts, process).id
    until_trained(artifacts, "pretrain", 10)
    os.kill(server.pid, signal.SIGKILL)
    server.stop()
    printed = printed_by(process)
    assert process.returncode == 0, printed
    assert "Traceback" not in printed
    assert "Prefect  fromscratch up\n" in printed
    assert "http://" not in printed, "a dead server's address"

    server = TemporaryPrefectServer(artifacts)  # reads the database of the killed one
    try:
        server.wait_ready()
        api = PrefectApi(server.environment["PREFECT_API_URL"])
        assert until_final(api, run_id)["state"]["name"] == "Completed"
        states = tasks_of(api, run_id)
        assert len(states) == 10
        assert set(states.values()) == {"Completed"}
    finally:
        server.stop()
