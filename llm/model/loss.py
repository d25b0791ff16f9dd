"""The loss: how surprised the model is by each token that really came next, in nats.

The largest tensor of a small model is its logits: 16 rows of 1024 positions that choose among
131,072 tokens are 8 GiB in fp32, and the usual loss keeps three tensors of that size. While a model
learns they never stand in memory whole here. Scoring and the loss are one function, which walks
over chunks of positions and forgets each chunk's logits.

Shapes: B rows, T positions, C model width, V vocabulary, W rows of the head's weights (V and its
padding), N = B * T positions in a line, M of them that are looked at, n of these in a chunk.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache as remember
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from llm.model.linear import product, transposed_product
from llm.model.transformer import Transformer

IGNORED = -100  # a target that is not learned: padding, or words that are not the assistant's

# Logits of one chunk. Matrix products want many positions: at a vocabulary of 131,072 in bf16 on a
# CPU, 512 at once took a quarter less time than 128, and 1024 another sixth less.
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
MIN_CHUNK_POSITIONS = 128

# Within a chunk, logits whose softmax is taken together. A CPU keeps 1 MiB of fp32 in its cache,
# which made this part five times as fast as 4 MiB did. On a GPU 256 MiB of fp32 are work enough for
# a kernel, and bound what the two fp32 copies of uncompiled code take beside the chunk.
SOFTMAX_LOGITS = {"cpu": 1 << 18, "cuda": 1 << 26}


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return -log p(target) in nats at each position, 0 where the target is IGNORED: -> (B, T).

    Computed in fp32 whatever the logits (B, T, V) are in, since a sum over V of exponentials needs
    it.
    """
    losses = [
        F.cross_entropy(part.float(), wanted, reduction="none", ignore_index=IGNORED)
        for part, wanted in _in_parts(logits.flatten(0, 1), targets.flatten())
    ]
    return torch.cat(losses).view_as(targets)


class ModelWithLoss(nn.Module):
    """A model and its loss as one module, from tokens to losses.

    What wraps a module to run it in bfloat16 turns its outputs back into fp32. Wrapped around both,
    it finds the losses, which are small, and no logits.
    """

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model
        self._compiled_read: Callable[..., Tensor] | None = None

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the model, and of the loss what is worth it: the softmax and its gradient.

        Not both as one graph: what cuts it into forward and backward knows nothing of chunks, and
        would keep the logits of each from one to the other, three times what plain cross-entropy
        keeps. Arguments are those of `torch.compile`.
        """
        self._compiled_read = torch.compile(self.model.read, *args, **options)

    def forward(self, inputs: Tensor, targets: Tensor, document_ids: Tensor | None) -> Tensor:
        """Return the loss at each position, (B, T)."""
        read = self._compiled_read or self.model.read
        x = read(inputs, document_ids).flatten(0, 1)  # (B, T, C) -> (N, C)
        losses: Callable[[Tensor, Tensor], Tensor] = self._losses
        if torch.compiler.is_compiling():  # the whole module, not by its own `compile`
            losses = cast(Any, torch.compiler.disable)(losses)
        return losses(x, targets)

    def _losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the losses (B, T) of x (N, C)."""
        head = _Head(
            vocab_size=self.model.vocab_size,
            soft_cap=self.model.config.logit_soft_cap,
            kind=_product_kind(x),
            is_learning=torch.is_grad_enabled(),
            is_compiled=self._compiled_read is not None,
        )
        losses = _HeadLosses.apply(x, self.model.head.weight, targets.flatten(), head)
        return cast(Tensor, losses).view_as(targets)  # (N,) -> (B, T)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Head:
    """How to get from what the model made of a position to its loss."""

    vocab_size: int
    """V: rows of the weights that are tokens. Those after them are padding, and no choice."""
    soft_cap: float
    """Logits x become cap * tanh(x / cap); 0 leaves them."""
    kind: torch.dtype
    """Of the matrix products and of a chunk's logits. Sums and the weights' gradient are wider."""
    is_learning: bool
    """Whether a gradient will be asked for."""
    is_compiled: bool
    """Whether softmax and gradient are compiled to pass over the logits twice, not ten times."""

    @property
    def wide_kind(self) -> torch.dtype:
        """What exponentials are summed in."""
        return torch.promote_types(self.kind, torch.float32)


class _HeadLosses(torch.autograd.Function):
    """Scores and losses of a chunk of positions, and their gradient while the logits are there.

    -log softmax(z)[y] = logsumexp(z) - z[y] has the gradient softmax(z) - onehot(y). It needs no
    more than what the forward pass has in hand, but for the gradient that arrives from above: one
    number a position. In training that is the same number for all, so it can be multiplied in
    later, and the weights' gradient is summed at once. Should it differ, the chunks are walked over
    once more, with the numbers.

    Source: "Liger Kernel" (arXiv 2410.10989), section 3.2; "Cut Your Losses in Large-Vocabulary
    Language Models" (arXiv 2411.09009).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, head: _Head) -> Tensor:
        """Return the losses (N,) of x (N, C) scored by the weights; 0 where nothing is learned."""
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        places = _places(targets)
        is_target = (targets[places] != IGNORED).to(head.wide_kind)
        # fp16 rounds small gradients to 0 unless the loss scale, which comes from above, is in them
        is_early = head.is_learning and head.kind != torch.float16
        wanted = needs if is_early else (False, False)
        losses, *ctx.early = _walk(x[places], weight, targets[places], head, is_target, wanted)
        ctx.save_for_backward(x, weight, targets, places, is_target)
        ctx.head, ctx.needs, ctx.is_early = head, needs, is_early
        return losses.new_zeros(len(x)).index_copy_(0, places, losses * is_target)  # (M,) -> (N,)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator's typing)
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of x (N, C) and the weights from that of the losses (N,)."""
        x, weight, targets, places, is_target = ctx.saved_tensors
        [above] = gradients
        # that of a sum or a mean is one number, expanded: seen without looking at any value
        if ctx.is_early and above.stride() == (0,):
            x_gradient, weight_gradient = (g if g is None else g.mul_(above[0]) for g in ctx.early)
            ctx.is_early = False  # used up: who goes backward a second time walks again
        else:
            numbers = above[places] * is_target
            _, x_gradient, weight_gradient = _walk(
                x[places], weight, targets[places], ctx.head, numbers, ctx.needs
            )
        if x_gradient is not None:
            x_gradient = torch.zeros_like(x).index_copy_(0, places, x_gradient.to(x.dtype))
        if weight_gradient is not None:
            weight_gradient = weight_gradient.to(weight.dtype)
        return x_gradient, weight_gradient, None, None


