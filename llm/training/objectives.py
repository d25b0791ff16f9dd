"""Training objectives: next token, masked tokens. Each makes its batches and owns its loss.

The loop, the optimizer and DDP see an `Objective` only, so those of preferences and of rewards,
llm.training.dpo and llm.training.grpo, are one more class each.

Shapes: B sequences, T positions, V vocabulary, N masked tokens.
"""

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from llm.config import FinetuneConfig, OptimizationConfig
from llm.data.packed import PackedArrays, PackedSequences
from llm.model.loss import IGNORED, ModelWithLoss
from llm.model.masked_lm import Masking, fill_in
from llm.runtime.job import Job
from llm.tokenizer.base import Tokenizer

if TYPE_CHECKING:  # it imports this module
    from llm.training.batches import StepBatches


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Some sequences, ready for a forward pass. The first dimension of every tensor is B."""

    inputs: Tensor
    """(B, T): input tokens. An objective may add dimensions: (B, 2, T) for pairs."""
    targets: Tensor
    """Like `inputs`: the token to predict at each position, or IGNORED."""
    document_ids: Tensor | None
    """Like `inputs`: each position's document; attention stays within it. None: it does not."""
    extras: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """(B, ...): what else the loss reads, such as rewards or reference log-probabilities."""

    def sequences(self, start: int, count: int) -> "Batch":
        """Return `count` sequences from `start` on."""
        return self._map(lambda tensor: tensor[start : start + count])

    def to(self, device: torch.device) -> "Batch":
        """Copy to `device` asynchronously."""
        if device.type == "cpu":
            return self
        # a copy from pageable memory would block the host, whatever `non_blocking` says
        return self._map(lambda tensor: tensor.pin_memory().to(device, non_blocking=True))

    def tensors(self) -> list[Tensor]:
        """Return all tensors of the batch."""
        documents = [] if self.document_ids is None else [self.document_ids]
        return [self.inputs, self.targets, *documents, *self.extras.values()]

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(
            inputs=change(self.inputs),
            targets=change(self.targets),
            document_ids=None if self.document_ids is None else change(self.document_ids),
            extras={name: change(tensor) for name, tensor in self.extras.items()},
        )


class Objective(Protocol):
    """What a model learns from packed sequences.

    A sequence whose targets are all IGNORED must add nothing to any sum: it fills up a micro-batch.
    """

    def make_batch(self, arrays: PackedArrays, samples: npt.NDArray[np.int64]) -> Batch:
        """Make a batch from packed sequences (B, T+1), on the CPU, in the prefetch thread.

        `samples` (B,) numbers them in training's endless sequence: any randomness derives from it.
        It runs steps ahead of the weights: see OnPolicyObjective.
        """
        ...

    def count_targets(self, batch: Batch) -> Tensor:
        """Return how many targets each sequence has, (B,): tokens, pairs or episodes.

        The sum of all losses of a step is divided by their number, over all processes.
        """
        ...

    def loss(self, model: ModelWithLoss, batch: Batch) -> Tensor | dict[str, Tensor]:
        """Return the sum of the losses of all targets, a scalar; or `loss` among further sums over
        the targets, whose means are logged by their names.
        """
        ...

    def measure(
        self, model: ModelWithLoss, batch: Batch, token_bytes: Tensor
    ) -> Mapping[str, Tensor]:
        """Return sums for validation by the metric's name: its total and its count, (2,) each.

        A metric is total / count over all batches; one of them is `loss`. `token_bytes` (V,) holds
        how many bytes of text each token stands for.
        """
        ...


@runtime_checkable
class OnPolicyObjective(Objective, Protocol):
    """An objective that trains on what the model itself generates."""

    def sampled_steps(self, first_step: int) -> "Generator[StepBatches]":
        """Yield one process's share of every step from `first_step` on.

        The loop asks for a step when the weights are those after the step before.
        """
        ...

    def step_metrics(self, sums: Mapping[str, float]) -> Mapping[str, float]:
        """Return metrics to log, from a step's `StepBatches.sums` over all processes."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingStart:
    """A training before its first step: what an objective is made from."""

    job: Job
    config: OptimizationConfig
    accelerator: Accelerator
    model: ModelWithLoss
    """On its device, with the starting weights, also when training will resume later."""
    tokenizer: Tokenizer
    sequences: PackedSequences
    """Those the objective makes batches from: of training, or of validation."""
    micro_batch_size: int
    seed: int
    """For the objective's own randomness."""


MakeObjective = Callable[[TrainingStart], Objective]
"""Makes the objective of a stage, once for training and once for validation."""


