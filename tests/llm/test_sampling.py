"""Sampling filters: each keeps the right tokens, and all agree with transformers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from llm.inference.options import GenerationOptions
from llm.inference.sampling import (
    draw,
    filter_logits,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
)

FINITE = st.floats(-30, 30, width=32)
ROWS = st.integers(1, 12).flatmap(lambda size: arrays("float32", (2, size), elements=FINITE))
LOGITS = ROWS.map(torch.from_numpy)
SHARES = st.floats(0.01, 1.0)


def check_kept(logits: Tensor, kept: Tensor) -> None:
    """Kept logits are unchanged, include the largest, and no removed one is larger."""
    is_in = kept > -torch.inf
    assert torch.equal(kept[is_in], logits[is_in])
    for row, row_in in zip(logits, is_in, strict=True):
        assert row_in[row.argmax()]
        if not row_in.all():
            assert row[row_in].min() >= row[~row_in].max()


@given(LOGITS, st.integers(1, 15))
def test_top_k_keeps_k_and_ties_with_the_last(logits: Tensor, k: int) -> None:
    kept = keep_top_k(logits, k)
    check_kept(logits, kept)
    for row, kept_row in zip(logits, kept, strict=True):
        least = row.sort(descending=True).values[min(k, len(row)) - 1]
        assert int((kept_row > -torch.inf).sum()) == int((row >= least).sum())


@given(LOGITS, SHARES)
def test_top_p_keeps_the_fewest_that_reach_p(logits: Tensor, p: float) -> None:
    kept = keep_top_p(logits, p)
    check_kept(logits, kept)
    for chances, row in zip(logits.double().softmax(-1), kept, strict=True):
        mine = chances[row > -torch.inf]
        assert mine.sum() >= p - 1e-9
        assert len(mine) == 1 or mine.sum() - mine.min() < p + 1e-9  # one fewer would not do


@given(LOGITS, SHARES)
def test_min_p_keeps_tokens_by_their_share_of_the_top_probability(logits: Tensor, p: float) -> None:
    kept = keep_min_p(logits, p)
    check_kept(logits, kept)
    for chances, row in zip(logits.double().softmax(-1), kept, strict=True):
        share = chances / chances.max()
        is_in = row > -torch.inf
        assert (share[is_in] >= p * (1 - 1e-5)).all()  # logits near 30 are known to 2e-6
        assert (share[~is_in] <= p * (1 + 1e-5)).all()


@given(LOGITS, st.floats(0.1, 10), st.data())
def test_a_penalty_makes_seen_tokens_less_probable_and_keeps_the_rest(
    logits: Tensor, penalty: float, data: st.DataObject
) -> None:
    flags = data.draw(arrays("bool", tuple(logits.shape)))
    is_seen = torch.from_numpy(flags)
    found = penalize_repetition(logits, is_seen, penalty)
    assert torch.equal(found[~is_seen], logits[~is_seen])
    if penalty >= 1:
        assert (found[is_seen] <= logits[is_seen]).all()
    else:
        assert (found[is_seen] >= logits[is_seen]).all()


@given(LOGITS)
def test_options_at_their_defaults_filter_nothing(logits: Tensor) -> None:
    assert torch.equal(filter_logits(logits, GenerationOptions(temperature=1.0), None), logits)
    assert torch.equal(keep_top_k(logits, 99), logits)


@given(LOGITS, st.floats(0, 1))
def test_a_token_that_was_filtered_out_is_never_drawn(logits: Tensor, number: float) -> None:
    kept = keep_top_k(logits, 2)
    chosen = draw(kept, torch.full((2,), number))
    assert (kept.gather(1, chosen[:, None]) > -torch.inf).all()


@given(LOGITS, st.floats(0.1, 5))
def test_drawing_inverts_the_cumulative_distribution(logits: Tensor, temperature: float) -> None:
    chances = (
        filter_logits(logits, GenerationOptions(temperature=temperature), None).double().softmax(-1)
    )
    ends = chances.cumsum(-1)
    for token in range(logits.shape[1]):
        middle = (ends[:, token] - chances[:, token] / 2) / ends[:, -1]
        for row in range(2):
            if chances[row, token] > 1e-6:  # the number is an fp32
                found = draw((logits / temperature)[row : row + 1], middle[row : row + 1].float())
                assert int(found) == token


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 7},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 2.0, "min_p": 0.2},
        {"temperature": 0.9, "repetition_penalty": 1.7},
        {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_filters_are_those_of_transformers(settings: dict[str, float]) -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 40, generator=generator) * 3
    text = torch.randint(0, 40, (5, 9), generator=generator)
    theirs = {
        "repetition_penalty": process.RepetitionPenaltyLogitsProcessor,
        "temperature": process.TemperatureLogitsWarper,
        "top_k": process.TopKLogitsWarper,
        "top_p": process.TopPLogitsWarper,
        "min_p": process.MinPLogitsWarper,
    }
    expected = logits.clone()
    for name, make in theirs.items():
        if name in settings:
            expected = make(settings[name])(text, expected)
    is_seen = None
    if "repetition_penalty" in settings:
        is_seen = torch.zeros(5, 40, dtype=torch.bool).scatter(1, text, True)
    found = filter_logits(logits, GenerationOptions(**settings), is_seen)  # type: ignore[arg-type]
    assert torch.equal(found > -torch.inf, expected > -torch.inf)
    torch.testing.assert_close(found, expected)  # one rounding in each step of both
