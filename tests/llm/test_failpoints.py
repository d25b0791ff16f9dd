"""Failpoints: nothing without a plan, what is planned with one, once."""

import errno
import math
from collections.abc import Iterator

import pytest

from llm.runtime import failpoints
from llm.runtime.failpoints import arm, failpoint, reached


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    """Plan nothing before and after."""
    arm("")
    yield
    arm("")


def test_without_a_plan_a_failpoint_returns_what_it_was_given_and_counts_nothing() -> None:
    data = b"some bytes"
    assert failpoint("file.write", data) is data
    assert reached() == {}


def test_what_is_planned_happens_once_when_that_count_is_reached() -> None:
    arm("file.write:2=torn,file.sync=raise:ENOSPC")
    assert [failpoint("file.write", b"12345678") for _ in range(3)] == [
        b"12345678",
        b"1234",
        b"12345678",
    ]
    with pytest.raises(OSError, match="No space left") as caught:
        failpoint("file.sync")
    assert caught.value.errno == errno.ENOSPC
    failpoint("file.sync")
    assert reached() == {"file.write": 3, "file.sync": 2}


@pytest.mark.parametrize(("rank", "is_poisoned"), [("0", False), ("1", True)])
def test_a_plan_for_one_rank_leaves_the_others_alone(
    rank: str, is_poisoned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    arm("training.loss@1=nan")
    assert math.isnan(failpoint("training.loss", 2.0)) == is_poisoned


@pytest.mark.parametrize("text", ["file.write", "file.write=sleep", "file.write=raise:ENOSUCH"])
def test_a_plan_that_is_none_says_what_is_expected(text: str) -> None:
    with pytest.raises(ValueError, match=f"{failpoints.VARIABLE}: found '{text}', expected name"):
        arm(text)
