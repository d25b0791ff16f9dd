"""Cross-entropy without all logits in memory: head, loss and gradients, chunk by chunk.

The logits are the largest tensor of a small model: for 16 sequences of 1024 positions and a
vocabulary of 131,072 they take 8 GiB in fp32, and plain cross-entropy keeps three such tensors.
Here the head and the loss are one function over chunks of positions, and a chunk's logits are
overwritten by their gradient.

    N  positions, flattened    C  model width    V  vocabulary
    M  positions with a target                   W  rows of the head's weight: V and its padding
    n  positions in a chunk
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llm.model.kernels.linear import product, transposed_product

IGNORED = -100  # a position without a target: padding, or not the assistant's; torch's ignore_index

# Logits of one chunk. Matrix products are faster with many positions: at a vocabulary of 131,072 in
# bf16 on a CPU, 512 at once took a quarter less time than 128, and 1024 another sixth less.
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
MIN_CHUNK_POSITIONS = 128

# Logits of one softmax within a chunk. 1 MiB of fp32 stays in a CPU's cache: five times as fast as
# 4 MiB. On a GPU 256 MiB of fp32 fill a kernel, and bound the two fp32 copies of uncompiled code.
SOFTMAX_LOGITS = {"cpu": 1 << 18, "cuda": 1 << 26}


def head_losses(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    soft_cap: float,
    temperature: float,
    is_weighted: bool,
    is_compiled: bool,
) -> Tensor:
    """Return the losses (N,) of hidden states x (N, C) under the head's weight (W, C).

    `is_weighted` says that positions will get different gradients: see `_HeadLosses`.
    """
    head = _Head(
        vocab_size=vocab_size,
        soft_cap=soft_cap,
        temperature=temperature,
        dtype=_product_dtype(x),
        is_grad_early=torch.is_grad_enabled() and not is_weighted,
        is_compiled=is_compiled,
    )
    return cast(Tensor, _HeadLosses.apply(x, weight, targets, head))


def in_parts(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield logits (n, W) and tensors (n,) along with them, in parts of one softmax each."""
    step = max(1, SOFTMAX_LOGITS[logits.device.type] // logits.shape[-1])
    yield from zip(*(each.split(step) for each in (logits, *others)), strict=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Head:
    """How hidden states become losses."""

    vocab_size: int
    """V: the rows of the weight after these are padding and get no probability."""
    soft_cap: float
    """Logits x become cap * tanh(x / cap); 0: unchanged."""
    temperature: float
    """Divides the logits after that."""
    dtype: torch.dtype
    """Of the matrix products and a chunk's logits. Sums and the weight's gradient are wider."""
    is_grad_early: bool
    """Whether the forward pass takes the gradients, if the dtype allows it."""
    is_compiled: bool
    """Whether softmax and gradient are compiled: two passes over the logits instead of ten."""

    @property
    def wide_dtype(self) -> torch.dtype:
        """Dtype of sums of exponentials and of gradients."""
        return torch.promote_types(self.dtype, torch.float32)


class _HeadLosses(torch.autograd.Function):
    """Head and loss with both gradients, taken in the forward pass while the logits exist.

    -log softmax(z)[y] = logsumexp(z) - z[y] has the gradient softmax(z) - onehot(y), times one
    number per position, grad_output. In a plain sum that number is the same at every position, so
    the forward pass assumes 1 and the backward pass multiplies. Otherwise, as for the pairs of DPO,
    the backward pass makes the chunks again: four products with the head instead of three.

    Source: "Liger Kernel" (arXiv 2410.10989), section 3.2; "Cut Your Losses in Large-Vocabulary
    Language Models" (arXiv 2411.09009).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, head: _Head) -> Tensor:
        """Return the losses (N,) of x (N, C); 0 where IGNORED."""
        needed = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        positions = _target_positions(targets)
        is_target = (targets[positions] != IGNORED).to(head.wide_dtype)
        # fp16 rounds small gradients to 0 unless the loss scale, part of grad_output, is in them
        is_early = head.is_grad_early and head.dtype != torch.float16
        early = needed if is_early else (False, False)
        losses, *ctx.early = _walk(x[positions], weight, targets[positions], head, is_target, early)
        ctx.save_for_backward(x, weight, targets, positions, is_target)
        ctx.head, ctx.needed, ctx.is_early = head, needed, is_early
        # IGNORED positions, computed on a GPU, get 0 here
        return losses.new_zeros(len(x)).index_copy_(0, positions, losses * is_target)  # -> (N,)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator's typing)
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of x (N, C) and the weight (W, C)."""
        x, weight, targets, positions, is_target = ctx.saved_tensors
        [grad_output] = grad_outputs  # (N,)
        # the gradient of a sum or mean is one number, expanded: its stride shows it without a read,
        # for which a GPU would have to be waited for
        if ctx.is_early and grad_output.stride() == (0,):
            x_grad, weight_grad = (g if g is None else g.mul_(grad_output[0]) for g in ctx.early)
            ctx.is_early = False  # changed in place: a second backward pass walks again
        else:
            masked = grad_output[positions] * is_target
            _, x_grad, weight_grad = _walk(
                x[positions], weight, targets[positions], ctx.head, masked, ctx.needed
            )
        if x_grad is not None:
            x_grad = torch.zeros_like(x).index_copy_(0, positions, x_grad.to(x.dtype))
        if weight_grad is not None:
            weight_grad = weight_grad.to(weight.dtype)
        return x_grad, weight_grad, None, None


def _target_positions(targets: Tensor) -> Tensor:
    """Return the positions (M,) to compute: those with a target.

    On a GPU all of them, since reading how many there are would wait for it.
    """
    if targets.device.type != "cpu":
        return torch.arange(len(targets), device=targets.device)
    return (targets != IGNORED).nonzero().squeeze(1)


def _walk(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    head: _Head,
    grad_output: Tensor,
    needed: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the losses (M,), and the gradients of x (M, C) and of the weight where needed."""
    x, tokens = x.to(head.dtype), weight.to(head.dtype)  # (M, C), (W, C)
    losses = torch.empty(len(x), dtype=head.wide_dtype, device=x.device)
    x_grad = torch.empty_like(x) if needed[0] else None
    weight_grad = torch.zeros_like(weight, dtype=head.wide_dtype) if needed[1] else None
    # at a very large vocabulary speed wins over memory: never below MIN_CHUNK_POSITIONS
    step = max(MIN_CHUNK_POSITIONS, CHUNK_BYTES[x.device.type] // (len(weight) * x.element_size()))
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        # all W rows, not V: a side that is a multiple of 64 is faster than a slice
        logits = product(x[part], tokens)  # (n, C) x (C, W) -> (n, W)
        losses[part] = _losses_in_place(
            logits, targets[part], grad_output[part], head, any(needed)
        )  # from here on `logits` holds their gradient
        if x_grad is not None:
            x_grad[part] = product(logits, tokens.T)  # (n, W) x (W, C) -> (n, C)
        if weight_grad is not None:
            _add_product(weight_grad, logits, x[part])  # (W, n) x (n, C) -> (W, C)
    return losses, x_grad, weight_grad


def _losses_in_place(
    logits: Tensor, targets: Tensor, grad_output: Tensor, head: _Head, needs_grad: bool
) -> Tensor:
    """Return the losses (n,) of logits (n, W), and overwrite the logits by their gradient."""
    softmax_losses = _compiled_softmax_losses() if head.is_compiled else _softmax_losses
    losses: list[Tensor] = []
    for part, wanted, factors in in_parts(logits, targets, grad_output):
        rows = torch.arange(len(part), device=part.device)
        columns = wanted.clamp(min=0)  # IGNORED is no index; its loss is multiplied by 0 later
        found, target_grads = softmax_losses(part, rows, columns, factors, head, needs_grad)
        losses.append(found)
        if needs_grad:  # compiled with the rest, this would cost one more pass over all logits
            part[rows, columns] = target_grads
    return torch.cat(losses)


def _softmax_losses(
    logits: Tensor,
    rows: Tensor,
    columns: Tensor,
    grad_output: Tensor,
    head: _Head,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Return losses (n,) and the gradients (n,) at the targets, logits[rows, columns].

    All other logits (n, W) are overwritten by their gradient.
    """
    scores = logits.to(head.wide_dtype)
    if head.soft_cap:
        scores = head.soft_cap * torch.tanh(scores / head.soft_cap)
    if head.temperature != 1:
        scores, grad_output = scores / head.temperature, grad_output / head.temperature
    scores[:, head.vocab_size :] = -torch.inf  # no probability for padding
    probabilities = scores.softmax(dim=-1)
    # max z - log max softmax(z): the gradient needs softmax in any case, and a logsumexp beside it
    # would be a second exponential of every logit
    log_sums = scores.amax(dim=-1) - probabilities.amax(dim=-1).log()
    losses = log_sums - scores[rows, columns]
    target_grads = (probabilities[rows, columns] - 1.0) * grad_output
    if needs_grad:
        grads = probabilities.mul_(grad_output[:, None])
        if head.soft_cap:  # the slope of cap * tanh(x / cap) is 1 - tanh^2
            slopes = 1.0 - (scores / (head.soft_cap / head.temperature)) ** 2
            grads = grads.mul_(slopes)
            target_grads = target_grads * slopes[rows, columns]
        grads[:, head.vocab_size :] = 0.0  # with a cap 0 * (1 - inf^2) there, not a number
        logits.copy_(grads)
    return losses, target_grads.to(logits.dtype)


@cache
def _compiled_softmax_losses() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_softmax_losses)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left (n, W)^T x right (n, C) to `total` (W, C), which may be wider than both."""
    # wider: a sum over many chunks in bf16 would lose all that is small beside the sum so far
    if total.device.type != "cpu":
        total.addmm_(left.T, right) if total.dtype == right.dtype else total.add_(left.T @ right)
        return
    # in blocks that stay in the CPU's cache until they are added
    block = max(1, SOFTMAX_LOGITS[total.device.type] // right.shape[0])
    for rows, columns in zip(total.split(block), left.split(block, dim=1), strict=True):
        rows.add_(transposed_product(columns, right))


def _product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products with x: autocast's where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
