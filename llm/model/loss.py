"""The loss: cross-entropy of the next token, -log p(target), in nats.

B  sequences    T  positions    C  model width    V  vocabulary    N = B * T
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.model.kernels.cross_entropy import IGNORED, head_losses, in_parts
from llm.model.transformer import Transformer


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return -log softmax(logits)[target], (B, T), of logits (B, T, V); 0 where IGNORED."""
    losses = [
        # in fp32: a sum of V exponentials in bf16 would keep 8 bits of it
        F.cross_entropy(part.float(), wanted, reduction="none", ignore_index=IGNORED)
        # kernel: all positions, a few at a time, so that a softmax stays in the CPU's cache
        for part, wanted in in_parts(logits.flatten(0, 1), targets.flatten())
    ]
    return torch.cat(losses).view_as(targets)  # (N,) -> (B, T)


class ModelWithLoss(nn.Module):
    """A model and its loss as one module: `token_losses(model(inputs, document_ids), targets)`.

    One module, since what wraps a module for mixed precision casts its outputs to fp32: here these
    are the losses, which are small, and not the logits.
    """

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model
        self._compiled_hidden_states: Callable[..., Tensor] | None = None

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the model, and within the loss the softmax and its gradient.

        Arguments are those of `torch.compile`.
        """
        # Not as one graph: the partitioner into forward and backward knows nothing of chunks, and
        # would keep the logits of each, three times the memory of plain cross-entropy.
        self._compiled_hidden_states = torch.compile(self.model.hidden_states, *args, **options)

    def forward(
        self,
        inputs: Tensor,
        targets: Tensor,
        document_ids: Tensor | None,
        is_weighted: bool = False,
        temperature: float = 1.0,
    ) -> Tensor:
        """Return the loss at each position, (B, T).

        `is_weighted`: they will be weighted differently, so their gradient waits for the weights.
        `temperature` divides the logits, as in sampling.
        """
        model = self.model
        hidden_states = self._compiled_hidden_states or model.hidden_states
        x = hidden_states(inputs, document_ids).flatten(0, 1)  # (B, T, C) -> (N, C)
        losses: Callable[..., Tensor] = head_losses
        if torch.compiler.is_compiling():  # the whole module, not by its `compile`: see there
            losses = cast(Any, torch.compiler.disable)(head_losses)
        # kernel: equals token_losses of the logits, which are never all in memory
        return losses(
            x,
            model.head.weight,
            targets.flatten(),
            vocab_size=model.vocab_size,
            soft_cap=model.config.logit_soft_cap,
            temperature=temperature,
            is_weighted=is_weighted,
            is_compiled=self._compiled_hidden_states is not None,
        ).view_as(targets)  # (N,) -> (B, T)
