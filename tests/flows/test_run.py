"""The flow as Prefect's pages show it: states, artifacts and logs, against a real server."""

import hashlib
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from flows.prefect_api import PrefectApi
from flows.prefect_link import PrefectLink
from flows.running import running_runs
from flows.services.servers import Services, down, status, up
from flows.services.temporary_server import TemporaryPrefectServer
from tasks.launch import Progress
from tests.flows.orchestrated import (
    RECIPE,
    ROOT,
    artifacts_of,
    environment,
    interrupt,
    logged_steps,
    logs_of,
    overrides,
    prefect,
    printed_by,
    run_of,
    start_by_command,
    start_by_page,
    start_run,
    tasks_of,
    until,
    until_final,
    until_trained,
)
from tests.llm.http_server import HostileServer, answer

STAGES = {
    "download corpus", "download chats", "clean corpus", "clean chats", "train_tokenizer",
    "pack corpus", "pack chats", "pretrain", "finetune", "evaluate",
}  # fmt: skip
AFTER_PRETRAIN = {"finetune", "evaluate"}
ENDLESS = "pretrain.num_steps=1000000"

# a server, a worker and a dozen runs, each a few processes
pytestmark = [
    pytest.mark.flaky(
        reason="real servers, runs, signals and kills, on a machine that may be busy"
    ),
    pytest.mark.slow,
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run") / "artifacts"


@pytest.fixture(scope="module")
def services(artifacts: Path) -> Iterator[Services]:
    try:
        yield up(artifacts, say=lambda _: None)
    finally:
        down(artifacts, say=lambda _: None)


@pytest.fixture(scope="module")
def api(services: Services, artifacts: Path) -> PrefectApi:
    """The API of the server that is up, with all deployments of the project and a tiny one."""
    api = PrefectApi(f"{services.prefect_url}/api")
    prefect(api, "deploy", "--all")
    tiny = {
        "name": "tiny",
        "entrypoint": "flows.run.pipeline",
        "parameters": {"recipe": str(RECIPE), "overrides": overrides(artifacts)},
        "work_pool": {"name": "local"},
    }
    file = artifacts.parent / "tiny.yaml"
    file.write_text(yaml.safe_dump({"deployments": [tiny]}))
    prefect(api, "deploy", "--all", "--prefect-file", str(file))
    return api


def test_a_deployment_trains_started_by_the_command_and_by_the_page(
    api: PrefectApi, artifacts: Path
) -> None:
    parameters = {"recipe": str(RECIPE), "overrides": overrides(artifacts)}
    run_id = start_by_command(api, "pipeline/shakespeare-char", **parameters)
    assert until_final(api, run_id)["state"]["name"] == "Completed", logs_of(api, run_id)
    assert tasks_of(api, run_id) == dict.fromkeys(STAGES, "Completed")
    assert list((artifacts / "finetune").iterdir())
    shown = artifacts_of(api, run_id)
    report = next((artifacts / "evaluate").glob("*/report.md")).read_text()
    assert shown["report"]["data"] == report
    assert shown["progress-pretrain"]["data"] == 100
    assert shown["progress-pretrain"]["description"] == "pretrain: 12 of 12 steps"

    again_id = start_by_page(api, "pipeline/shakespeare-char", **parameters)
    assert until_final(api, again_id)["state"]["message"] == "0 of 10 stages built"
    assert tasks_of(api, again_id) == dict.fromkeys(STAGES, "Cached")
    assert artifacts_of(api, again_id).keys() == {"report"}


def test_what_cannot_be_run_is_refused_before_any_stage_and_without_a_traceback(
    api: PrefectApi, artifacts: Path
) -> None:
    settings = overrides(artifacts, "seed=5", "clean.validation_fraction=0.3")

    def built() -> set[Path]:
        return {*artifacts.glob("keys/*/*"), *artifacts.glob("staging/*")}

    before = built()
    cases = {
        "clean corpus: ": {"recipe": str(RECIPE), "overrides": settings},
        "pretrain.num_step": {
            "recipe": str(RECIPE),
            "overrides": [*settings, "pretrain.num_step=3"],
            "only": "",
        },
        "runtime.cache_dir: ": {
            "recipe": str(RECIPE),
            "overrides": [*settings, f"runtime.cache_dir={RECIPE / 'folder'}"],
            "only": "",
        },
        "nosuch: no such stage": {
            "recipe": str(RECIPE),
            "overrides": settings,
            "only": "nosuch",
        },
    }
    ids = {
        said: start_by_page(api, "pipeline/stage", **parameters)
        for said, parameters in cases.items()
    }
    for said, run_id in ids.items():
        run = until_final(api, run_id)
        assert run["state"]["name"] == "Failed"
        assert said in run["state"]["message"]
        assert tasks_of(api, run_id) == {}
        assert "Traceback" not in logs_of(api, run_id)
    assert built() == before


def test_a_schedule_runs(api: PrefectApi) -> None:
    tiny = api.get("deployments/name/pipeline/tiny")
    every = [{"active": True, "schedule": {"interval": 15}}]
    schedule = api.post(f"deployments/{tiny['id']}/schedules", every)[0]
    wanted = {
        "deployments": {"id": {"any_": [tiny["id"]]}},
        "flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}},
    }
    done = until(lambda: api.post("flow_runs/filter", wanted), "a scheduled run")[0]
    assert done["auto_scheduled"]
    assert tasks_of(api, done["id"]) == dict.fromkeys(STAGES, "Cached")
    api.delete(f"deployments/{tiny['id']}/schedules/{schedule['id']}")


def test_a_download_that_the_network_failed_is_tried_again(
    api: PrefectApi, artifacts: Path
) -> None:
    text = (artifacts.parent / "sources" / "corpus.txt").read_bytes()
    refusals = [answer(b"", "503 Service Unavailable")] * 5  # all the tries of one attempt
    with HostileServer([*refusals, answer(text)]) as server:
        process = start_run(
            artifacts,
            "--only",
            "download",
            "download.corpus.kind=url",
            f"download.corpus.url={server.url}/corpus.txt",
            f"download.corpus.sha256={hashlib.sha256(text).hexdigest()}",
        )
        run_id = run_of(artifacts, process).id
        printed = printed_by(process)
    assert process.returncode == 0, printed
    assert until_final(api, run_id)["state"]["name"] == "Completed"
    wanted = {"flow_runs": {"id": {"any_": [run_id]}}}
    tasks = {task["name"]: task for task in api.post("task_runs/filter", wanted)}
    assert tasks["download corpus"]["run_count"] == 2
    states = api.get(f"task_run_states/?task_run_id={tasks['download corpus']['id']}")
    assert [state["name"] for state in states if state["type"] == "SCHEDULED"] == ["AwaitingRetry"]
    assert tasks["download corpus"]["state"]["name"] == "Completed"


def test_a_stage_that_fails_ends_the_run_with_its_message(
    api: PrefectApi, artifacts: Path, tmp_path: Path
) -> None:
    (tmp_path / "chats.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"no JSON\n')
    process = start_run(artifacts, f"download.chats.path={tmp_path / 'chats.jsonl'}")
    run_id = run_of(artifacts, process).id
    printed = printed_by(process)
    assert process.returncode == 1
    assert "Traceback" not in printed
    message = printed.partition("error: ")[2].strip()
    assert "chats.jsonl" in message
    assert until_final(api, run_id)["state"]["name"] == "Failed"
    assert api.get(f"flow_runs/{run_id}")["state"]["message"] == message
    assert tasks_of(api, run_id)["clean chats"] == "Failed"
    assert "Traceback" not in logs_of(api, run_id)


def test_a_run_is_cancelled_interrupted_and_killed_and_goes_on_each_time(
    api: PrefectApi, artifacts: Path
) -> None:
    """One training, stopped in three ways. `down` refuses while it runs."""
    settings = (ENDLESS, "seed=7")
    run = start_run(artifacts, *settings)
    run_id = run_of(artifacts, run).id
    until_trained(artifacts, "pretrain", 20)
    refused = subprocess.run(
        [sys.executable, "-m", "flows.cli", "down", "--artifacts", str(artifacts)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert refused.returncode == 1
    assert f"process {run.pid}" in refused.stderr
    assert status(artifacts) is not None
    api.set_state("flow_runs", run_id, "CANCELLING", "as the page does")
    assert "stopped; the same command goes on" in printed_by(run)
    assert run.returncode == 75
    assert until_final(api, run_id)["state"]["name"] == "Cancelled"
    refuse_other_states(tasks_of(api, run_id), {"Completed", "Cached"})

    for number in (signal.SIGINT, signal.SIGTERM):
        run, run_id, log = resumed(artifacts, settings)
        printed = interrupt(run, number)
        assert run.returncode == 75, printed
        assert "Traceback" not in printed
        assert until_final(api, run_id)["state"]["name"] == "Cancelled"
        refuse_other_states(tasks_of(api, run_id), {"Cached"})

    run, run_id, log = resumed(artifacts, settings)
    run.kill()
    printed_by(run)
    assert api.get(f"flow_runs/{run_id}")["state"]["name"] == "Running"
    assert up(artifacts, say=lambda _: None)
    assert api.get(f"flow_runs/{run_id}")["state"]["name"] == "Crashed"
    assert tasks_of(api, run_id)["pretrain"] == "Crashed"
    assert tasks_of(api, run_id)["clean corpus"] == "Cached"
    steps = logged_steps(log)
    assert steps == sorted(set(steps)), "no step is done twice"


def refuse_other_states(states: dict[str, str], finished: set[str]) -> None:
    """Check the states of a run that was stopped in its pretraining."""
    assert states.keys() == STAGES
    assert states.pop("pretrain") == "Cancelled"
    # `evaluate` may have been given its turn by the cancelled `finetune` before the run ended
    assert {states.pop(name) for name in AFTER_PRETRAIN} <= {"NotReady", "Cancelled"}
    assert set(states.values()) <= finished


def resumed(
    artifacts: Path, settings: tuple[str, ...]
) -> tuple["subprocess.Popen[str]", str, Path]:
    """Start the run again and wait until it trains on; return it, its id and its metrics."""
    [log] = (artifacts / "staging").glob("pretrain-*/work/metrics.jsonl")
    before = len(logged_steps(log))
    run = start_run(artifacts, *settings)
    run_id = run_of(artifacts, run).id
    until_trained(artifacts, "pretrain", before + 10)
    return run, run_id, log


def test_a_run_that_is_run_again_keeps_its_progress_artifact(
    api: PrefectApi, artifacts: Path
) -> None:
    flow = api.post("flows/", {"name": "pipeline"})
    run_id = api.post("flow_runs/", {"flow_id": flow["id"]})["id"]
    for done in (30, 60):
        progress = Progress(done=done, total=60, unit="steps")
        with PrefectLink(api.url, run_id, artifacts) as link:
            link.progressed("pretrain", str(uuid.uuid4()), progress)
    shown = artifacts_of(api, run_id)
    assert shown["progress-pretrain"]["description"] == "pretrain: 60 of 60 steps"


def test_down_cancels_what_the_worker_runs(api: PrefectApi, artifacts: Path) -> None:
    """The last test here: it ends the services."""
    settings = overrides(artifacts, ENDLESS, "seed=8")

    def logs() -> set[Path]:
        return set((artifacts / "staging").glob("pretrain-*/work/metrics.jsonl"))

    before = logs()
    run_id = start_by_page(api, "pipeline/stage", recipe=str(RECIPE), overrides=settings, only="")
    until(lambda: [r.id for r in running_runs(artifacts)] == [run_id], "the worker's run")
    [log] = until(lambda: logs() - before, "the training")
    until(lambda: logged_steps(log), "its first step")
    forced = subprocess.run(
        [sys.executable, "-m", "flows.cli", "down", "--force", "--artifacts", str(artifacts)],
        cwd=ROOT, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert forced.stdout == "stopped: mlflow, prefect, worker\n", forced.stderr
    assert running_runs(artifacts) == []
    server = TemporaryPrefectServer(artifacts)
    try:
        server.wait_ready()
        api = PrefectApi(server.environment["PREFECT_API_URL"])
        assert api.get(f"flow_runs/{run_id}")["state"]["name"] == "Cancelled"
        assert tasks_of(api, run_id)["pretrain"] == "Cancelled"
    finally:
        server.stop()
