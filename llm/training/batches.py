"""Which rows a step learns from, and those rows as tensors.

Shapes: B rows, T positions.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm.data.rows import RowArrays, row_order
from llm.model.loss import IGNORED


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Some rows, ready to be learned from."""

    inputs: Tensor
    """(B, T): the tokens the model reads."""
    targets: Tensor
    """(B, T): the token that comes next at each position, or IGNORED."""
    document_ids: Tensor
    """(B, T): the document each input is of."""

    def num_targets(self) -> int:
        """Count the positions that are learned."""
        return int((self.targets != IGNORED).sum())

    def to(self, device: torch.device) -> "Batch":
        """Return this batch on `device`."""
        return Batch(
            inputs=self.inputs.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
            document_ids=self.document_ids.to(device, non_blocking=True),
        )


def make_batch(arrays: RowArrays) -> Batch:
    """Shift rows against themselves: each position's target is the token after it."""
    targets = np.where(arrays.mask[:, 1:], arrays.tokens[:, 1:], IGNORED)
    return Batch(
        inputs=torch.from_numpy(arrays.tokens[:, :-1]),  # (B, T+1) -> (B, T)
        targets=torch.from_numpy(targets),  # (B, T+1) -> (B, T)
        document_ids=torch.from_numpy(arrays.document_ids[:, :-1]),  # (B, T+1) -> (B, T)
    )


def sample_rows(seed: int, first: int, count: int, num_rows: int) -> npt.NDArray[np.int64]:
    """Return the rows of samples `first` .. `first + count - 1` of training's endless sequence.

    The sequence is epoch after epoch, each a permutation of all rows; a step that begins in one
    epoch ends in the next, so no row is ever dropped. A function of its arguments alone: nothing to
    save, and the same whatever the number of processes.
    """
    samples = np.arange(first, first + count)
    epochs, places = samples // num_rows, samples % num_rows
    rows = np.empty(count, dtype=np.int64)
    for epoch in np.unique(epochs):
        is_in_epoch = epochs == epoch
        rows[is_in_epoch] = row_order(seed, int(epoch), places[is_in_epoch], num_rows)
    return rows
