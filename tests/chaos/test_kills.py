"""Kill it anywhere, start it again, get the same bits. The long form is benchmarks/kills.py."""

import os
import random
from pathlib import Path

import psutil
import pytest

from tests.chaos.killed_runs import digests, kill, left_over, stage_process, stages
from tests.flows.orchestrated import start_run, until_trained

pytestmark = pytest.mark.flaky(
    reason="real runs are killed at random moments, on a machine that may be busy"
)

NUM_STEPS = {"pretrain": 60, "finetune": 40}
SETTINGS = (
    *(f"{stage}.num_steps={number}" for stage, number in NUM_STEPS.items()),
    "runtime.checkpoint_every_steps=1",
    "--json",
)
KILLED_IN = ("clean", "pretrain", "finetune")


@pytest.mark.slow
@pytest.mark.skipif("FROMSCRATCH_LONG" not in os.environ, reason="FROMSCRATCH_LONG=1 asks")
@pytest.mark.timeout(1500)  # five runs or more, each with a Prefect server of its own
def test_a_run_killed_in_its_stages_ends_with_the_digests_of_an_undisturbed_one(
    tmp_path: Path,
) -> None:
    undisturbed = start_run(tmp_path / "undisturbed", *SETTINGS).communicate()[0]
    expected = digests(undisturbed)
    assert len(expected) == 10
    seconds = {name.split()[0]: float(s["seconds"]) for name, s in stages(undisturbed).items()}
    rng = random.Random(1)
    artifacts = tmp_path / "killed"
    for stage in KILLED_IN:
        options: tuple[str, ...] = ()
        while not was_killed(stage, artifacts, options, rng, seconds[stage]):
            options = (f"--force={stage}",)  # the kill came too late: the stage was finished
        assert not left_over(artifacts)
    run = start_run(artifacts, *SETTINGS)
    found = run.communicate()[0]
    assert run.returncode == 0, found
    assert digests(found) == expected
    redone = [name for name, stage in stages(found).items() if stage["status"] == "built"]
    assert set(redone) == {"finetune", "evaluate"}, "the others were finished before the last kill"


def was_killed(
    stage: str, artifacts: Path, options: tuple[str, ...], rng: random.Random, seconds: float
) -> bool:
    """Start a run and kill it at a random moment of `stage`; return whether both were at work."""
    run = start_run(artifacts, *SETTINGS, *options)
    process = stage_process(run, artifacts, stage)
    assert process is not None, f"{stage} never ran: {run.communicate()[0]}"
    if stage in NUM_STEPS:
        until_trained(artifacts, stage, rng.randrange(1, NUM_STEPS[stage] // 2))
    else:
        psutil.wait_procs([process], timeout=rng.uniform(0.0, 0.8 * seconds))
    was_at_work = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return kill(run) is None and was_at_work
