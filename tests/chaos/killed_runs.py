"""Whole runs of the command line, killed (promises 1 and 8): what tests and benchmarks share."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil

SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_UNTIL_GONE = 10.0


def kill(run: "subprocess.Popen[str]") -> str | None:
    """Send SIGKILL to a run's process group. Return None where it hit, and what the run printed
    where it came too late.
    """
    os.killpg(run.pid, signal.SIGKILL)
    output = run.communicate()[0]
    return None if run.returncode == -signal.SIGKILL else output


def stage_process(
    run: "subprocess.Popen[str]", artifacts: Path, stage: str
) -> psutil.Process | None:
    """Wait for the process of `stage`, and return it; None when the run ends without one."""
    while run.poll() is None:
        has_begun = any((artifacts / "staging").glob(f"{stage}-*/job.json"))  # cheap to look at
        for process in working_in(artifacts) if has_begun else ():
            if f"llm.{stage}" in command(process):
                return process
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return None


def working_in(artifacts: Path) -> list[psutil.Process]:
    """Return the processes that have `artifacts` in their command."""
    found = [process for process in psutil.process_iter() if process.pid != os.getpid()]
    return [process for process in found if any(str(artifacts) in w for w in command(process))]


def left_over(artifacts: Path) -> list[psutil.Process]:
    """Return the processes that still work in `artifacts` ten seconds after a kill."""
    return psutil.wait_procs(working_in(artifacts), timeout=SECONDS_UNTIL_GONE)[1]


def command(process: psutil.Process) -> list[str]:
    """Return a process's command; empty when it is gone."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def stages(output: str) -> dict[str, dict[str, str]]:
    """Return every stage of a run that ended with `--json`, by name."""
    lines = [line for line in output.splitlines() if line.startswith('{"recipe"')]
    found = json.loads(lines[-1])["stages"]
    return {f"{stage['stage']} {stage['role']}".strip(): stage for stage in found}


def digests(output: str) -> dict[str, str]:
    """Return the digest of every stage of a run that ended with `--json`."""
    return {name: stage["digest"] for name, stage in stages(output).items()}
