"""Kill a run at random moments, start it again each time, and compare with an undisturbed run.

    python benchmarks/kills.py --kills 10 quickstart pretrain.num_steps=60 finetune.num_steps=40

Each kill is SIGKILL to the whole process group of `fromscratch run`. Prints one line a kill and a
verdict; exits with 1 when a digest differs or a process is left over.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

SECONDS_UNTIL_GONE = 10.0


def start(options: argparse.Namespace, artifacts: Path) -> subprocess.Popen[str]:
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


def digests(output: str) -> dict[str, str]:
    """Return the digest of every stage of a finished run."""
    stages = json.loads(output.splitlines()[-1])["stages"]
    return {f"{stage['stage']} {stage['role']}".strip(): stage["digest"] for stage in stages}


def left_over(artifacts: Path) -> list[psutil.Process]:
    """Return processes that still work in `artifacts`."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and any(str(artifacts) in w for w in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


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
        artifacts = Path(folder) / "killed"
        is_bad = False
        for number in range(1, options.kills + 1):
            # a run that is restarted has the less to do the later it is; kill within what is left
            seconds = rng.uniform(0.5, undisturbed_seconds * (1 - (number - 1) / options.kills))
            run = start(options, artifacts)
            try:
                output, _ = run.communicate(timeout=seconds)
                print(f"kill {number}: the run was over before {seconds:.1f} s", flush=True)
                continue
            except subprocess.TimeoutExpired:
                os.killpg(run.pid, signal.SIGKILL)
                run.communicate()
            staged = sorted(path.name[:24] for path in (artifacts / "staging").glob("*-*"))
            _, alive = psutil.wait_procs(left_over(artifacts), timeout=SECONDS_UNTIL_GONE)
            is_bad |= bool(alive)
            print(
                f"kill {number}: after {seconds:.1f} s, in {', '.join(staged) or 'nothing'};"
                f" {len(alive)} processes left after {SECONDS_UNTIL_GONE:.0f} s",
                flush=True,
            )
        output, _ = start(options, artifacts).communicate()
        found = digests(output)
        for name, digest in expected.items():
            verdict = "same" if found.get(name) == digest else "DIFFERENT"
            is_bad |= found.get(name) != digest
            print(f"{name:<16} {digest} {verdict}")
    print("FAILED" if is_bad else f"all digests equal after {options.kills} kills")
    return 1 if is_bad else 0


if __name__ == "__main__":
    sys.exit(main())
