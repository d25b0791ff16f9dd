"""Muon: momentum whose update is made orthogonal, so that every direction a matrix knows is learned
at one rate.

The gradient of a matrix is dominated by few directions; AdamW, which looks at each weight alone,
lets them lead. Muon replaces the singular values of the momentum by (about) one, by an iteration of
matrix products. Equal shapes go through it as one batch: hundreds of small products are overhead.

Source: https://kellerjordan.github.io/posts/muon/; "Muon is Scalable for LLM Training" (arXiv
2502.16982).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from llm.model.precision import computed_precision

# Of x -> a x + b x^3 + c x^5, chosen by Keller Jordan to lift small singular values fast: five
# iterations bring those from 0.01 of the largest on to between 0.7 and 1.2. Coefficients that
# change by iteration and come closer to one (arXiv 2505.16932) learned no faster (docs/log.md).
A, B, C = 3.4445, -4.7750, 2.0315
NUM_ITERATIONS = 5
EPSILON = 1e-7


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal, with decoupled weight decay; for matrices alone.

    The update of an (M, N) matrix is scaled by sqrt(max(1, M / N)), which keeps the size of what it
    does to a vector independent of the shape.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(list(matrices), defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every matrix that has a gradient; none where `found_inf`, a number on their device
        that whoever steps may set, is 1. It is torch's name for it in the fused AdamW.
        """
        assert closure is None, "the loop computes the gradient, once"
        found_inf: Tensor | None = self.__dict__.get("found_inf")
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(tuple(sorted(matrix.shape)), []).append(matrix)
            for matrices in by_shape.values():
                self._update(matrices, group, found_inf)

    def _update(
        self, matrices: list[nn.Parameter], group: dict[str, Any], found_inf: Tensor | None
    ) -> None:
        """Update matrices that are of one shape, or of that shape transposed."""
        rate, decay, share = group["lr"], group["weight_decay"], 1.0
        gradient = _stack([matrix.grad for matrix in matrices if matrix.grad is not None])
        momenta = [self._momentum_of(matrix) for matrix in matrices]
        momentum = _stack(momenta).lerp_(gradient, 1 - group["momentum"])  # (number, M, N)
        ahead = gradient.lerp_(momentum, group["momentum"])
        update = orthogonalize(ahead).to(ahead.dtype)
        if found_inf is not None:  # all or nothing, without waiting to know which
            share = 1.0 - found_inf
            momentum = torch.where(found_inf > 0, _stack(momenta), momentum)
            update = update.nan_to_num_()
        for matrix, kept, new, change in zip(matrices, momenta, momentum, update, strict=True):
            rows, columns = matrix.shape
            kept.copy_(_as(new, matrix))
            matrix.mul_(1 - rate * decay * share)
            matrix.sub_(_as(change, matrix) * (rate * max(1.0, rows / columns) ** 0.5 * share))

    def _momentum_of(self, matrix: nn.Parameter) -> Tensor:
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        return state["momentum_buffer"]


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return, for each of (number, M, N) with M <= N, a matrix near U V^T of its singular value
    decomposition U S V^T; in bfloat16 where the processor computes in it, which is exact enough.
    """
    is_bf16 = computed_precision("bf16", matrices.device.type) == "bf16"
    x = matrices.to(torch.bfloat16 if is_bf16 else torch.float32)
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + EPSILON)  # singular values up to 1
    for _ in range(NUM_ITERATIONS):
        square = x @ x.mT  # (number, M, N) -> (number, M, M)
        polynomial = torch.baddbmm(square, square, square, beta=B, alpha=C)  # b S + c S^2
        x = torch.baddbmm(x, polynomial, x, beta=A)  # a X + (b S + c S^2) X
    return x


def _stack(matrices: Iterable[Tensor]) -> Tensor:
    """Return all as one (number, M, N) with M <= N, the tall ones transposed."""
    return torch.stack([m.mT if m.shape[0] > m.shape[1] else m for m in matrices])


def _as(flat: Tensor, matrix: Tensor) -> Tensor:
    """Return what `_stack` made of a matrix like `matrix` in its own shape."""
    return flat.mT if matrix.shape[0] > matrix.shape[1] else flat
