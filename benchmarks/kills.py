"""Kill a run at random moments, start it again each time, and compare with an undisturbed run.

    python -m benchmarks.kills --kills 10 quickstart pretrain.num_steps=60 finetune.num_steps=40

Each kill is SIGKILL to the whole process group of `fromscratch run`. One that comes when the run is
over already does not count. Prints one line a kill and a verdict; exits with 1 when a digest
differs, a run fails or a process is left over.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos.killed_runs import SECONDS_UNTIL_GONE, digests, kill, left_over

LONGEST_SHARE = 0.4  # of an undisturbed run, so that most attempts are killed before they end


def start(options: argparse.Namespace, artifacts: Path) -> "subprocess.Popen[str]":
    """Start one run in a process group of its own."""
    command = [sys.executable, "-m", "flows.cli", "run", options.recipe, *options.overrides]
    command += [f"runtime.artifacts_dir={artifacts}", "--json"]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def report_kill(number: int, seconds: float, artifacts: Path) -> bool:
    """Print what a kill hit; return whether all processes of the run were gone in time."""
    staged = sorted(path.name[:24] for path in (artifacts / "staging").glob("*-*"))
    alive = left_over(artifacts)
    print(
        f"kill {number}: after {seconds:.1f} s, in {', '.join(staged) or 'nothing'};"
        f" {len(alive)} processes left after {SECONDS_UNTIL_GONE:.0f} s",
        flush=True,
    )
    return not alive


def main() -> int:
    """Run undisturbed, then under kills, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        started_at = time.monotonic()
        output, _ = start(options, Path(folder) / "undisturbed").communicate()
        undisturbed_seconds = time.monotonic() - started_at
        expected = digests(output)
        print(f"undisturbed: {undisturbed_seconds:.1f} s, {len(expected)} stages", flush=True)
        is_bad, num_killed, num_finished = False, 0, 0
        while num_killed < options.kills or not num_finished:
            artifacts = Path(folder) / f"killed-{num_finished}"
            is_last = num_killed >= options.kills  # then the run is left to end
            seconds = rng.uniform(0.5, LONGEST_SHARE * undisturbed_seconds)
            run = start(options, artifacts)
            try:
                output, _ = run.communicate(timeout=None if is_last else seconds)
            except subprocess.TimeoutExpired:
                if (printed := kill(run)) is None:
                    num_killed += 1
                    is_bad |= not report_kill(num_killed, seconds, artifacts)
                    continue
                output = printed  # it had just ended
            num_finished += 1  # the next kills hit a new run from its beginning
            found = digests(output) if run.returncode == 0 else {}
            is_bad |= found != expected
            verdict = "all digests equal" if found == expected else f"DIFFERENT: {found}"
            print(f"run {num_finished} over after {num_killed} kills in all: {verdict}", flush=True)
    print("FAILED" if is_bad else f"all digests equal after {num_killed} kills")
    return 1 if is_bad else 0


if __name__ == "__main__":
    sys.exit(main())
