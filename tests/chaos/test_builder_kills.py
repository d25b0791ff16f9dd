"""Kill the builder anywhere, start it again, get the same bits. By the command line: test_kills."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests import tiny

SCRIPT = (
    "import sys\nfrom pathlib import Path\nfrom tests import tiny\n"
    "for outcome in tiny.build(Path(sys.argv[1]), sys.argv[2:]).values():\n"
    "    print(outcome.name, outcome.digest, sep=': ')\n"
)


def start(artifacts: Path, overrides: Sequence[str]) -> subprocess.Popen[str]:
    """Start the tiny pipeline in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(artifacts), *overrides],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1))
def test_run_killed_at_random_moments_ends_with_the_digests_of_an_undisturbed_one(
    tmp_path: Path, seed: int
) -> None:
    overrides = [*tiny.write_sources(tmp_path), "runtime.checkpoint_every_steps=1"]
    started_at = time.monotonic()
    expected, _ = start(tmp_path / "undisturbed", overrides).communicate()
    seconds = time.monotonic() - started_at
    rng = random.Random(seed)
    num_kills = 0
    for _ in range(4):
        run = start(tmp_path / "killed", overrides)
        try:
            run.communicate(timeout=rng.uniform(0.3, 0.5 * seconds))
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            run.communicate()
            num_kills += 1
    assert num_kills, "every run ended before its kill"
    found, _ = start(tmp_path / "killed", overrides).communicate()
    assert len(found.splitlines()) == 10
    assert found == expected
