"""The training curves: `metrics.jsonl`, one line a point, written here and cut back here.

{"step": 50, "tokens": 409600, "seconds": 31.2, "metrics": {"train/loss": 5.1, ...}}

And beside it, from the beginning of a training on, the size of its model.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from llm.artifact import write_json_atomically

SIZE = "size.json"
VALIDATION_PREFIX = "val/"
SECONDS_BETWEEN_WRITES = 0.2  # a small model does a hundred steps in that time


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
        self._started_at = self._written_at = time.perf_counter() - seconds
        self._unwritten: list[bytes] = []

    def append(self, step: int, tokens: int, metrics: Mapping[str, float]) -> None:
        """Add one point. Whoever follows the file sees it, at the latest, when the next is added
        SECONDS_BETWEEN_WRITES later.
        """
        now = time.perf_counter()
        seconds = round(now - self._started_at, 3)
        line = {"step": step, "tokens": tokens, "seconds": seconds, "metrics": dict(metrics)}
        self._unwritten.append(json.dumps(line, allow_nan=False).encode() + b"\n")
        if now - self._written_at >= SECONDS_BETWEEN_WRITES:
            self.write()

    def write(self) -> None:
        """Write the points added, for others to see: before anything that takes long."""
        if self._unwritten:
            with self._path.open("ab") as file:
                file.write(b"".join(self._unwritten))
            self._unwritten.clear()
        self._written_at = time.perf_counter()

    def make_durable(self) -> None:
        """Put the points on the disk itself: before a checkpoint that says they are there."""
        self.write()
        descriptor = os.open(self._path, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_num_parameters(work: Path, num_parameters: int) -> None:
    """Say in a work folder how large the model is that is trained there."""
    write_json_atomically(work / SIZE, {"num_parameters": num_parameters}, is_durable=False)


def read_num_parameters(work: Path) -> int | None:
    """Return what a training said of its model's size, or None before it did."""
    try:
        return int(json.loads((work / SIZE).read_bytes())["num_parameters"])
    except FileNotFoundError:
        return None


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
