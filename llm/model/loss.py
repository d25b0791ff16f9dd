"""The loss: how surprised the model is by each token that really came next, in nats.

Shapes: B rows, T positions, V vocabulary, N = B * T positions in a line.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

IGNORED = -100  # a target that is not learned: padding, or words that are not the assistant's

# Logits looked at together. On a CPU 4 MiB of fp32 stay in the cache, which halved the time of a
# whole-tensor softmax; on a GPU the work per kernel counts.
CHUNK_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 28}


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return -log p(target) in nats at each position, 0 where the target is IGNORED: -> (B, T).

    Computed in fp32 whatever the logits are in, since a sum over V of exponentials needs it.
    """
    B, T, V = logits.shape
    losses = _CrossEntropy.apply(logits.reshape(B * T, V), targets.reshape(B * T))
    return cast(Tensor, losses).view(B, T)


class ModelWithLoss(nn.Module):
    """A model and its loss as one module, from tokens to losses.

    What wraps a module to run it in bfloat16 turns its outputs back into fp32. Wrapped around both,
    it finds the losses, which are small, and leaves the logits as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor, document_ids: Tensor | None) -> Tensor:
        """Return the loss at each position, (B, T)."""
        return token_losses(self.model(inputs, document_ids), targets)


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy that keeps, for the gradient, one number a position beside the logits.

    -log softmax(z)[y] = logsumexp(z) - z[y], and its gradient is softmax(z) - onehot(y): all of it
    follows from the logits and their logsumexp. The usual way keeps the log-probabilities, a second
    tensor of (N, V), and makes a third for their gradient.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the losses (N,) of logits (N, V)."""
        places = targets.clamp(min=0)[:, None]  # (N,) -> (N, 1): any place will do where ignored
        log_sums = torch.empty(len(logits), device=logits.device)
        losses = torch.empty_like(log_sums)
        for part in _chunks(logits):
            wide = logits[part].float()
            log_sums[part] = wide.logsumexp(dim=-1)
            losses[part] = log_sums[part] - wide.gather(1, places[part]).squeeze(1)
        ctx.save_for_backward(logits, targets, log_sums)
        return losses.masked_fill_(targets == IGNORED, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the logits (N, V) from that of the losses (N,)."""
        logits, targets, log_sums = ctx.saved_tensors
        weights = gradients[0].masked_fill(targets == IGNORED, 0.0)[:, None]  # (N,) -> (N, 1)
        places = targets.clamp(min=0)[:, None]
        result = torch.empty_like(logits)
        for part in _chunks(logits):
            chances = logits[part].float().sub_(log_sums[part, None]).exp_()
            chances.scatter_add_(1, places[part], torch.full_like(weights[part], -1.0))
            result[part] = chances.mul_(weights[part])
        return result, None


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Yield slices of positions, a chunk of logits each."""
    num_positions, num_logits = logits.shape
    step = max(1, CHUNK_LOGITS[logits.device.type] // num_logits)
    for start in range(0, num_positions, step):
        yield slice(start, start + step)
