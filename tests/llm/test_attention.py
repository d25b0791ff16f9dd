"""Eager attention equals its formula, computed query by query and head by head."""

import math
from dataclasses import replace

import pytest
import torch

from llm.model.attention import eager_attention, soft_cap, window_of
from tests.llm.training_setup import TINY

B, H, K, T, S, D = 2, 4, 2, 5, 7, 6


@pytest.mark.parametrize("cap", [0.0, 1.5])
def test_each_query_gets_the_values_weighted_by_its_softmax(cap: float) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(B, heads, n, D, generator=generator) for heads, n in ((H, T), (K, S), (K, S))
    )
    mask = torch.rand(B, 1, T, S, generator=generator) < 0.6
    mask[..., 0] = True  # every query attends to something
    found = eager_attention(q, k, v, mask=mask, cap=cap)
    for b, h, t in ((b, h, t) for b in range(B) for h in range(H) for t in range(T)):
        shared = h // (H // K)
        allowed = [s for s in range(S) if mask[b, 0, t, s]]
        scores = [float(q[b, h, t] @ k[b, shared, s]) / math.sqrt(D) for s in allowed]
        if cap:
            scores = [cap * math.tanh(score / cap) for score in scores]
        total = sum(map(math.exp, scores))
        expected = sum(
            math.exp(score) / total * v[b, shared, s]
            for score, s in zip(scores, allowed, strict=True)
        )
        torch.testing.assert_close(found[b, h, t], expected, rtol=1e-5, atol=1e-6)


def test_dropout_zeroes_probabilities_and_scales_the_rest() -> None:
    q, k, v = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1000, 2), torch.ones(1, 1, 1000, 2)
    torch.manual_seed(0)
    mask = torch.ones(1, 1, 1, 1000, dtype=torch.bool)
    found = eager_attention(q, k, v, 0.5, mask=mask)
    # kept with probability 1/2, times 2: mean 1, deviation 1 / sqrt(1000) = 0.03
    assert float(found.mean()) == pytest.approx(1.0, abs=0.13)
    assert float(found.mean()) != 1.0


def test_a_soft_cap_bounds_large_numbers_and_keeps_small_ones() -> None:
    x = torch.tensor([-1e4, -0.01, 0.0, 0.01, 1e4])
    found = soft_cap(x, 2.0)
    torch.testing.assert_close(
        found, torch.tensor([-2.0, -0.01, 0.0, 0.01, 2.0]), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(
    ("every", "windows"), [(0, [5] * 6), (1, [0] * 6), (2, [5, 0] * 3), (3, [5, 5, 0] * 2)]
)
def test_the_last_layer_of_each_group_has_no_window(every: int, windows: list[int]) -> None:
    config = replace(TINY, num_layers=6, sliding_window=5, full_attention_every=every)
    assert [window_of(config, layer) for layer in range(6)] == windows
