"""Paired comparisons: the same numbers as brute force and scipy, and errors as rare as promised."""

import math
from itertools import product

import numpy as np
import pytest

from llm.evaluation.items import Items, make_items
from llm.evaluation.paired import (
    LEVEL,
    NUM_EXCHANGES,
    NUM_RESAMPLES,
    SEED,
    bca_interval,
    compare_models,
    compare_paired,
    holm,
    mcnemar,
    sign_flip_test,
)
from llm.evaluation.report import Difference

NUM_PAIRS = 100


def documents(
    generator: np.random.Generator, count: int, gap: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bits of two models on documents, and their bytes. Long and hard documents are so for both.

    The models differ as two seeds do, by chance on each document, and by `gap` bits per byte.
    """
    num_bytes = np.ceil(np.exp(generator.normal(6, 1, count)))
    hardness = np.exp(generator.normal(0.3, 0.3, count))
    a, b = (num_bytes * hardness * np.exp(generator.normal(0, 0.05, count)) for _ in range(2))
    return a, b + gap * num_bytes, num_bytes


def answers(generator: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Right and wrong answers of two models to questions that are as hard for both."""
    chance = generator.beta(0.5, 0.5, count)
    a, b = ((generator.random(count) < chance).astype(np.float64) for _ in range(2))
    return a, b


def models_of(generator: np.random.Generator, count: int) -> dict[str, dict[str, Items]]:
    """Items of two models that differ by chance only."""
    ids = [f"{index}" for index in range(count)]
    *bits, num_bytes = documents(generator, count)
    right = answers(generator, count)
    return {
        name: {
            "bits_per_byte": make_items(ids, bits[index], num_bytes),
            "exact_match": make_items(ids, right[index], higher_is_better=True),
        }
        for index, name in enumerate(("a", "b"))
    }


def test_interval_and_verdict_equal_a_brute_force_bootstrap() -> None:
    a, b, num_bytes = documents(np.random.default_rng(3), 60, gap=-0.02)
    generator = np.random.default_rng(SEED)
    resampled: list[float] = []
    for _ in range(NUM_RESAMPLES):
        chosen = generator.integers(0, 60, 60)
        value = sum(b[i] - a[i] for i in chosen) / sum(num_bytes[i] for i in chosen)
        resampled.append(float(value))
    resampled.sort()
    found = compare_paired(a, b, num_bytes)
    low, high = found.interval
    # BCa takes other quantiles than 2.5 % and 97.5 %, and leaves 5 % outside all the same
    inside = [low <= value <= high for value in resampled]
    assert abs(np.mean(inside) - 0.95) < 0.02
    percentile = np.quantile(resampled, [0.025, 0.975])
    assert np.allclose([low, high], percentile, atol=0.15 * (percentile[1] - percentile[0]))
    share = min(np.mean(np.array(resampled) >= 0), np.mean(np.array(resampled) <= 0))
    assert (found.p_value < LEVEL) == (2 * share < LEVEL) == (not low <= 0 <= high)
    assert found.difference == pytest.approx((b.sum() - a.sum()) / num_bytes.sum(), rel=1e-5)


@pytest.mark.parametrize("count", [8, 60, 400])
@pytest.mark.parametrize("gap", [0.0, -0.02])
def test_the_interval_is_that_of_scipy_on_the_same_resamples(count: int, gap: float) -> None:
    stats = pytest.importorskip("scipy.stats", reason="an oracle, no dependency")
    a, b, num_bytes = documents(np.random.default_rng(count), count, gap)

    def ratio(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        return x.sum(axis=axis) / y.sum(axis=axis)

    theirs = stats.bootstrap(
        (b - a, num_bytes),
        ratio,
        paired=True,
        n_resamples=NUM_RESAMPLES,
        method="BCa",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    assert bca_interval(b - a, num_bytes) == pytest.approx((theirs.low, theirs.high), rel=1e-9)


def test_models_that_answer_alike_have_an_interval_of_zero() -> None:
    found = compare_paired(np.ones(5), np.ones(5), np.full(5, 3.0))
    assert (found.difference, found.interval, found.p_value) == (0.0, (0.0, 0.0), 1.0)


@pytest.mark.parametrize("count", [2, 5, 12])
def test_the_sign_flip_test_is_near_the_count_of_all_exchanges(count: int) -> None:
    differences = np.random.default_rng(count).normal(0.5, 1, count)
    sums = [abs(np.dot(signs, differences)) for signs in product((-1, 1), repeat=count)]
    exact = np.mean(np.array(sums) >= abs(differences.sum()) - 1e-9)
    # four standard errors of a share of NUM_EXCHANGES trials
    near = 4 * math.sqrt(exact * (1 - exact) / NUM_EXCHANGES) + 1 / NUM_EXCHANGES
    assert sign_flip_test(differences) == pytest.approx(exact, abs=near)


@pytest.mark.parametrize(
    ("num_better", "num_worse"), [(0, 0), (1, 0), (6, 0), (3, 9), (40, 41), (700, 500)]
)
def test_mcnemar_is_the_sum_of_exact_binomials(num_better: int, num_worse: int) -> None:
    n, rarer = num_better + num_worse, min(num_better, num_worse)
    exact = min(1.0, 2 * sum(math.comb(n, k) for k in range(rarer + 1)) / 2**n)
    differences = np.array([1.0] * num_better + [-1.0] * num_worse + [0.0] * 7)
    assert mcnemar(differences) == pytest.approx(exact, rel=1e-9)
    near = 4 * math.sqrt(exact * (1 - exact) / NUM_EXCHANGES) + 1 / NUM_EXCHANGES
    assert sign_flip_test(differences) == pytest.approx(exact, abs=near), "the same test"


def test_right_and_wrong_answers_get_the_exact_test_and_all_else_the_sign_flip_test() -> None:
    a, b = answers(np.random.default_rng(1), 50)
    ones = np.ones(50)
    assert compare_paired(a, b, ones).p_value == pytest.approx(mcnemar(b - a), rel=1e-5)
    assert compare_paired(a, 0.5 * b, ones).p_value == sign_flip_test(0.5 * b - a)


def test_holm_multiplies_the_smallest_most_and_keeps_the_order() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_verdict_knows_which_way_is_better() -> None:
    generator = np.random.default_rng(1)
    ids = [f"{index}" for index in range(200)]
    low, high = generator.random(200), generator.random(200) + 0.5
    models = {
        name: {
            "loss": make_items(ids, values),
            "score": make_items(ids, values, higher_is_better=True),
        }
        for name, values in (("low", low), ("high", high))
    }
    up, down = compare_models(models, [("low", "high"), ("high", "low")])
    assert {name: found.verdict for name, found in up.metrics.items()} == {
        "loss": "worse",
        "score": "better",
    }
    assert {name: found.verdict for name, found in down.metrics.items()} == {
        "loss": "better",
        "score": "worse",
    }
    assert all(found.p_holm == 4 * found.p_value for found in up.metrics.values())


def test_items_are_paired_by_id_and_what_is_left_out_is_counted() -> None:
    a = make_items(["1", "2", "3", "4"], [1.0, 2.0, 3.0, 4.0], [1, 2, 3, 4])
    b = make_items(["9", "3", "1", "2"], [9.0, 5.0, 4.0, 3.0], [9, 3, 1, 2])
    (found,) = compare_models({"a": {"loss": a}, "b": {"loss": b}}, [("a", "b")])
    loss = found.metrics["loss"]
    assert (loss.a, loss.b, loss.difference) == (1.0, 2.0, 1.0)
    assert (loss.num_items, loss.num_unpaired) == (3, 2)


def test_what_cannot_be_compared_is_said() -> None:
    a = {
        "alone": make_items(["1"], [1.0]),
        "one": make_items(["1", "2"], [1.0, 2.0]),
        "tokens": make_items(["1", "2"], [1.0, 2.0], [4, 5]),
    }
    b = {
        "one": make_items(["2", "3"], [1.0, 2.0]),
        "tokens": make_items(["1", "2"], [1.0, 2.0], [4, 6]),
    }
    (found,) = compare_models({"a": a, "b": b}, [("a", "b")])
    assert not found.metrics
    assert found.notes == (
        "alone: not measured on b",
        "one: not compared, 1 items in common",
        "tokens: not compared, 1 of 2 items do not count as much for both: another tokenizer, or"
        " other masks",
    )


def test_models_that_differ_by_chance_are_rarely_called_better() -> None:
    verdicts: list[str] = []
    uncorrected: list[Difference] = []
    for seed in range(NUM_PAIRS):
        models = models_of(np.random.default_rng([7, seed]), 150)
        (found,) = compare_models(models, [("a", "b")])
        verdicts.append(" ".join(one.verdict for one in found.metrics.values()))
        uncorrected += found.metrics.values()
    assert sum("better" in verdict for verdict in verdicts) <= 0.05 * NUM_PAIRS
    # each test holds its level too: 2 * NUM_PAIRS tests, four standard errors
    assert sum(one.p_value < LEVEL for one in uncorrected) <= 10 + 4 * math.sqrt(9.5)
    assert any(one.p_value < LEVEL for one in uncorrected), "a test that never rejects says nothing"


def test_the_interval_covers_the_true_difference() -> None:
    num_trials, covered = 200, 0
    everything = documents(np.random.default_rng(11), 100_000, gap=-0.01)
    true = (everything[1].sum() - everything[0].sum()) / everything[2].sum()
    for seed in range(num_trials):
        chosen = np.random.default_rng([12, seed]).integers(0, 100_000, 150)
        a, b, num_bytes = (values[chosen] for values in everything)
        low, high = bca_interval(b - a, num_bytes)
        covered += low <= true <= high
    # 95 % within three standard errors; known to be a little low on skewed ratios
    assert 0.90 * num_trials <= covered <= 0.996 * num_trials
