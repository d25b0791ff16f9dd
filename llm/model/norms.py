"""Normalization: keep the vectors at one size, however many blocks add to the residual stream.

C  model width, or the width D of a head
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.config import ModelConfig
from llm.model.kernels.norms import fused_rms_norm


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in fp32.

    Source: "Root Mean Square Layer Normalization" (arXiv 1910.07467): LayerNorm without centering,
    which the paper finds dispensable.
    """
    wide = x.float()  # a sum of C squares in bf16, with its 8 bits, would stop growing early
    mean_square = wide.square().mean(dim=-1, keepdim=True)  # (..., C) -> (..., 1)
    return (wide * torch.rsqrt(mean_square + eps) * weight.float()).to(x.dtype)


class RMSNorm(nn.Module):
    """Scale each vector to a root mean square of 1, then each channel by a learned weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))  # starts as normalization alone
        self.eps = eps  # keeps 1 / rms finite for a vector of zeros

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (..., C) over its last axis."""
        return fused_rms_norm(x, self.weight, self.eps)  # kernel: equals rms_norm above


class LayerNorm(nn.Module):
    """Center each vector, scale it to variance 1, then each channel by a learned weight.

    Source: "Layer Normalization" (arXiv 1607.06450).
    """

    def __init__(self, width: int, eps: float, has_bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if has_bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (..., C) over its last axis."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


NORMS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "rmsnorm": lambda config: RMSNorm(config.d_model, config.norm_eps),
    "layernorm": lambda config: LayerNorm(config.d_model, config.norm_eps, config.has_biases),
}
