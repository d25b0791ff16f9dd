"""Normalization: what keeps vectors at one size, however many parts add to them.

C model width, or the width D of a head.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.config import ModelConfig


class RMSNorm(nn.Module):
    """Scale each position's vector to a root mean square of 1, then each channel by a learned
    weight.

    Source: "Root Mean Square Layer Normalization" (arXiv 1910.07467): LayerNorm without centering.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (..., C) over its last axis, in fp32 whatever x is in."""
        weight = self.weight.float()
        return F.rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """Center each position's vector, scale it to variance 1, then each channel by a learned weight.

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
