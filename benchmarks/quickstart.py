"""Run the quickstart as a newcomer does and print what it cost and what came out.

    python benchmarks/quickstart.py [section.key=value ...]

First run in an empty folder, unchanged second run, finetune.num_steps changed (planned only).
Memory is the sum of the proportional set sizes of all processes of the run, sampled twice a second.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

MIB = 1 << 20


class Run:
    """One `fromscratch run` with its wall time and peak memory."""

    def __init__(self, artifacts: Path, *arguments: str) -> None:
        """Run it to the end."""
        command = [sys.executable, "-m", "flows.cli", "run", "quickstart", *arguments]
        command += [f"runtime.artifacts_dir={artifacts}", "--json"]
        self.peak_bytes = 0
        started_at = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        sampler = threading.Thread(target=self._sample, args=(psutil.Process(process.pid),))
        sampler.start()
        output, _ = process.communicate()
        self.seconds = time.monotonic() - started_at
        sampler.join()
        assert process.returncode == 0, f"ended with {process.returncode}"
        self.result: dict[str, Any] = json.loads(output.splitlines()[-1])

    def _sample(self, process: psutil.Process) -> None:
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            total = 0
            try:
                for each in (process, *process.children(recursive=True)):
                    total += each.memory_full_info().pss
            except psutil.Error:  # a process ended while it was looked at
                continue
            self.peak_bytes = max(self.peak_bytes, total)
            time.sleep(0.5)


def main() -> None:
    """Run, and print a line a figure."""
    with tempfile.TemporaryDirectory() as folder:
        artifacts = Path(folder) / "artifacts"
        first = Run(artifacts, *sys.argv[1:])
        second = Run(artifacts, *sys.argv[1:])
        planned = Run(artifacts, *sys.argv[1:], "finetune.num_steps=121", "--plan")
        curve = next((artifacts / "pretrain").glob("*/metrics.jsonl")).read_text().splitlines()
    stage_seconds = sum(stage["seconds"] for stage in first.result["stages"])
    points = [json.loads(line)["metrics"].get("val/bits_per_byte") for line in curve]
    rebuilt = [s["stage"] for s in planned.result["stages"] if s["status"] == "build"]
    print(f"first run            {first.seconds:8.1f} s")
    print(f"  stages             {stage_seconds:8.1f} s")
    for stage in first.result["stages"]:
        print(f"    {stage['stage']:<16} {stage['seconds']:8.1f} s  {stage['role']}")
    print(f"  peak memory        {first.peak_bytes / MIB:8.0f} MiB")
    print(f"second run           {second.seconds:8.1f} s")
    print(f"  stages built       {sum(s['status'] == 'built' for s in second.result['stages']):8d}")
    print(f"finetune changed     rebuilds {', '.join(rebuilt)}")
    print("validation           " + " ".join(f"{p:.3f}" for p in points if p is not None))
    for name, value in first.result["metrics"].items():
        print(f"{name:<34} {value:12.5g}")


if __name__ == "__main__":
    main()
