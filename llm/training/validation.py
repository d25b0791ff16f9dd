"""Measure a model on rows it does not learn from, while it trains.

Shapes: B rows, T positions, V vocabulary, N tokens to fill in.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from torch import Tensor

from llm.data.packed import PackedSequences
from llm.errors import DataError
from llm.model.loss import IGNORED, ModelWithLoss
from llm.model.masked_lm import fill_in
from llm.model.precision import Precision, autocast
from llm.model.transformer import Transformer
from llm.training.batches import Batch, MaskedTokens, NextToken, even_size
from llm.training.processes import sum_over_processes


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """What was measured, over all processes."""

    loss: float
    """Mean over all targets, in nats per token."""
    figures: Mapping[str, float]
    """`bits_per_byte`: bits of the text targets over the bytes they stand for; control tokens are
    in neither. Where tokens were to be filled in, `masked_accuracy`: the share that was.
    """


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    model: Transformer,
    model_with_loss: ModelWithLoss,
    rows: PackedSequences,
    objective: NextToken | MaskedTokens,
    token_bytes: npt.NDArray[np.int64],
    *,
    precision: Precision,
    num_rows: int,
    room: int,
) -> Validation:
    """Measure the first `num_rows` rows, a part on each process, at most `room` at once. Packing
    has shuffled the documents.

    What is hidden in a row follows from its number, so it is the same in every validation.

    Raises:
        DataError: these rows hold no text to predict.
    """
    device = accelerator.device
    bytes_of = torch.from_numpy(token_bytes).to(device)  # (V,)
    mine = np.arange(min(num_rows, rows.num_rows))[
        accelerator.process_index :: accelerator.num_processes
    ]
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    model_with_loss.eval()
    size = even_size(len(mine), room) if len(mine) else 1
    for start in range(0, len(mine), size):
        some = mine[start : start + size]
        filled = np.pad(some, (0, size - len(some)), mode="edge")  # one shape is compiled once
        batch = objective(rows.read(filled), filled)
        batch.targets[len(some) :] = IGNORED
        batch = batch.to(device)
        with autocast(precision, device.type):
            if isinstance(objective, NextToken):
                sums += _predicted(model_with_loss, batch, bytes_of)
            else:
                sums += _filled_in(model, batch)
    model_with_loss.train()
    nats, num_targets, *parts = sum_over_processes(accelerator, *sums)
    if not parts[1]:
        raise DataError(
            f"the first {num_rows} validation rows hold no text to predict, expected some; raise"
            " runtime.validation_sequences or clean.validation_fraction"
        )
    if isinstance(objective, NextToken):
        figures = {"bits_per_byte": parts[0] / math.log(2) / parts[1]}
    else:
        figures = {"masked_accuracy": parts[0] / parts[1]}
    return Validation(loss=nats / num_targets, figures=figures)


def _predicted(model: ModelWithLoss, batch: Batch, bytes_of: Tensor) -> Tensor:
    """Return nats, targets, nats of the text targets, and the bytes these stand for: (4,)."""
    losses = model(batch.inputs, batch.targets, batch.document_ids)  # (B, T)
    is_target = batch.targets != IGNORED
    num_bytes = bytes_of[batch.targets.clamp(min=0)] * is_target  # (B, T)
    sums = (losses, is_target, losses[num_bytes > 0], num_bytes)
    return torch.stack([each.sum(dtype=torch.float64) for each in sums])


def _filled_in(model: Transformer, batch: Batch) -> Tensor:
    """Return nats, targets, targets that were the likeliest token, and targets again: (4,)."""
    nats, is_right = fill_in(model, batch.inputs, batch.targets, batch.document_ids)  # 2 x (N,)
    count = torch.ones_like(nats)
    sums = (nats, count, is_right, count)
    return torch.stack([each.sum(dtype=torch.float64) for each in sums])
