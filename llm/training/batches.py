"""Which rows a step learns from, and what is to be learned from them, as tensors.

Shapes: B rows, T positions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm.config import OptimizationConfig
from llm.data.rows import RowArrays, Rows, row_order
from llm.model.loss import IGNORED
from llm.model.masking import Masking

TOKENS_AT_ONCE = 1 << 17  # read ahead: 4 MB, and what a read costs is shared by many small steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Some rows, ready to be learned from."""

    inputs: Tensor
    """(B, T): the tokens the model reads."""
    targets: Tensor
    """(B, T): the token it is to say at each position, or IGNORED."""
    document_ids: Tensor | None
    """(B, T): the document each input is of, where attention stays within it."""

    def num_targets(self) -> int:
        """Count the positions that are learned."""
        return int((self.targets != IGNORED).sum())

    def rows(self, start: int, count: int) -> "Batch":
        """Return the `count` rows from `start` on, fewer at the end."""
        documents = self.document_ids
        return Batch(
            inputs=self.inputs[start : start + count],
            targets=self.targets[start : start + count],
            document_ids=None if documents is None else documents[start : start + count],
        )

    def to(self, device: torch.device) -> "Batch":
        """Return this batch on `device`, on its way there while the host goes on."""
        if device.type == "cpu":
            return self

        def send(tensor: Tensor) -> Tensor:  # only from pinned memory does the host not wait
            return tensor.pin_memory().to(device, non_blocking=True)

        documents = self.document_ids
        return Batch(
            inputs=send(self.inputs),
            targets=send(self.targets),
            document_ids=None if documents is None else send(documents),
        )


class Objective(Protocol):
    """What a model learns from rows."""

    def __call__(self, arrays: RowArrays, samples: npt.NDArray[np.int64]) -> Batch:
        """Make a batch of rows (B, T+1); `samples` (B,) numbers them in training's sequence."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class NextToken:
    """Causal language modeling: each position's target is the token after it."""

    is_document_masked: bool

    def __call__(self, arrays: RowArrays, samples: npt.NDArray[np.int64]) -> Batch:
        """Shift rows against themselves."""
        targets = np.where(arrays.mask[:, 1:], arrays.tokens[:, 1:], IGNORED)
        return Batch(
            inputs=torch.from_numpy(arrays.tokens[:, :-1]),  # (B, T+1) -> (B, T)
            targets=torch.from_numpy(targets),  # (B, T+1) -> (B, T)
            document_ids=_documents(arrays, self.is_document_masked),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedTokens:
    """Masked language modeling: a position's target is its own token, which may be hidden.

    What the mask of the rows marks can be hidden: of chats the answers, of text all but a row's
    first token, which ends the row before.
    """

    is_document_masked: bool
    masking: Masking

    def __call__(self, arrays: RowArrays, samples: npt.NDArray[np.int64]) -> Batch:
        """Hide some tokens."""
        inputs, targets = self.masking.hide(arrays.tokens[:, :-1], arrays.mask[:, :-1], samples)
        return Batch(
            inputs=torch.from_numpy(inputs),
            targets=torch.from_numpy(targets),
            document_ids=_documents(arrays, self.is_document_masked),
        )


def batches_of_steps(
    rows: Rows,
    objective: Objective,
    config: OptimizationConfig,
    *,
    seed: int,
    first_step: int,
    process: int,
    num_processes: int,
    micro_batch_rows: int,
) -> Iterator[list[Batch]]:
    """Yield, step after step, the micro-batches of one process: its slice of the step's rows.

    Rows of many small steps are read at once.
    """
    per_process = config.rows_per_step // num_processes
    steps_at_once = max(1, TOKENS_AT_ONCE // (per_process * rows.seq_len))
    for start in range(first_step, config.num_steps, steps_at_once):
        steps = np.arange(start, min(start + steps_at_once, config.num_steps))
        firsts = steps * config.rows_per_step + process * per_process
        samples = (firsts[:, None] + np.arange(per_process)).ravel()
        batch = objective(rows.read(sample_rows(seed, samples, rows.num_rows)), samples)
        for place in range(0, len(samples), per_process):
            mine = batch.rows(place, per_process)
            yield [
                mine.rows(row, micro_batch_rows) for row in range(0, per_process, micro_batch_rows)
            ]


def sample_rows(seed: int, samples: npt.NDArray[np.int64], num_rows: int) -> npt.NDArray[np.int64]:
    """Return the rows that stand at places `samples` of training's endless sequence.

    The sequence is epoch after epoch, each a permutation of all rows; a step that begins in one
    epoch ends in the next, so no row is ever dropped. A function of its arguments alone: nothing to
    save, and the same whatever the number of processes.
    """
    epochs, places = samples // num_rows, samples % num_rows
    rows = np.empty(len(samples), dtype=np.int64)
    for epoch in np.unique(epochs):
        is_in_epoch = epochs == epoch
        rows[is_in_epoch] = row_order(seed, int(epoch), places[is_in_epoch], num_rows)
    return rows


def _documents(arrays: RowArrays, is_document_masked: bool) -> Tensor | None:
    return torch.from_numpy(arrays.document_ids[:, :-1]) if is_document_masked else None
