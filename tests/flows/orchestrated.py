"""Runs against a real Prefect server, as a user starts and watches them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from flows import prefect_api
from flows.prefect_api import FINAL_STATES, PrefectApi, state_type
from flows.running import RunningRun, running_runs
from tests import tiny

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "tests" / "tasks" / "defaults.yaml"
T = TypeVar("T")
BIN = Path(sys.executable).parent
SECONDS_TO_WAIT = 200.0  # what this machine has to do besides is not known
# a request waits for SQLite's write lock for up to a minute where the disk is slow
prefect_api.TIMEOUT_SECONDS = 90.0


def overrides(artifacts: Path, *more: str) -> list[str]:
    """Return the settings of a tiny pipeline, built in `artifacts` from sources beside it."""
    sources = artifacts.parent / "sources"
    sources.mkdir(exist_ok=True)
    given = {word.split("=")[0] for word in more}
    kept = [word for word in tiny.SETTINGS if word.split("=")[0] not in given]
    return [*kept, *tiny.write_sources(sources), f"runtime.artifacts_dir={artifacts}", *more]


def start_run(artifacts: Path, *words: str, **variables: str) -> "subprocess.Popen[str]":
    """Start `fromscratch run` on the tiny pipeline; `words` are options and settings."""
    settings = [word for word in words if not word.startswith("--") and "=" in word]
    options = [word for word in words if word not in settings]
    values = overrides(artifacts, *settings)
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "run", str(RECIPE), *values, *options],
        cwd=ROOT,
        env=environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # what a shell starts in the background ignores Ctrl-C, and so would all that it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def environment() -> dict[str, str]:
    """Return this process's environment without any Prefect server in it."""
    names = ("PREFECT_", "FROMSCRATCH_")
    return {name: value for name, value in os.environ.items() if not name.startswith(names)}


def printed_by(process: "subprocess.Popen[str]") -> str:
    """Wait until a process ends and return all it printed."""
    return process.communicate(timeout=SECONDS_TO_WAIT)[0]


def until(look: Callable[[], T], what: str) -> T:
    """Look until something is there, and return it."""
    deadline = time.monotonic() + SECONDS_TO_WAIT
    while not (found := look()):
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.1)
    return found


def run_of(artifacts: Path, process: "subprocess.Popen[str]") -> RunningRun:
    """Wait until a process has begun its flow run, and return that."""

    def look() -> list[RunningRun]:
        assert process.poll() is None, process.communicate()[0]
        return [run for run in running_runs(artifacts) if run.pid == process.pid]

    return until(look, "the flow run")[0]


def until_trained(artifacts: Path, stage: str, steps: int) -> None:
    """Wait until the one training of `stage` that is under way has logged `steps` steps."""

    def look() -> bool:
        logs = list((artifacts / "staging").glob(f"{stage}-*/work/metrics.jsonl"))
        return any(len(logged_steps(log)) >= steps for log in logs)

    until(look, f"{steps} steps of {stage}")


def logged_steps(path: Path) -> list[int]:
    """Return the steps of a training's metrics, in the order they were logged."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record["step"] for record in records if "train/loss" in record.get("metrics", record)]


def until_final(api: PrefectApi, run_id: str) -> dict[str, Any]:
    """Wait until a flow run is in a final state, and return it."""

    def look() -> dict[str, Any]:
        run: dict[str, Any] = api.get(f"flow_runs/{run_id}")
        return run if state_type(run) in FINAL_STATES else {}

    return until(look, f"the end of flow run {run_id}")


def tasks_of(api: PrefectApi, run_id: str) -> dict[str, str]:
    """Return the name of the state of each task of a flow run."""
    found = api.post("task_runs/filter", {"flow_runs": {"id": {"any_": [run_id]}}})
    states: dict[str, str] = {}
    for task in found:
        # a task that never began still has the name that Prefect made up: `evaluate-56c`
        states[re.sub(r"-[0-9a-f]{3}$", "", task["name"])] = task["state"]["name"]
    return states


def artifacts_of(api: PrefectApi, run_id: str) -> dict[str, dict[str, Any]]:
    """Return a flow run's artifacts by key, of which there is one each."""
    found = api.post("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run_id]}}})
    keys = [artifact["key"] for artifact in found]
    assert len(set(keys)) == len(keys), keys
    return dict(zip(keys, found, strict=True))


def logs_of(api: PrefectApi, run_id: str) -> str:
    """Return what a flow run and its tasks logged."""
    wanted = {"logs": {"flow_run_id": {"any_": [run_id]}}}
    return "\n".join(record["message"] for record in api.post("logs/filter", wanted))


def prefect(api: PrefectApi, *words: str, cwd: Path = ROOT) -> str:
    """Run Prefect's own command and return what it printed."""
    done = subprocess.run(
        [BIN / "prefect", "--no-prompt", *words],
        cwd=cwd,
        env=environment() | {"PREFECT_API_URL": api.url},
        capture_output=True,
        text=True,
        timeout=SECONDS_TO_WAIT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def start_by_command(api: PrefectApi, deployment: str, **parameters: Any) -> str:
    """Start a deployment as `prefect deployment run` does, and return the flow run's id."""
    words = ["deployment", "run", deployment, "--params", json.dumps(parameters)]
    found = re.search(r"flow-run/([0-9a-f-]{36})", prefect(api, *words).replace("\n", ""))
    assert found is not None
    return found[1]


def start_by_page(api: PrefectApi, deployment: str, **parameters: Any) -> str:
    """Start a deployment by the request its page sends, and return the flow run's id."""
    found = api.get(f"deployments/name/{deployment}")
    body = {"state": {"type": "SCHEDULED"}, "parameters": parameters}
    return api.post(f"deployments/{found['id']}/create_flow_run", body)["id"]


def interrupt(process: "subprocess.Popen[str]", number: signal.Signals) -> str:
    """Send a signal and return all the process printed until its end."""
    process.send_signal(number)
    return printed_by(process)
