"""A number that is not finite on one rank changes nothing on any (promise 7)."""

from pathlib import Path

import pytest

from tests.chaos.poisoned_rank import POISONS, try_poisons

SOME = [
    poison
    for poison in POISONS
    if (poison.optimizer, poison.number) in {("adamw", "nan"), ("muon", "inf")}
]


@pytest.mark.distributed
def test_no_rank_changes_weights_or_optimizer_and_all_agree(tmp_path: Path) -> None:
    figure = try_poisons(SOME, tmp_path)
    assert not figure.failures
    assert figure.num_tried == len(SOME) == 16
