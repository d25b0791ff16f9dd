"""RMSNorm in fewer passes over memory than its formula takes.

N  positions, flattened    C  normalized width
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F


def fused_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `rms_norm` of llm/model/norms.py over the last axis of (..., C)."""
    weight = weight.float()
    if x.device.type == "cpu":
        return cast(Tensor, _RMSNorm.apply(x, weight, eps))
    return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """For CPUs: torch makes a pass for each operation of the formula there, which for
    (16, 256, 256) took three times as long (docs/log.md).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return x / rms(x) * weight, with rms(x) = sqrt(mean(x^2) + eps)."""
        wide = x.float()
        # vector_norm squares and sums in one pass and stores no (..., C) of squares
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_() / x.shape[-1]
        scale = mean_square.add_(eps).rsqrt_()  # (..., 1)
        # x and one number a position are enough for backward: n is made again there
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        """With n = x / rms(x) and g the gradient of n: (g - n mean(g n)) / rms(x)."""
        x, weight, scale = ctx.saved_tensors
        normalized, grad_output = x.float() * scale, grad_outputs[0].float()
        products = (grad_output * normalized).flatten(0, -2)  # (..., C) -> (N, C)
        # one product for sum(g n) = sum(grad_output * weight * n): no (N, C) in between
        means = (products @ weight).view(scale.shape) / x.shape[-1]  # (..., 1)
        x_grad = torch.addcmul(grad_output * weight, normalized, means, value=-1).mul_(scale)
        return x_grad.to(x.dtype), products.sum(dim=0), None
