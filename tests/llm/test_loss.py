"""The loss equals torch's cross-entropy, in value and in gradient."""

import pytest
import torch
from torch.nn import functional as F

from llm.model import loss
from llm.model.loss import IGNORED, token_losses


@pytest.mark.parametrize("chunk_logits", [1, 97, 1 << 20], ids=["rows", "uneven", "whole"])
def test_values_and_gradients_equal_those_of_torch(
    chunk_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loss.CHUNK_LOGITS, "cpu", chunk_logits)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 40, generator=generator) * 4
    targets = torch.randint(0, 40, (3, 5), generator=generator)
    targets[1, 2:] = IGNORED
    weights = torch.randn(3, 5, generator=generator)
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found = token_losses(mine, targets)
    expected = F.cross_entropy(theirs.flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(found, expected.view(3, 5))
    (found * weights).sum().backward()
    (expected.view(3, 5) * weights).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)
    assert found[1, 2:].abs().max() == 0
    assert mine.grad is not None and mine.grad[1, 2:].abs().max() == 0


def test_bfloat16_logits_lose_nothing_in_the_sum() -> None:
    logits = (torch.randn(2, 4, 5000) * 3).bfloat16()
    targets = torch.randint(0, 5000, (2, 4))
    exact = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(
        token_losses(logits, targets).flatten().double(), exact, rtol=1e-6, atol=1e-6
    )


def test_large_logits_stay_finite() -> None:
    logits = torch.full((1, 2, 4), -3e38)
    logits[..., 0] = 3e38
    losses = token_losses(logits, torch.tensor([[0, IGNORED]]))
    assert losses.tolist() == [[0.0, 0.0]]


def test_rows_without_a_target_give_no_nan() -> None:
    logits = torch.randn(1, 3, 4, requires_grad=True)
    losses = token_losses(logits, torch.full((1, 3), IGNORED))
    losses.sum().backward()
    assert losses.abs().max() == 0
    assert logits.grad is not None and logits.grad.abs().max() == 0
