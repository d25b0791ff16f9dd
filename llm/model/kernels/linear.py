"""Linear layers by the fastest matrix product, and several of them as one product.

torch multiplies fp32 matrices on a CPU by MKL, which leaves the widest vector units of processors
not made by Intel idle. oneDNN, which torch also has and takes for 16 bits, uses them: on a Zen 5 it
took half the time, forward and backward (docs/log.md).

    N  positions, flattened    I  inputs of a layer    O  outputs
"""

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Below this a product is too small to win back the 17 us that oneDNN takes to start (docs/log.md).
MIN_MULTIPLICATIONS = 1 << 20


class LinearAdapter(Protocol):
    """What is trained beside a frozen linear layer: llm/model/lora.py."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return what is added to the layer's output: (..., I) -> (..., O)."""
        ...

    def product(self) -> Tensor:
        """Return what merging adds to the layer's weight, (O, I)."""
        ...


class Linear(nn.Linear):
    """nn.Linear, x W^T + b, by `linear`; plus the output of an adapter, if it has one."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.adapter: LinearAdapter | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Multiply (..., I) -> (..., O)."""
        output = linear(input, self.weight, self.bias)
        return output if self.adapter is None else output + self.adapter(input)

    def merged_weight(self) -> Tensor:
        """Return the weight (O, I) that alone gives this layer's output, dropout aside."""
        return self.weight if self.adapter is None else self.weight + self.adapter.product()


class JoinedLinear:
    """Linear layers with one input as one product; the weights stay those of the layers.

    One large product uses the processor better than three small ones and reads x once. Weights are
    concatenated at each call: they change at each step, and states keep one tensor per layer.
    """

    def __init__(self, parts: Sequence[Linear], has_biases: bool) -> None:
        self.parts, self._has_biases = tuple(parts), has_biases

    def merged_weight(self) -> Tensor:
        """Return the weights of all parts, adapters merged, in the order of parts."""
        return torch.cat([part.merged_weight() for part in self.parts])

    @property
    def bias(self) -> Tensor | None:
        """The biases of all parts, if they have any."""
        return torch.cat([part.bias for part in self.parts]) if self._has_biases else None

    def __call__(self, x: Tensor) -> Tensor:
        """Return the outputs side by side: (..., I) -> (..., sum of O)."""
        output = linear(x, torch.cat([part.weight for part in self.parts]), self.bias)
        if all(part.adapter is None for part in self.parts):
            return output
        # an adapter has products of its own: joined into the weight it would cost a gradient of W
        added = [
            output.new_zeros(*x.shape[:-1], part.out_features)
            if part.adapter is None
            else part.adapter(x)
            for part in self.parts
        ]
        return output + torch.cat(added, dim=-1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + b: (..., I), (O, I) and (O,) -> (..., O)."""
    # Inductor chooses products itself; autocast casts the arguments of F.linear, not of a Function
    is_own = not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))
    if is_own and _is_for_onednn(x, weight):
        return cast(Tensor, _Linear.apply(x, weight, bias))
    return F.linear(x, weight, bias)


def product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return left right^T + bias without a gradient: (..., I) and (O, I) -> (..., O)."""
    if _is_for_onednn(left, right):
        if not right.T.is_contiguous():  # on a slice oneDNN is a hundred times slower (docs/log.md)
            right = right.contiguous()
        # the operator that Inductor calls on CPUs; torch has no public name for it
        return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
    return F.linear(left, right, bias)


def transposed_product(left: Tensor, right: Tensor) -> Tensor:
    """Return left (N, O)^T x right (N, I) -> (O, I), without a gradient."""
    if not _is_for_onednn(left.T, right.T):
        return left.T @ right
    # one factor must be copied to be contiguous: the narrower, which is cheaper
    if left.shape[1] < right.shape[1] or not left.is_contiguous():
        return product(left.T.contiguous(), right.T)
    return product(right.T.contiguous(), left.T).T


class _Linear(torch.autograd.Function):
    """F.linear by `product`, for which torch knows no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return (..., O)."""
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator's typing)
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of x, weight and bias, each only where it is needed."""
        x, weight = ctx.saved_tensors
        [grad_output] = grad_outputs
        x_grad = product(grad_output, weight.T) if ctx.needs_input_grad[0] else None
        flat = grad_output.reshape(-1, len(weight))  # (..., O) -> (N, O)
        x = x.reshape(-1, weight.shape[1])  # (..., I) -> (N, I)
        weight_grad = transposed_product(flat, x) if ctx.needs_input_grad[1] else None
        bias_grad = flat.sum(dim=0) if ctx.needs_input_grad[2] else None
        return x_grad, weight_grad, bias_grad


def _is_for_onednn(left: Tensor, right: Tensor) -> bool:
    return (
        left.dtype == right.dtype == torch.float32  # 16 bits go to oneDNN in torch itself
        and left.device.type == "cpu"
        and left.numel() * len(right) >= MIN_MULTIPLICATIONS
        and torch.backends.mkldnn.is_available()
    )
