"""Helpers that start runs on a real Prefect server and wait for their states."""

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

from flows.live_runs import LiveRun, live_runs
from tasks import prefect_api
from tasks.prefect_api import FINAL_STATES, PrefectApi, state_type
from tests import tiny

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "tests" / "tasks" / "defaults.yaml"
T = TypeVar("T")
BIN = Path(sys.executable).parent
SECONDS_TO_WAIT = 200.0  # the machine may be busy
# a request waits for SQLite's write lock for up to a minute on a slow disk
prefect_api.REQUEST_TIMEOUT_SECONDS = 90.0


def overrides(artifacts: Path, *more: str) -> list[str]:
    """Return the settings of a tiny pipeline that builds in `artifacts` from sources next to it."""
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
        # a shell's background jobs ignore SIGINT, and their children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def environment() -> dict[str, str]:
    """Return this process's environment without settings of a Prefect server."""
    names = ("PREFECT_", "FROMSCRATCH_")
    return {name: value for name, value in os.environ.items() if not name.startswith(names)}


def printed_by(process: "subprocess.Popen[str]") -> str:
    """Wait until a process ends and return its output."""
    return process.communicate(timeout=SECONDS_TO_WAIT)[0]


def until(poll: Callable[[], T], what: str) -> T:
    """Poll until the result is true, and return it."""
    deadline = time.monotonic() + SECONDS_TO_WAIT
    while not (found := poll()):
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(0.1)
    return found


def run_of(artifacts: Path, process: "subprocess.Popen[str]") -> LiveRun:
    """Wait until a process has started its flow run, and return the run."""

    def poll() -> list[LiveRun]:
        assert process.poll() is None, process.communicate()[0]
        return [run for run in live_runs(artifacts) if run.pid == process.pid]

    return until(poll, "the flow run")[0]


def until_trained(artifacts: Path, stage: str, steps: int) -> None:
    """Wait until the running training of `stage` has logged `steps` steps."""

    def poll() -> bool:
        logs = list((artifacts / "staging").glob(f"{stage}-*/work/metrics.jsonl"))
        return any(len(logged_steps(log)) >= steps for log in logs)

    until(poll, f"{steps} steps of {stage}")


def logged_steps(path: Path) -> list[int]:
    """Return the logged steps of a training, in order."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record["step"] for record in records if "train/loss" in record.get("metrics", record)]


def until_final(api: PrefectApi, run_id: str) -> dict[str, Any]:
    """Wait until a flow run is in a final state, and return it."""

    def poll() -> dict[str, Any]:
        run: dict[str, Any] = api.get(f"flow_runs/{run_id}")
        return run if state_type(run) in FINAL_STATES else {}

    return until(poll, f"the end of flow run {run_id}")


def tasks_of(api: PrefectApi, run_id: str) -> dict[str, str]:
    """Return the name of the state of each task of a flow run."""
    found = api.post("task_runs/filter", {"flow_runs": {"id": {"any_": [run_id]}}})
    states: dict[str, str] = {}
    for task in found:
        # a task that never started still has the name that Prefect generated: `evaluate-56c`
        name = re.sub(r"-[0-9a-f]{3}$", "", task["name"])
        states[name] = task["state"]["name"] if task["state"] else ""
    return states


def artifacts_of(api: PrefectApi, run_id: str) -> dict[str, dict[str, Any]]:
    """Return a flow run's artifacts by key; no key may occur twice."""
    found = api.post("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run_id]}}})
    keys = [artifact["key"] for artifact in found]
    assert len(set(keys)) == len(keys), keys
    return dict(zip(keys, found, strict=True))


def logs_of(api: PrefectApi, run_id: str) -> str:
    """Return the log messages of a flow run and its tasks."""
    wanted = {"logs": {"flow_run_id": {"any_": [run_id]}}}
    return "\n".join(record["message"] for record in api.post("logs/filter", wanted))


def prefect(api: PrefectApi, *words: str, cwd: Path = ROOT) -> str:
    """Run the `prefect` command and return its output."""
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
    """Start a deployment with the request its page sends, and return the flow run's id."""
    found = api.get(f"deployments/name/{deployment}")
    body = {"state": {"type": "SCHEDULED"}, "parameters": parameters}
    return api.post(f"deployments/{found['id']}/create_flow_run", body)["id"]


def interrupt(process: "subprocess.Popen[str]", number: signal.Signals) -> str:
    """Send a signal and return the process's output when it has ended."""
    process.send_signal(number)
    return printed_by(process)
