"""The permutation: a bijection, deterministic, and as random as a shuffle."""

from collections import Counter

import numpy as np
import pytest

from llm.data.permutation import MIN_HALF_BITS, NUM_ROUNDS, permute

WORD = (1 << 64) - 1


def mix(value: int) -> int:
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & WORD
    return value ^ (value >> 31)


def permute_one(index: int, size: int, seed: int) -> int:
    """The oracle: the same network in Python integers, one index at a time."""
    half_bits = MIN_HALF_BITS
    while 4**half_bits < size:
        half_bits += 1
    keys = [mix(number * (2 * seed + 1) & WORD) for number in range(1, NUM_ROUNDS + 1)]
    while True:
        left, right = divmod(index, 1 << half_bits)
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) % (1 << half_bits))
        index = (left << half_bits) + right
        if index < size:
            return index


SIZES = [*range(1, 70), 127, 128, 129, 255, 256, 257, 1000, 4095, 4096, 4097, 65_537]


@pytest.mark.parametrize("seed", [0, 1, 12345, (1 << 63) - 1])
def test_every_index_has_one_image(seed: int) -> None:
    for size in SIZES:
        assert np.array_equal(np.sort(permute(np.arange(size), size, seed)), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 5, 64, 100, 4097])
def test_it_equals_the_oracle_whatever_the_indices_come_with(size: int) -> None:
    expected = [permute_one(index, size, seed=7) for index in range(size)]
    assert permute(np.arange(size), size, 7).tolist() == expected
    assert [int(permute(index, size, 7)) for index in range(size)] == expected
    assert permute(np.arange(size)[::-1], size, 7).tolist() == expected[::-1]


def test_it_takes_sizes_that_no_memory_could_hold() -> None:
    size = (1 << 60) + 12345
    indices = np.array([0, 1, size - 1])
    assert permute(indices, size, 3).tolist() == [permute_one(i, size, 3) for i in indices.tolist()]


def test_the_shape_of_the_indices_is_kept() -> None:
    assert permute(np.arange(6).reshape(2, 3), 10, 1).shape == (2, 3)
    assert permute([], 10, 1).shape == (0,)
    assert permute(3, 10, 1).shape == ()


@pytest.mark.parametrize("size", [3, 10, 100])
def test_over_seeds_every_index_goes_everywhere_equally_often(size: int) -> None:
    num_seeds = 200 * size
    places = Counter(int(permute(1, size, seed)) for seed in range(num_seeds))
    chi_square = sum((places[place] - 200) ** 2 / 200 for place in range(size))
    # size - 1 degrees of freedom: mean size - 1, standard deviation sqrt(2 (size - 1)); the seeds
    # are fixed, so this is no matter of luck
    assert chi_square < (size - 1) + 4 * (2 * (size - 1)) ** 0.5


def test_neighbors_are_separated() -> None:
    size, trials = 10_000, np.arange(9_999)
    places = permute(np.arange(size), size, 5)
    correlation = np.corrcoef(places[trials], places[trials + 1])[0, 1]
    assert abs(correlation) < 0.04  # 4 / sqrt(10,000): four standard deviations of a shuffle's


def test_another_seed_gives_another_order() -> None:
    orders = {tuple(permute(np.arange(50), 50, seed).tolist()) for seed in range(100)}
    assert len(orders) == 100


@pytest.mark.parametrize("index", [-1, 10])
def test_indices_outside_are_refused(index: int) -> None:
    with pytest.raises(ValueError, match="expected 0 to 9"):
        permute([0, index], 10, 1)