def _places(targets: Tensor) -> Tensor:
    """Return the positions (M,) to look at: those that are learned.

    On a GPU all of them, since their number would have to be waited for.
    """
    if targets.device.type != "cpu":
        return torch.arange(len(targets), device=targets.device)
    return (targets != IGNORED).nonzero().squeeze(1)


def _walk(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    head: _Head,
    above: Tensor,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return losses (M,), and the gradients of x (M, C) and of the weights where they are needed.

    `above` (M,) is the gradient of the losses.
    """
    x, tokens = x.to(head.kind), weight.to(head.kind)  # (M, C), (W, C)
    losses = torch.empty(len(x), dtype=head.wide_kind, device=x.device)
    x_gradient = torch.empty_like(x) if needs[0] else None
    weight_gradient = torch.zeros_like(weight, dtype=head.wide_kind) if needs[1] else None
    step = max(MIN_CHUNK_POSITIONS, CHUNK_BYTES[x.device.type] // (len(weight) * x.element_size()))
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        logits = product(x[part], tokens)  # (n, C) x (C, W) -> (n, W)
        losses[part] = _turn_into_gradient(logits, targets[part], above[part], head, any(needs))
        if x_gradient is not None:
            x_gradient[part] = product(logits, tokens.T)  # (n, W) x (W, C) -> (n, C)
        if weight_gradient is not None:
            _add_product(weight_gradient, logits, x[part])  # (W, n) x (n, C) -> (W, C)
    return losses, x_gradient, weight_gradient


def _turn_into_gradient(
    logits: Tensor, targets: Tensor, above: Tensor, head: _Head, has_gradient: bool
) -> Tensor:
    """Return the losses (n,) of logits (n, W), and put the gradient of these in their place."""
    turn = _compiled_turn() if head.is_compiled else _turn
    losses: list[Tensor] = []
    for part, wanted, numbers in _in_parts(logits, targets, above):
        lines = torch.arange(len(part), device=part.device)
        choices = wanted.clamp(min=0)  # any will do where IGNORED
        found, of_choices = turn(part, lines, choices, numbers, head, has_gradient)
        losses.append(found)
        if has_gradient:  # not in `turn`: compiled, it would cost one more pass over all logits
            part[lines, choices] = of_choices
    return torch.cat(losses)


def _turn(
    logits: Tensor,
    lines: Tensor,
    choices: Tensor,
    above: Tensor,
    head: _Head,
    has_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Do the same for logits (n, W) of one softmax, but for the logits of the `choices` (n,), which
    stand in `lines` (n,): return their gradient beside the losses.

    logsumexp(z) = max z - log max softmax(z): the softmax has one exponential for each logit, and
    they are needed for the gradient in any case.
    """
    scores = logits.to(head.wide_kind)
    if head.soft_cap:
        scores = head.soft_cap * torch.tanh(scores / head.soft_cap)
    scores[:, head.vocab_size :] = -torch.inf  # no probability for padding
    chances = scores.softmax(dim=-1)
    log_sums = scores.amax(dim=-1) - chances.amax(dim=-1).log()
    losses = log_sums - scores[lines, choices]
    of_choices = (chances[lines, choices] - 1.0) * above
    if has_gradient:
        gradient = chances.mul_(above[:, None])
        if head.soft_cap:  # the slope of cap * tanh(x / cap) is 1 - tanh^2
            slopes = 1.0 - (scores / head.soft_cap) ** 2
            gradient = gradient.mul_(slopes)
            of_choices = of_choices * slopes[lines, choices]
        gradient[:, head.vocab_size :] = 0.0
        logits.copy_(gradient)
    return losses, of_choices.to(logits.dtype)


@remember
def _compiled_turn() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_turn)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left (n, W)^T x right (n, C) to `total` (W, C), which may be wider than both.

    Sums of many chunks in bfloat16 would lose what is small beside the sum so far. On a CPU the
    product is made in blocks, which stay in its cache until they are added.
    """
    if total.device.type != "cpu":
        total.addmm_(left.T, right) if total.dtype == right.dtype else total.add_(left.T @ right)
        return
    block = max(1, SOFTMAX_LOGITS[total.device.type] // right.shape[0])
    for rows, columns in zip(total.split(block), left.split(block, dim=1), strict=True):
        rows.add_(transposed_product(columns, right))


def _in_parts(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield logits (n, W), and what goes with them (n,), in parts for one softmax each."""
    step = max(1, SOFTMAX_LOGITS[logits.device.type] // logits.shape[-1])
    yield from zip(*(each.split(step) for each in (logits, *others)), strict=True)


def _product_kind(x: Tensor) -> torch.dtype:
    """Return the type that matrix products with x are computed in here."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
