"""Paired comparison of models on the same items: difference, interval, p-value and verdict.

Both models answer the same items, so that the difficulty of an item cancels in its difference.

- The interval is that of the BCa bootstrap over items, 95 % (Efron 1987,
  doi:10.1080/01621459.1987.10478410). Unlike the percentile interval it corrects for bias and
  skew, which long documents cause.
- The p-value is two-sided, of the hypothesis that exchanging the two models changes nothing. If
  every item is right or wrong, it is that of McNemar's exact test (1947, doi:10.1007/BF02295996).
  Else each item's outcomes are exchanged at random: a sign-flip test, which unlike a test by
  bootstrap holds its level with few items (for language models: Dror et al. 2018,
  doi:10.18653/v1/P18-1128). McNemar's test is the same test, with all exchanges counted.
- The verdict is `better` or `worse` where p is below 5 % after Holm's correction (1979,
  jstor.org/stable/4615733) for all metrics and models compared at once.

What varies here is the choice of the items. Two models that differ in the seed of their training
only are two models: with enough items, a test can tell one from the other. To compare two recipes,
train each with several seeds.

Shapes: N items of both models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from llm.evaluation.items import Items, ModelItems
from llm.evaluation.report import Comparison, Difference, Verdict, rounded

SEED = 1
LEVEL = 0.05
NUM_RESAMPLES = 2_000  # as DiCiccio and Efron 1996, doi:10.1214/ss/1032280214, for BCa intervals
NUM_EXCHANGES = 9_999  # p-values as small as 0.0001
MIN_ITEMS = 2  # one has no spread
RESAMPLED_PER_BATCH = 1 << 14  # items: 128 KiB of indices, which stay in the cache
EXCHANGED_PER_BATCH = 1 << 22  # items: 4 MiB as bytes, 32 MiB as float64
ROUNDING = 1e-12  # of sums in another order; equal sums must count as equal

Floats = npt.NDArray[np.float64]


def compare_models(
    models: Mapping[str, ModelItems], pairs: Sequence[tuple[str, str]]
) -> list[Comparison]:
    """Compare pairs (a, b) of models, given by their names, on each metric that both have."""
    compared = [_compare(models, a, b) for a, b in pairs]
    measured = [found for one in compared for found in one.metrics.values()]
    corrected = iter(holm([found.p_value for found in measured]))
    return [
        replace(
            one,
            metrics={
                name: _with_verdict(found, next(corrected), models[one.a][name].higher_is_better)
                for name, found in one.metrics.items()
            },
        )
        for one in compared
    ]


def compare_paired(a: Floats, b: Floats, denominators: Floats) -> Difference:
    """Compare numerators (N,) over common denominators (N,); without correction or verdict."""
    differences, total = b - a, denominators.sum()
    is_binary = bool((denominators == 1).all() and np.isin([a, b], (0, 1)).all())
    p_value = mcnemar(differences) if is_binary else sign_flip_test(differences)
    low, high = bca_interval(differences, denominators)
    return Difference(
        a=rounded(float(a.sum() / total)),
        b=rounded(float(b.sum() / total)),
        difference=rounded(float(differences.sum() / total)),
        interval=(rounded(low), rounded(high)),
        p_value=rounded(p_value),
        p_holm=p_value,
        verdict="not distinguishable",
        num_items=len(a),
        num_unpaired=0,
    )


def bca_interval(numerators: Floats, denominators: Floats) -> tuple[float, float]:
    """Return the 95 % BCa bootstrap interval of the ratio of two sums over items (N,) each."""
    N = len(numerators)
    generator = np.random.default_rng(SEED)
    value = numerators.sum() / denominators.sum()
    resampled = np.empty(NUM_RESAMPLES)
    batch_size = max(1, RESAMPLED_PER_BATCH // N)
    for start in range(0, NUM_RESAMPLES, batch_size):
        rows = min(batch_size, NUM_RESAMPLES - start)
        chosen = generator.integers(0, N, (rows, N))
        sums = numerators[chosen].sum(axis=1), denominators[chosen].sum(axis=1)  # (rows,) each
        resampled[start : start + rows] = sums[0] / sums[1]
    normal = NormalDist()
    below = ((resampled < value).mean() + (resampled <= value).mean()) / 2  # ties count half
    bias = normal.inv_cdf(min(max(below, 1 / NUM_RESAMPLES), 1 - 1 / NUM_RESAMPLES))
    # the jackknife: the ratio without each item
    without = (numerators.sum() - numerators) / (denominators.sum() - denominators)  # (N,)
    deviations = without.mean() - without
    spread = float((deviations**2).sum())
    acceleration = float((deviations**3).sum()) / (6 * spread**1.5) if spread else 0.0

    def level(z: float) -> float:
        shifted = bias + z
        return normal.cdf(bias + shifted / (1 - acceleration * shifted))

    z = normal.inv_cdf(1 - LEVEL / 2)
    low, high = np.quantile(resampled, [level(-z), level(z)])
    return float(low), float(high)


def sign_flip_test(differences: Floats) -> float:
    """Return the share of random exchanges whose sum is at least as far from zero as the sum found.

    The sum found counts as one of them, so that the test is valid with any number of exchanges
    (Phipson and Smyth 2010, arXiv:1603.05766).
    """
    N, total = len(differences), differences.sum()
    generator = np.random.default_rng(SEED)
    at_least = abs(total) - ROUNDING * np.abs(differences).sum()
    batch_size = max(1, EXCHANGED_PER_BATCH // N)
    num_bytes = (N + 7) // 8
    count = 0
    for start in range(0, NUM_EXCHANGES, batch_size):
        rows = min(batch_size, NUM_EXCHANGES - start)
        bits = np.frombuffer(generator.bytes(rows * num_bytes), dtype=np.uint8)
        is_exchanged = np.unpackbits(bits.reshape(rows, num_bytes), axis=1, count=N)  # (rows, N)
        count += int((np.abs(total - 2 * (is_exchanged @ differences)) >= at_least).sum())
    return (count + 1) / (NUM_EXCHANGES + 1)


def mcnemar(differences: Floats) -> float:
    """Return the exact two-sided p-value of right against wrong answers: differences of -1, 0, 1.

    Items on which the models differ are fair coins; p = 2 P(Binomial(n, 1/2) <= the rarer side).
    """
    num_better, num_worse = int((differences > 0).sum()), int((differences < 0).sum())
    n, rarer = num_better + num_worse, min(num_better, num_worse)
    i = np.arange(1, rarer + 1)
    log_binomials = np.concatenate([[0.0], np.cumsum(np.log((n - i + 1) / i))])  # of 0 .. rarer
    return min(1.0, 2 * float(np.exp(log_binomials - n * np.log(2)).sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number, in the same order."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def _compare(models: Mapping[str, ModelItems], a: str, b: str) -> Comparison:
    """Compare two models, without correction and verdicts."""
    metrics: dict[str, Difference] = {}
    notes: list[str] = []
    for name in dict.fromkeys([*models[a], *models[b]]):
        if missing := [model for model in (a, b) if name not in models[model]]:
            notes.append(f"{name}: not measured on {missing[0]}")
            continue
        found = _compare_items(models[a][name], models[b][name])
        if isinstance(found, str):
            notes.append(f"{name}: not compared, {found}")
        else:
            metrics[name] = found
    return Comparison(a=a, b=b, metrics=metrics, notes=tuple(notes))


def _compare_items(a: Items, b: Items) -> Difference | str:
    """Compare the items of both models, or say why that cannot be."""
    indices = {one: index for index, one in enumerate(a.ids)}
    pairs = [(indices[one], index) for index, one in enumerate(b.ids) if one in indices]
    if len(pairs) < MIN_ITEMS:
        return f"{len(pairs)} items in common"
    of_a, of_b = np.array(sorted(pairs)).T
    denominators = a.denominators[of_a]
    if num_other := int((denominators != b.denominators[of_b]).sum()):
        return (
            f"{num_other:,} of {len(pairs):,} items do not count as much for both: another"
            " tokenizer, or other masks"
        )
    found = compare_paired(a.numerators[of_a], b.numerators[of_b], denominators)
    return replace(found, num_unpaired=len(a.ids) + len(b.ids) - 2 * len(pairs))


def _with_verdict(found: Difference, p_holm: float, higher_is_better: bool) -> Difference:
    verdict: Verdict = "not distinguishable"
    if p_holm < LEVEL:
        verdict = "better" if (found.difference > 0) == higher_is_better else "worse"
    return replace(found, p_holm=p_holm, verdict=verdict)
