"""Whatever happens inside the save of a checkpoint, a valid one is left (promise 2)."""

from pathlib import Path

import pytest

from tests.chaos.checkpoint_saves import WIDTHS, full_disks, kills, points, torn_writes
from tests.chaos.counting import try_all


@pytest.mark.parametrize("make_cases", [kills, torn_writes, full_disks])
def test_a_save_that_is_cut_short_leaves_a_valid_checkpoint(make_cases, tmp_path: Path) -> None:
    found = points(tmp_path / "points", WIDTHS[0])
    cases = make_cases(found)
    figure = try_all("saves", cases, tmp_path)
    assert not figure.failures
    assert figure.num_tried == len(cases) > 3


def test_every_part_of_a_save_has_a_failpoint(tmp_path: Path) -> None:
    names = {point.name for point in points(tmp_path, WIDTHS[0])}
    assert names == {
        "file.write",
        "file.sync",
        "manifest.json.write",
        "manifest.json.rename",
        "checkpoint.rename",
        "checkpoint.renamed",
        "checkpoint.remove",
        "checkpoint.removing",
        "checkpoint.removed",
    }
