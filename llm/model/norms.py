"""Normalization: what keeps vectors at one size, however many parts add to them.

C model width, or the width D of a head.
"""

from collections.abc import Callable
from typing import Any, cast

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
        if x.device.type == "cpu":
            return cast(Tensor, _RMSNorm.apply(x, weight, self.eps))
        return F.rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """The same in fewer passes: on a CPU torch takes one for each operation of the formula, which
    for (16, 256, 256) was three times as long (docs/log.md).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return x / rms(x) * weight, with rms(x) = sqrt(mean(x^2) + eps)."""
        wide = x.float()
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_() / x.shape[-1]
        scale = mean_square.add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """With n = x / rms(x) and g the gradient of n: (g - n mean(g n)) / rms(x)."""
        x, weight, scale = ctx.saved_tensors
        normal, gradient = x.float() * scale, gradients[0].float()
        products = (gradient * normal).flatten(0, -2)  # (..., C) -> (N, C)
        means = (products @ weight).view(scale.shape) / x.shape[-1]  # (..., 1)
        of_x = torch.addcmul(gradient * weight, normal, means, value=-1).mul_(scale)
        return of_x.to(x.dtype), products.sum(dim=0), None


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
