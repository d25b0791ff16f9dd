"""The loss: how surprised the model is by each token that really came next, in nats.

Shapes: B rows, T positions, V vocabulary.
"""

from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # a target that is not learned: padding, or words that are not the assistant's


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return -log p(target) in nats at each position, 0 where the target is IGNORED: -> (B, T).

    Computed in fp32 whatever the logits are in, since the sum over V of exponentials needs it.
    """
    B, T, V = logits.shape
    losses = F.cross_entropy(
        logits.reshape(B * T, V).float(),
        targets.reshape(B * T),
        ignore_index=IGNORED,
        reduction="none",
    )
    return losses.view(B, T)
