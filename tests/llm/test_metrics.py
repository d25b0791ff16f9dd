"""The metrics file: written in batches, read while it grows, truncated on resuming."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llm.monitoring import metrics
from llm.monitoring.metrics import SECONDS_BETWEEN_WRITES, MetricsReader, MetricsWriter, Point


class Clock:
    """A clock that a test turns."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the file under test."""
    made = Clock()
    monkeypatch.setattr(metrics, "time", made)
    return made


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_points_are_written_together_and_seen_within_a_moment(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsWriter(path, 0)
    for step in range(1, 5):
        clock.now += 0.3 * SECONDS_BETWEEN_WRITES
        file.append(step, 10 * step, {"train/loss": 1.0})
        assert steps_in(path) == ([] if step < 4 else [1, 2, 3, 4])
    file.append(5, 50, {"train/loss": 1.0})
    assert steps_in(path) == [1, 2, 3, 4]
    file.write()
    assert steps_in(path) == [1, 2, 3, 4, 5]
    last = json.loads(path.read_text().splitlines()[-1])
    assert last == {"step": 5, "tokens": 50, "seconds": 0.24, "metrics": {"train/loss": 1.0}}


def test_slow_steps_are_each_written_at_once(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsWriter(path, 0)
    for step in range(1, 4):
        clock.now += 1.0
        file.append(step, step, {})
        assert steps_in(path) == list(range(1, step + 1))


def test_what_a_checkpoint_covers_is_on_the_disk_and_what_follows_is_cut_back(
    tmp_path: Path, clock: Clock
) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsWriter(path, 0)
    file.append(1, 1, {"train/loss": 2.0})
    file.append(2, 2, {"train/loss": 1.5})
    file.make_durable()
    assert steps_in(path) == [1, 2]
    file.append(2, 2, {"val/loss": 1.0})
    file.append(3, 3, {"train/loss": 1.0})
    file.write()
    path.write_bytes(path.read_bytes() + b'{"step": 4, "tok')
    MetricsWriter(path, 2)
    assert steps_in(path) == [1, 2], "validation at the checkpoint's step is repeated"


def test_a_metric_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        MetricsWriter(tmp_path / "metrics.jsonl", 0).append(1, 1, {"train/loss": float("nan")})


def test_a_reader_returns_the_points_that_the_writer_wrote_and_a_repeated_step_anew(
    tmp_path: Path, clock: Clock
) -> None:
    path = tmp_path / "metrics.jsonl"
    reader = MetricsReader(path)
    assert reader.read_new() == []
    writer = MetricsWriter(path, 0)
    writer.append(1, 10, {"train/loss": 2.0})
    writer.append(2, 20, {"train/loss": 1.5})
    writer.write()
    first, _ = reader.read_new()
    assert first == Point(step=1, tokens=10, seconds=0.0, metrics={"train/loss": 2.0})
    assert reader.read_new() == []
    resumed = MetricsWriter(path, 1)
    resumed.append(2, 20, {"train/loss": 1.25})
    resumed.write()
    assert [point.step for point in reader.read_new()] == [1, 2], "rewritten, so all is new"


def test_following_a_training_loads_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, llm.monitoring.metrics; print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]
