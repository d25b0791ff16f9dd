"""What is made ahead: the same things in the same order, errors included, and no thread left."""

import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.runtime.prefetch import prefetch


def threads() -> list[str]:
    """The names of the threads of `prefetch`."""
    return [thread.name for thread in threading.enumerate() if thread.name == "prefetch"]


@given(st.lists(st.integers() | st.none()), st.integers(1, 5))
def test_nothing_is_lost_or_moved(items: list[int | None], num_ahead: int) -> None:
    assert list(prefetch(iter(items), num_ahead)) == items
    assert not threads()


@pytest.mark.parametrize("num_ahead", [1, 3])
def test_only_so_many_are_made_ahead(num_ahead: int) -> None:
    made: list[int] = []

    def make() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    ahead = prefetch(make(), num_ahead)
    for taken in range(1, 20):
        assert next(ahead) == taken - 1
        give_up_at = time.monotonic() + 5
        while len(made) < taken + num_ahead and time.monotonic() < give_up_at:
            time.sleep(0.001)
        assert len(made) == taken + num_ahead
    time.sleep(0.02)
    assert len(made) == 19 + num_ahead
    ahead.close()
    assert not threads()


def test_an_error_comes_after_what_was_made_before_it_and_keeps_its_traceback() -> None:
    def make() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("the third")

    taken: list[int] = []
    with pytest.raises(ValueError, match="the third") as caught:
        for number in prefetch(make(), 10):
            taken.append(number)
    assert taken == [1, 2] and not threads()
    assert caught.traceback[-1].name == "make"


@pytest.mark.parametrize("is_exhausted", [False, True])
def test_the_thread_ends_with_the_loop_that_is_left(is_exhausted: bool) -> None:
    def make() -> Iterator[int]:
        yield from range(3 if is_exhausted else 10**9)

    for number in prefetch(make(), 2):
        if number == 1:
            break
    assert not threads(), "dropped, it is closed"


def test_what_is_made_is_told_to_end() -> None:
    is_closed = threading.Event()

    def make() -> Iterator[int]:
        try:
            yield from range(10**9)
        finally:
            is_closed.set()

    ahead = prefetch(make(), 2)
    next(ahead)
    ahead.close()
    assert is_closed.is_set()
