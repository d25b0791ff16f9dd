"""The norms equal their formulas, on a CPU too, where one is written by hand."""

import pytest
import torch
from torch.nn import functional as F

from llm.model.norms import RMSNorm


@pytest.mark.parametrize("shape", [(2, 3, 8), (1, 4), (2, 2, 5, 16)])
def test_rms_norm_and_its_gradients_equal_torchs_own(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(shape[-1], 1e-5).double()
    with torch.no_grad():
        norm.weight.normal_()
    x = torch.randn(shape, requires_grad=True)
    theirs = x.detach().clone().requires_grad_()
    weight = norm.weight.detach().float().requires_grad_()
    expected = F.rms_norm(theirs, weight.shape, weight, 1e-5)
    gradient = torch.randn(shape)
    expected.backward(gradient)
    found = norm(x)
    found.backward(gradient)
    torch.testing.assert_close(found, expected)  # fp32, the same sums in another order
    torch.testing.assert_close(x.grad, theirs.grad)
    assert norm.weight.grad is not None
    torch.testing.assert_close(norm.weight.grad.float(), weight.grad)


def test_rms_norm_of_bfloat16_is_computed_in_fp32() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 64).bfloat16()
    expected = F.rms_norm(x.float(), (64,), torch.ones(64), 1e-5).bfloat16()
    assert torch.equal(RMSNorm(64, 1e-5)(x), expected)
