"""Measure a model on rows it does not learn from, while it trains.

Shapes: B rows, T positions, V vocabulary.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator

from llm.data.rows import Rows
from llm.errors import DataError
from llm.model.loss import IGNORED, ModelWithLoss
from llm.training.batches import make_batch
from llm.training.processes import sum_over_processes


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """What was measured, over all processes."""

    loss: float
    """Mean over all targets, in nats per token."""
    bits_per_byte: float
    """Bits of the text targets over the bytes they stand for; control tokens are in neither."""


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    model: ModelWithLoss,
    rows: Rows,
    token_bytes: npt.NDArray[np.int64],
    *,
    num_rows: int,
    micro_batch_rows: int,
    is_document_masked: bool,
) -> Validation:
    """Measure the first `num_rows` rows, a part on each process. Packing has shuffled the
    documents.

    Raises:
        DataError: these rows hold no text to predict.
    """
    device = accelerator.device
    bytes_of = torch.from_numpy(token_bytes).to(device)  # (V,)
    mine = np.arange(min(num_rows, rows.num_rows))[
        accelerator.process_index :: accelerator.num_processes
    ]
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    model.eval()
    for start in range(0, len(mine), micro_batch_rows):
        batch = make_batch(rows.read(mine[start : start + micro_batch_rows])).to(device)
        documents = batch.document_ids if is_document_masked else None
        losses = model(batch.inputs, batch.targets, documents)  # (B, T)
        num_bytes = bytes_of[batch.targets.clamp(min=0)] * (batch.targets != IGNORED)  # (B, T)
        sums[0] += losses.sum(dtype=torch.float64)
        sums[1] += (batch.targets != IGNORED).sum()
        sums[2] += losses[num_bytes > 0].sum(dtype=torch.float64)
        sums[3] += num_bytes.sum()
    model.train()
    nats, num_targets, text_nats, text_bytes = sum_over_processes(accelerator, *sums)
    if not text_bytes:
        raise DataError(
            f"the first {num_rows} validation rows hold no text to predict, expected some; raise"
            " runtime.validation_rows or clean.validation_fraction"
        )
    return Validation(loss=nats / num_targets, bits_per_byte=text_nats / math.log(2) / text_bytes)
