"""Muon: momentum with an orthogonalized update, so that a matrix learns all directions at one rate.

A few directions dominate the gradient of a matrix, and AdamW, which scales each weight by itself,
follows them. Muon sets the singular values of the momentum to about one (Newton-Schulz iteration).

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
    """Orthogonalized Nesterov momentum with decoupled weight decay; for matrices only."""

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
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, closure: Callable[[], float] | None = None, *, is_skipped: Tensor | None = None
    ) -> None:
        """Update every matrix that has a gradient; none where `is_skipped`, on the device, is 1."""
        assert closure is None, "the loop computes the gradient, once"
        for group in self.param_groups:
            # equal shapes as one batch: a product per matrix would leave a GPU idle in between
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(tuple(sorted(matrix.shape)), []).append(matrix)
            for matrices in by_shape.values():
                self._update(matrices, group, is_skipped)

    def _update(
        self, matrices: list[nn.Parameter], group: dict[str, Any], is_skipped: Tensor | None
    ) -> None:
        """Update matrices of one shape or its transpose."""
        rate, decay, share = group["lr"], group["weight_decay"], 1.0
        gradient = _stack([matrix.grad for matrix in matrices if matrix.grad is not None])
        momenta = [self._momentum_of(matrix) for matrix in matrices]
        momentum = _stack(momenta).lerp_(gradient, 1 - group["momentum"])  # (number, M, N)
        ahead = gradient.lerp_(momentum, group["momentum"])  # Nesterov
        update = orthogonalize(ahead).to(ahead.dtype)
        if is_skipped is not None:  # all or nothing, without waiting for the device to know which
            share = 1.0 - is_skipped
            momentum = torch.where(is_skipped > 0, _stack(momenta), momentum)
            update = update.nan_to_num_()  # times a share of 0, NaN would still be NaN
        for matrix, kept, new, change in zip(matrices, momenta, momentum, update, strict=True):
            rows, columns = matrix.shape
            # times sqrt(rows / columns) for tall ones: an update then changes the size of outputs
            # independently of the shape (Keller Jordan's scale, not the 0.2 sqrt(max) of Moonlight)
            kept.copy_(_as(new, matrix))
            matrix.mul_(1 - rate * decay * share)
            matrix.sub_(_as(change, matrix) * (rate * max(1.0, rows / columns) ** 0.5 * share))

    def _momentum_of(self, matrix: nn.Parameter) -> Tensor:
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        return state["momentum_buffer"]


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return approximately U V^T for each matrix U S V^T of (number, M, N), M <= N."""
    # bf16 where the hardware has it: the iteration corrects its own rounding, and only singular
    # values of about one are wanted
    is_bf16 = computed_precision("bf16", matrices.device.type) == "bf16"
    x = matrices.to(torch.bfloat16 if is_bf16 else torch.float32)
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + EPSILON)  # singular values up to 1
    for _ in range(NUM_ITERATIONS):
        square = x @ x.mT  # (number, M, N) -> (number, M, M)
        polynomial = torch.baddbmm(square, square, square, beta=B, alpha=C)  # b S + c S^2
        x = torch.baddbmm(x, polynomial, x, beta=A)  # a X + (b S + c S^2) X
    return x


def _stack(matrices: Iterable[Tensor]) -> Tensor:
    """Return all as one (number, M, N) with M <= N, tall matrices transposed."""
    # the Gram matrix of the iteration is (M, M): the shorter side costs less
    return torch.stack([m.mT if m.shape[0] > m.shape[1] else m for m in matrices])


def _as(flat: Tensor, matrix: Tensor) -> Tensor:
    """Undo the transposition of `_stack` for a matrix shaped like `matrix`."""
    return flat.mT if matrix.shape[0] > matrix.shape[1] else flat
