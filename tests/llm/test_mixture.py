"""Mixtures: shares by tokens within one document, every document used, the same every time."""

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.config import ShareConfig
from llm.data.mixture import Size, SourceTally, mix
from llm.errors import DataError

Item = tuple[int, int, int]  # source, place in it, tokens
LENGTHS = st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=12), min_size=1, max_size=4)
WEIGHTS = st.lists(st.floats(0.1, 10), min_size=4, max_size=4)


def size_of(item: Item) -> Size:
    return Size(num_tokens=item[2], num_bytes=3 * item[2])


def run(
    lengths: list[list[int]], shares: list[ShareConfig]
) -> tuple[list[Item], list[SourceTally]]:
    tallies = [SourceTally() for _ in lengths]
    sources = [
        lambda number=number, found=found: iter(
            [(number, place, length) for place, length in enumerate(found)]
        )
        for number, found in enumerate(lengths)
    ]
    return list(mix(shares, sources, size_of, tallies)), tallies


@given(LENGTHS, WEIGHTS)
def test_at_every_point_shares_are_within_one_document_of_their_weights(
    lengths: list[list[int]], weights: list[float]
) -> None:
    shares = [ShareConfig(weight=weight) for weight, _ in zip(weights, lengths, strict=False)]
    items, _ = run(lengths, shares)
    given_tokens = [0] * len(lengths)
    longest = [max(found) for found in lengths]
    for number, _, length in items:
        given_tokens[number] += length
        least = min(n / share.weight for n, share in zip(given_tokens, shares, strict=True))
        for n, share, one in zip(given_tokens, shares, longest, strict=True):
            assert n <= share.weight * least * (1 + 1e-9) + one  # rounding of the division


@given(LENGTHS, WEIGHTS)
def test_every_document_is_used_equally_often_but_for_one_reading_and_that_is_counted(
    lengths: list[list[int]], weights: list[float]
) -> None:
    shares = [ShareConfig(weight=weight) for weight, _ in zip(weights, lengths, strict=False)]
    items, tallies = run(lengths, shares)
    assert (items, tallies) == run(lengths, shares)
    for number, (found, tally) in enumerate(zip(lengths, tallies, strict=True)):
        places = [place for source, place, _ in items if source == number]
        expected = islice((place for _ in iter(int, 1) for place in range(len(found))), len(places))
        assert places == list(expected), "in order, and again in the same order"
        assert tally.num_documents == len(places) >= len(found) == tally.num_distinct_documents
        assert tally.num_tokens == sum(n for source, _, n in items if source == number)
    counts = Counter(source for source, _, _ in items)
    assert any(counts[number] == len(found) for number, found in enumerate(lengths))


def test_one_source_is_itself() -> None:
    items, tallies = run([[5, 6, 7]], [ShareConfig(weight=3)])
    assert [place for _, place, _ in items] == [0, 1, 2]
    assert tallies[0].num_epochs == 1


@pytest.mark.parametrize(
    ("caps", "num_used"),
    [
        ({"max_tokens": 10}, 2), ({"max_tokens": 14}, 2), ({"max_tokens": 15}, 3),
        ({"max_bytes": 30}, 2), ({"max_bytes": 29}, 1), ({"max_tokens": 15, "max_bytes": 15}, 1),
    ],
)  # fmt: skip
def test_a_cap_lets_the_first_documents_through_and_these_are_read_again(
    caps: dict[str, int], num_used: int
) -> None:
    items, tallies = run([[5, 5, 5, 5], [100]], [ShareConfig(**caps), ShareConfig()])
    assert {place for source, place, _ in items if source == 0} == set(range(num_used))
    assert tallies[0].num_distinct_documents == num_used
    assert 95 <= tallies[0].num_tokens <= 105
    assert tallies[0].num_epochs == pytest.approx(tallies[0].num_documents / num_used, abs=1e-3)


@pytest.mark.parametrize(("lengths", "cap"), [([], 0), ([5], 4)])
def test_a_source_that_gives_nothing_is_an_error_that_names_it(
    lengths: list[int], cap: int
) -> None:
    with pytest.raises(DataError, match=r"sources\.1: no document of it is left"):
        run([[1], lengths], [ShareConfig(), ShareConfig(max_tokens=cap)])
