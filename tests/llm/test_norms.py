"""The norms equal their formulas."""

import pytest
import torch
from torch.nn import functional as F

from llm.model.norms import LayerNorm, rms_norm


def test_rms_norm_equals_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 3, 8, generator=generator), torch.randn(8, generator=generator)
    expected = x / torch.sqrt((x**2).mean(dim=-1, keepdim=True) + 1e-5) * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected)


def test_rms_norm_of_bfloat16_is_computed_in_fp32() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = F.rms_norm(x.float(), (64,), torch.ones(64), 1e-5).bfloat16()
    assert torch.equal(rms_norm(x, torch.ones(64), 1e-5), expected)


@pytest.mark.parametrize("has_bias", [False, True])
def test_layer_norm_equals_its_formula(has_bias: bool) -> None:
    norm = LayerNorm(8, 1e-3, has_bias)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    centered = x - x.mean(dim=-1, keepdim=True)
    variance = (centered**2).mean(dim=-1, keepdim=True)
    expected = centered / torch.sqrt(variance + 1e-3) * norm.weight
    expected = expected + norm.bias if norm.bias is not None else expected
    torch.testing.assert_close(norm(x), expected)
