"""Cross-entropy equals torch's and its formula, whatever dtype the logits are in."""

import pytest
import torch
from torch.nn import functional as F

from llm.model.kernels import cross_entropy
from llm.model.loss import IGNORED, ModelWithLoss, token_losses
from tests.llm.training_setup import tiny_model


@pytest.mark.parametrize("softmax_logits", [1, 97, 1 << 20], ids=["rows", "uneven", "whole"])
def test_losses_of_given_logits_equal_those_of_torch(
    softmax_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cross_entropy.SOFTMAX_LOGITS, "cpu", softmax_logits)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 40, generator=generator) * 4
    targets = torch.randint(0, 40, (3, 5), generator=generator)
    targets[1, 2:] = IGNORED
    found = token_losses(logits, targets)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(found, expected.view(3, 5))
    assert found[1, 2:].abs().max() == 0


def test_bfloat16_logits_are_summed_in_fp32() -> None:
    logits = (torch.randn(2, 4, 5000) * 3).bfloat16()
    targets = torch.randint(0, 5000, (2, 4))
    exact = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(
        token_losses(logits, targets).flatten().double(), exact, rtol=1e-6, atol=1e-6
    )


def test_a_loss_is_minus_the_logarithm_of_the_targets_probability() -> None:
    logits = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(1)) * 4
    targets = torch.tensor([[0, 39, 7], [1, 2, 3]])
    for b in range(2):
        for t in range(3):
            exponentials = logits[b, t].double().exp()
            expected = -(exponentials[targets[b, t]] / exponentials.sum()).log()
            assert float(token_losses(logits, targets)[b, t]) == pytest.approx(float(expected))


@pytest.mark.parametrize("soft_cap", [0.0, 3.0])
def test_a_temperature_divides_the_logits_after_their_cap(soft_cap: float) -> None:
    model = tiny_model(logit_soft_cap=soft_cap)
    tokens = torch.randint(0, 600, (2, 9), generator=torch.Generator().manual_seed(2))
    targets, weights = tokens[:, 1:].clone(), torch.linspace(-1, 1, 16).view(2, 8)
    targets[0, :3] = IGNORED
    found = ModelWithLoss(model)(tokens[:, :-1], targets, None, is_weighted=True, temperature=0.6)
    (found * weights).sum().backward()
    gradients = [weight.grad for weight in model.parameters()]
    model.zero_grad()
    expected = token_losses(model(tokens[:, :-1]) / 0.6, targets)
    (expected * weights).sum().backward()
    torch.testing.assert_close(found, expected)
    for gradient, weight in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-4, atol=1e-6)
