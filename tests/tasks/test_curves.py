"""Points are read once, however the metrics file grows, is truncated or is rewritten."""

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from llm.monitoring.metrics import MetricsReader, Point
from tasks.tracking.curves import draw_losses


def line(step: int) -> bytes:
    point = {"step": step, "tokens": 8 * step, "seconds": step / 2, "metrics": {"train/loss": 1.0}}
    return json.dumps(point).encode() + b"\n"


def steps(points: list[Point]) -> list[int]:
    return [point.step for point in points]


@given(pieces=st.lists(st.integers(1, 40), max_size=30))
def test_a_file_written_in_any_pieces_is_read_once(
    tmp_path_factory: object, pieces: list[int]
) -> None:
    path = tmp_path_factory.mktemp("points") / "metrics.jsonl"  # type: ignore[attr-defined]
    whole = b"".join(line(step) for step in range(6))
    file, found = MetricsReader(path), list[int]()
    position = 0
    with path.open("wb", buffering=0) as writer:
        for piece in pieces:
            writer.write(whole[position : position + piece])
            position += piece
            found += steps(file.read_new())
        writer.write(whole[position:])
    found += steps(file.read_new())
    assert found == list(range(6))
    assert file.read_new() == []


def test_a_file_cut_back_and_written_on_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsReader(path)
    assert file.read_new() == []
    path.write_bytes(line(1) + line(2) + line(3))
    assert steps(file.read_new()) == [1, 2, 3]
    path.write_bytes(line(1) + line(20) + line(30) + line(40))
    assert steps(file.read_new()) == [1, 20, 30, 40]
    path.write_bytes(line(1))
    assert steps(file.read_new()) == [1]


def test_a_line_that_is_no_point_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + b"nonsense\n[]\n{}\n" + line(2))
    assert steps(MetricsReader(path).read_new()) == [1, 2]


def test_second_zero_is_told_by_when_the_file_was_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(10))
    file = MetricsReader(path)
    file.read_new()
    assert abs(file.started_at_ms + 5000 - path.stat().st_mtime_ns / 1e6) <= 1


def test_the_plot_shows_both_losses_over_tokens() -> None:
    points = [
        Point(step=step, tokens=10 * step, seconds=1.0, metrics=metrics)
        for step, metrics in enumerate(
            [{"train/loss": 3.0}, {"train/loss": 2.0, "val/loss": 2.5}, {"learning_rate": 0.1}]
        )
    ]
    (axes,) = draw_losses(points, "tiny").axes
    shown = {drawn.get_label(): drawn.get_xydata().tolist() for drawn in axes.lines}
    assert shown == {"train/loss": [[0, 3], [10, 2]], "val/loss": [[10, 2.5]]}
    assert draw_losses([], "nothing was logged").axes
