"""Validation: measure a model on held-out sequences while it trains.

Shapes: V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator

from llm.data.packed import PackedSequences
from llm.errors import DataError
from llm.model.loss import IGNORED, ModelWithLoss
from llm.model.precision import Precision, autocast
from llm.training.objectives import Objective
from llm.training.processes import sum_over_processes
from llm.training.shares import even_size


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """Results over all processes."""

    loss: float
    """Mean over all targets, in nats per target."""
    metrics: Mapping[str, float]
    """The objective's metric by name: `bits_per_byte`, or `masked_accuracy`."""


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    model: ModelWithLoss,
    sequences: PackedSequences,
    objective: Objective,
    token_bytes: npt.NDArray[np.int64],
    *,
    precision: Precision,
    num_sequences: int,
    max_batch_size: int,
) -> Validation:
    """Measure the first `num_sequences` sequences, divided among the processes.

    Raises:
        DataError: these sequences hold nothing to measure.
    """
    device = accelerator.device
    bytes_of = torch.from_numpy(token_bytes).to(device)  # (V,)
    # the first ones are a fair sample, since packing has shuffled the documents
    mine = np.arange(min(num_sequences, sequences.num_sequences))[
        accelerator.process_index :: accelerator.num_processes
    ]
    # fp64 on the device: read once at the end, not after each batch
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    model.eval()  # no dropout
    size = even_size(len(mine), max_batch_size) if len(mine) else 1
    for start in range(0, len(mine), size):
        some = mine[start : start + size]
        # filled up with its last sequence: a compiled model would compile every other shape anew
        filled = np.pad(some, (0, size - len(some)), mode="edge")
        # sample numbers are those of the sequences: each validation masks the same tokens
        batch = objective.make_batch(sequences.read(filled), filled)
        batch.targets[len(some) :] = IGNORED
        with autocast(precision, device.type):
            sums += objective.measure(model, batch.to(device), bytes_of)
    model.train()
    # sums, not means: the processes have unequal numbers of targets
    loss, num_targets, metric, count = sum_over_processes(accelerator, *sums)
    if not count:
        raise DataError(
            f"the first {num_sequences} validation sequences hold no text to predict, expected"
            " some; raise runtime.validation_sequences or clean.validation_fraction"
        )
    return Validation(loss=loss / num_targets, metrics=objective.metrics(metric, count))
