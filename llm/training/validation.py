"""Validation: measure a model on held-out sequences while it trains.

Shapes: V vocabulary.
"""

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
    """The objective's other metrics by name, such as `bits_per_byte`."""


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
    # on the device: read once at the end, not after each batch
    sums: dict[str, Tensor] = {}
    model.eval()  # no dropout
    size = even_size(len(mine), max_batch_size) if len(mine) else 1
    # one batch without targets where a process has no sequence: it too must know the names
    for start in range(0, max(len(mine), 1), size):
        some = mine[start : start + size]
        # filled up with the first sequence: a compiled model would compile every other shape anew
        filled = np.pad(some, (0, size - len(some)))
        # sample numbers are those of the sequences: each validation masks the same tokens
        batch = objective.make_batch(sequences.read(filled), filled)
        batch.targets[len(some) :] = IGNORED
        with autocast(precision, device.type):
            found = objective.measure(model, batch.to(device), bytes_of)
        sums = {name: sums.get(name, 0.0) + both for name, both in found.items()}
    model.train()
    # sums, not means: the processes have unequal numbers of targets
    flat = sum_over_processes(accelerator, *torch.cat(list(sums.values())))
    totals, counts = flat[0::2], flat[1::2]
    if not all(counts):
        raise DataError(
            f"the first {num_sequences} validation sequences hold no text to predict, expected"
            " some; raise runtime.validation_sequences or clean.validation_fraction"
        )
    means = {name: totals[n] / counts[n] for n, name in enumerate(sums)}
    return Validation(loss=means.pop("loss"), metrics=means)
