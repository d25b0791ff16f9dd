"""The fused RMSNorm equals the plain one and torch's, in value and gradients."""

import pytest
import torch
from torch.nn import functional as F

from llm.model.norms import RMSNorm, rms_norm


@pytest.mark.parametrize("shape", [(2, 3, 8), (1, 4), (2, 2, 5, 16)])
def test_values_and_gradients_equal_the_plain_norm_and_torchs(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(shape[-1], 1e-5).double()
    with torch.no_grad():
        norm.weight.normal_()
    x = torch.randn(shape, requires_grad=True)
    grad_output = torch.randn(shape)
    found = norm(x)
    found.backward(grad_output)
    assert norm.weight.grad is not None
    weight = norm.weight.detach().float()
    for plain in (rms_norm, lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps)):
        inputs = [each.detach().clone().requires_grad_() for each in (x, weight)]
        expected = plain(*inputs, 1e-5)
        expected.backward(grad_output)
        torch.testing.assert_close(found, expected)  # fp32, the same sums in another order
        torch.testing.assert_close(x.grad, inputs[0].grad)
        torch.testing.assert_close(norm.weight.grad.float(), inputs[1].grad)


def test_rms_norm_of_bfloat16_is_computed_in_fp32() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 64).bfloat16()
    expected = F.rms_norm(x.float(), (64,), torch.ones(64), 1e-5).bfloat16()
    assert torch.equal(RMSNorm(64, 1e-5)(x), expected)