class ModelWithObjective(nn.Module):
    """A model and its objective's loss as one module: what DDP wraps and the loop calls."""

    # DDP averages the gradients of what its own `forward` computed, so the loss is in here

    def __init__(self, model: ModelWithLoss, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return sums over the batch's targets, scalars: `loss`, and what else is logged."""
        found = self.objective.loss(self.model, batch)
        return found if isinstance(found, dict) else {"loss": found}


class _TokenLoss:
    """The loss of both objectives here: -log p(target), summed over all target tokens, in nats."""

    __slots__ = ()

    def count_targets(self, batch: Batch) -> Tensor:
        """Return the number of target tokens of each sequence, (B,)."""
        return (batch.targets != IGNORED).sum(dim=1)  # (B, T) -> (B,)

    def loss(self, model: ModelWithLoss, batch: Batch) -> Tensor:
        """Return the sum of the losses of all target tokens."""
        # The gradient of a plain sum is one number for all positions. The chunked loss relies on
        # it: it computes the gradient of the logits in its forward pass, once.
        return model(batch.inputs, batch.targets, batch.document_ids).sum()


@dataclass(frozen=True, kw_only=True, slots=True)
class NextToken(_TokenLoss):
    """Causal language modeling: each position's target is the token after it."""

    document_mask: bool
    has_all_targets: bool = False
    """In chats, learn what users and systems say too."""

    def make_batch(self, arrays: PackedArrays, samples: npt.NDArray[np.int64]) -> Batch:
        """Shift the sequences by one position."""
        # the mask excludes padding and, in chats, everything the assistant did not say
        mask = arrays.all_targets() if self.has_all_targets else arrays.mask
        targets = np.where(mask[:, 1:], arrays.tokens[:, 1:], IGNORED)
        documents = torch.from_numpy(arrays.document_ids[:, :-1])  # (B, T+1) -> (B, T)
        return Batch(
            inputs=torch.from_numpy(arrays.tokens[:, :-1]),  # (B, T+1) -> (B, T)
            targets=torch.from_numpy(targets),  # (B, T+1) -> (B, T)
            # padding follows a causal sequence, so without document masking no mask is needed
            document_ids=documents if self.document_mask else None,
        )

    def measure(
        self, model: ModelWithLoss, batch: Batch, token_bytes: Tensor
    ) -> Mapping[str, Tensor]:
        """Return the sums of the loss in nats and of bits per byte."""
        losses = model(batch.inputs, batch.targets, batch.document_ids)  # (B, T)
        is_target = batch.targets != IGNORED
        num_bytes = token_bytes[batch.targets.clamp(min=0)] * is_target  # (B, T)
        # control tokens stand for no bytes: left out, so that tokenizers and templates compare
        nats_of_text = losses[num_bytes > 0].double()
        return {
            "loss": sums(losses, is_target),
            "bits_per_byte": sums(nats_of_text / math.log(2), num_bytes),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedTokens(_TokenLoss):
    """Masked language modeling (BERT): the target is the position's own, perhaps hidden, token."""

    document_mask: bool
    masking: Masking
    has_all_targets: bool = False
    """In chats, mask what users and systems say too."""

    def make_batch(self, arrays: PackedArrays, samples: npt.NDArray[np.int64]) -> Batch:
        """Hide some of the tokens that the packed mask marks."""
        # the mask marks the answers of chats, and of text all but the first token of a sequence,
        # which is also the last of the sequence before: no token is a target twice
        mask = arrays.all_targets() if self.has_all_targets else arrays.mask
        inputs, targets = self.masking.hide(arrays.tokens[:, :-1], mask[:, :-1], samples)
        # attention looks both ways, so ids are always needed: they keep it away from padding
        ids = arrays.attention_ids(self.document_mask)[:, :-1]  # (B, T+1) -> (B, T)
        return Batch(
            inputs=torch.from_numpy(inputs),
            targets=torch.from_numpy(targets),
            document_ids=torch.from_numpy(ids),
        )

    def measure(
        self, model: ModelWithLoss, batch: Batch, token_bytes: Tensor
    ) -> Mapping[str, Tensor]:
        """Return the sums of the loss in nats, and of the masked tokens ranked first."""
        # logits of the 15 % that are masked only; a rank needs them whole, the chunked loss not
        targets = (batch.inputs, batch.targets, batch.document_ids)
        nats, is_right = fill_in(model.model, *targets)  # 2 x (N,)
        count = torch.ones_like(nats)
        return {"loss": sums(nats, count), "masked_accuracy": sums(is_right, count)}


def language_modeling(start: TrainingStart) -> Objective:
    """Return next-token prediction for a causal model, masked tokens for a bidirectional one."""
    config, tokenizer = start.config, start.tokenizer
    has_all_targets = isinstance(config, FinetuneConfig) and config.loss_on == "all"
    if start.model.model.config.is_causal:
        return NextToken(document_mask=config.document_mask, has_all_targets=has_all_targets)
    masking = Masking(
        seed=start.seed,
        fraction=config.masked_fraction,
        mask_id=tokenizer.mask_id,
        is_text=tokenizer.token_bytes > 0,  # control tokens stand for no bytes
    )
    return MaskedTokens(
        document_mask=config.document_mask, masking=masking, has_all_targets=has_all_targets
    )


def sums(values: Tensor, counts: Tensor) -> Tensor:
    """Return the total and the count of a metric, (2,)."""
    # fp64: a validation adds up millions of numbers
    return torch.stack([part.sum(dtype=torch.float64) for part in (values, counts)])
