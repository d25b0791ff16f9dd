"""Linear layers: the matrix products that are nearly all of a model's work.

torch multiplies fp32 matrices on a CPU by MKL, which leaves the widest units of other makers'
processors idle. oneDNN, which torch has as well and takes for 16 bits, uses them: on a Zen 5 it
took half the time, forward and backward (docs/log.md).

Shapes: N positions in a line, I inputs and O outputs of a layer.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Products below this have too little work to win back what oneDNN takes to start, 17 us.
MIN_MULTIPLICATIONS = 1 << 20


class Linear(nn.Linear):
    """x W^T + b, by the quickest way there is."""

    def forward(self, input: Tensor) -> Tensor:
        """Multiply (..., I) -> (..., O)."""
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + b: (..., I), (O, I) and (O,) -> (..., O)."""
    is_own = not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))
    if is_own and _is_for_onednn(x, weight):
        return cast(Tensor, _Linear.apply(x, weight, bias))
    return F.linear(x, weight, bias)


def product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the same for left (..., I) and right (O, I), without a gradient: -> (..., O).

    Where they are no whole tensors they are copied; the right one may be a transposed one.
    """
    if _is_for_onednn(left, right):
        if not right.T.is_contiguous():  # of a part of a tensor oneDNN is a hundred times slower
            right = right.contiguous()
        return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
    return F.linear(left, right, bias)


def transposed_product(left: Tensor, right: Tensor) -> Tensor:
    """Return left (N, O)^T x right (N, I) -> (O, I), without a gradient."""
    if not _is_for_onednn(left.T, right.T):
        return left.T @ right
    if left.shape[1] < right.shape[1] or not left.is_contiguous():  # the narrower is copied
        return product(left.T.contiguous(), right.T)
    return product(right.T.contiguous(), left.T).T


class _Linear(torch.autograd.Function):
    """The same as F.linear, by `product`, which knows no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return (..., O)."""
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator's typing)
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of x, the weight and the bias, each if it is asked for."""
        x, weight = ctx.saved_tensors
        [gradient] = gradients
        of_x = product(gradient, weight.T) if ctx.needs_input_grad[0] else None
        lines = gradient.reshape(-1, len(weight))  # (..., O) -> (N, O)
        x = x.reshape(-1, weight.shape[1])  # (..., I) -> (N, I)
        of_weight = transposed_product(lines, x) if ctx.needs_input_grad[1] else None
        of_bias = lines.sum(dim=0) if ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias


def _is_for_onednn(left: Tensor, right: Tensor) -> bool:
    return (
        left.dtype == right.dtype == torch.float32
        and left.device.type == "cpu"
        and left.numel() * len(right) >= MIN_MULTIPLICATIONS
        and torch.backends.mkldnn.is_available()
    )
