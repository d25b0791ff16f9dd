"""Prefect's server is killed during a run: no stage is lost, and none done twice (promise 12)."""

import subprocess
import time
from pathlib import Path

import pytest

from tasks.stages import all_stages
from tasks.store import ArtifactStore
from tests.chaos.killed_runs import command, left_over, stage_process, stages, working_in
from tests.flows.orchestrated import start_run, until_trained

pytestmark = pytest.mark.flaky(
    reason="a real server is killed beside a run, on a machine that may be busy"
)

SETTINGS = ("pretrain.num_steps=200", "runtime.checkpoint_every_steps=1", "--json")
BEFORE = {"download corpus", "download chats", "clean corpus", "clean chats", "train_tokenizer",
          "pack corpus"}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)  # two runs, each with a server of its own
def test_the_running_stage_is_kept_and_the_next_run_redoes_none_that_is_finished(
    tmp_path: Path,
) -> None:
    artifacts = tmp_path / "artifacts"
    run = start_run(artifacts, *SETTINGS)
    training = stage_process(run, artifacts, "pretrain")
    assert training is not None, run.communicate()[0]
    until_trained(artifacts, "pretrain", 5)
    [server] = [
        process for process in working_in(artifacts) if "flows.services.guard" in command(process)
    ]
    server.kill()
    assert training.is_running(), "pretrain was at work when the server was killed"
    trainings = processes_of_training(run, artifacts)
    first = run.communicate()[0]
    assert trainings == {training.pid}, "pretrain goes on in the process that was at work"
    finished = finished_stages(artifacts)
    assert BEFORE | {"pretrain"} <= finished, first
    assert not left_over(artifacts)

    run = start_run(artifacts, *SETTINGS)
    found = stages(run.communicate()[0])
    assert run.returncode == 0
    assert {name for name, stage in found.items() if stage["status"] == "cached"} >= finished
    assert len(found) == 10


def processes_of_training(run: "subprocess.Popen[str]", artifacts: Path) -> set[int]:
    """Follow a run to its end; return the processes in which it pretrained."""
    found: set[int] = set()
    while run.poll() is None:
        found |= {p.pid for p in working_in(artifacts) if "llm.pretrain" in command(p)}
        time.sleep(0.3)
    return found


def finished_stages(artifacts: Path) -> set[str]:
    """Return the stages whose artifacts are kept, by the records of their keys."""
    records = [
        record for stage in all_stages() for record in ArtifactStore(artifacts).records(stage.name)
    ]
    return {f"{record.parts.stage} {record.parts.role}".strip() for record in records}
