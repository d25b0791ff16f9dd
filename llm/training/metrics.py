"""The training curves: `metrics.jsonl`, one line a point, written here and cut back here.

{"step": 50, "tokens": 409600, "seconds": 31.2, "metrics": {"train/loss": 5.1, ...}}
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

VALIDATION_PREFIX = "val/"


class MetricsFile:
    """Appends points to `metrics.jsonl`, going on after the step of the checkpoint that training
    resumes from.
    """

    def __init__(self, path: Path, step: int) -> None:
        """Open `path` and drop what it holds from after `step`, since those steps are done again.

        Validation at `step` itself is dropped too: it follows the checkpoint and is repeated.
        """
        path.touch()
        self._path = path
        seconds = _cut_back(path, step)
        self._started_at = time.perf_counter() - seconds

    def append(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """Write one point at once, so that whoever follows the file sees it."""
        seconds = round(time.perf_counter() - self._started_at, 3)
        line = {"step": step, "tokens": tokens, "seconds": seconds, "metrics": dict(metrics)}
        with self._path.open("ab") as file:
            file.write(json.dumps(line, allow_nan=False).encode() + b"\n")

    def make_durable(self) -> None:
        """Put the points on the disk itself: before a checkpoint that says they are there."""
        descriptor = os.open(self._path, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _cut_back(path: Path, step: int) -> float:
    """Keep the points up to `step` and return the seconds of the last one kept.

    Points stand in the order of their steps, so what goes is a tail: truncating leaves the rest
    untouched, and a line that a kill left unfinished goes too.
    """
    kept_bytes, seconds = 0, 0.0
    with path.open("rb") as file:
        for line in file:
            try:
                point = json.loads(line)
            except ValueError:
                break
            is_validation = any(name.startswith(VALIDATION_PREFIX) for name in point["metrics"])
            if not line.endswith(b"\n") or point["step"] + is_validation > step:
                break
            kept_bytes += len(line)
            seconds = point["seconds"]
    os.truncate(path, kept_bytes)
    return seconds
