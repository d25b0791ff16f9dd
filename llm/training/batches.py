"""Which rows a step learns from, and what is to be learned from them, as tensors.

Shapes: B rows, T positions.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm.config import OptimizationConfig
from llm.data.packed import PackedArrays, PackedSequences, sequence_order
from llm.model.loss import IGNORED
from llm.model.masked_lm import Masking
from llm.runtime.prefetch import prefetch

TOKENS_AT_ONCE = 1 << 17  # 2 to 3 MB, and what a read costs is shared by many small steps
READS_AHEAD = 2  # one on its way to the device while the next is read


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Some rows, ready to be learned from."""

    inputs: Tensor
    """(B, T): the tokens the model reads."""
    targets: Tensor
    """(B, T): the token it is to say at each position, or IGNORED."""
    document_ids: Tensor | None
    """(B, T): the document each input is of, where attention stays within it. Where attention
    looks both ways always, so that padding is left out.
    """

    def rows(self, start: int, count: int) -> "Batch":
        """Return the `count` rows from `start` on."""
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

    def tensors(self) -> list[Tensor]:
        """Return what the batch is made of."""
        parts = (self.inputs, self.targets, self.document_ids)
        return [tensor for tensor in parts if tensor is not None]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatches:
    """What one process learns from in one step."""

    micro_batches: Sequence[Batch]
    """On the device."""
    num_targets: int
    """Positions learned, of all of them; counted on the host, which so needs not wait."""


class Objective(Protocol):
    """What a model learns from rows."""

    def __call__(self, arrays: PackedArrays, samples: npt.NDArray[np.int64]) -> Batch:
        """Make a batch of rows (B, T+1); `samples` (B,) numbers them in training's sequence."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class NextToken:
    """Causal language modeling: each position's target is the token after it."""

    document_mask: bool

    def __call__(self, arrays: PackedArrays, samples: npt.NDArray[np.int64]) -> Batch:
        """Shift rows against themselves."""
        targets = np.where(arrays.mask[:, 1:], arrays.tokens[:, 1:], IGNORED)
        documents = torch.from_numpy(arrays.document_ids[:, :-1])  # (B, T+1) -> (B, T)
        return Batch(
            inputs=torch.from_numpy(arrays.tokens[:, :-1]),  # (B, T+1) -> (B, T)
            targets=torch.from_numpy(targets),  # (B, T+1) -> (B, T)
            document_ids=documents if self.document_mask else None,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedTokens:
    """Masked language modeling: a position's target is its own token, which may be hidden.

    What the mask of the rows marks can be hidden: of chats the answers, of text all but a row's
    first token, which ends the row before.
    """

    document_mask: bool
    masking: Masking

    def __call__(self, arrays: PackedArrays, samples: npt.NDArray[np.int64]) -> Batch:
        """Hide some tokens."""
        inputs, targets = self.masking.hide(arrays.tokens[:, :-1], arrays.mask[:, :-1], samples)
        ids = arrays.attention_ids(self.document_mask)[:, :-1]  # (B, T+1) -> (B, T)
        return Batch(
            inputs=torch.from_numpy(inputs),
            targets=torch.from_numpy(targets),
            document_ids=torch.from_numpy(ids),
        )


def batches_of_steps(
    rows: PackedSequences,
    objective: Objective,
    config: OptimizationConfig,
    *,
    seed: int,
    first_step: int,
    process: int,
    num_processes: int,
    micro_batch_size: int,
    device: torch.device,
) -> Generator[StepBatches]:
    """Yield, step after step, what one process learns from: its share of the step's sequences.

    Every process makes as many passes as the one with the largest share, all of one shape: a
    compiled model compiles once, and no process waits for gradients that another never sends. Where
    a pass is not full, other sequences of the step fill it, with no position to learn from.

    A thread reads ahead, rows of many small steps at once, and starts their way to the device.
    What is yielded does not depend on it. It ends when this generator is closed.
    """
    share = share_of(config.global_batch_size, process, num_processes)
    largest = len(share_of(config.global_batch_size, num_processes - 1, num_processes))
    num_read = -(-largest // micro_batch_size) * micro_batch_size
    indices = np.minimum(share.start + np.arange(num_read), config.global_batch_size - 1)
    steps_at_once = max(1, TOKENS_AT_ONCE // (num_read * rows.seq_len))

    def read() -> Iterator[_Read]:
        for start in range(first_step, config.num_steps, steps_at_once):
            steps = np.arange(start, min(start + steps_at_once, config.num_steps))
            samples = (steps[:, None] * config.global_batch_size + indices).ravel()
            batch = objective(rows.read(sample_sequences(seed, samples, rows.num_rows)), samples)
            targets = batch.targets.unflatten(0, (len(steps), num_read))
            targets[:, len(share) :] = IGNORED
            num_targets = (targets != IGNORED).sum(dim=(1, 2))
            yield _Read(batch, num_targets.tolist())

    on_device = read() if device.type == "cpu" else _sent(read(), device)
    with closing(prefetch(on_device, READS_AHEAD)) as reads:
        for found in reads:
            batch = found.arrived()
            for number, num_targets in enumerate(found.num_targets):
                starts = range(number * num_read, (number + 1) * num_read, micro_batch_size)
                yield StepBatches(
                    micro_batches=[batch.rows(start, micro_batch_size) for start in starts],
                    num_targets=num_targets,
                )


def share_of(num_sequences: int, process: int, num_processes: int) -> range:
    """Return which of a step's sequences a process learns from. Shares differ by one at most, and
    the last process has a largest one.
    """
    return range(
        process * num_sequences // num_processes, (process + 1) * num_sequences // num_processes
    )


def even_size(num_sequences: int, room: int) -> int:
    """Return how many sequences a pass takes, at most `room`, so that all passes take as many.

    Of the sizes over half of what there is room for, the one that leaves the least of the last pass
    empty; the largest of these. So it divides `num_sequences` wherever such a size does.
    """
    room = min(room, num_sequences)
    return min(range(room // 2 + 1, room + 1), key=lambda size: (-num_sequences % size, -size))


def sample_sequences(
    seed: int, samples: npt.NDArray[np.int64], num_rows: int
) -> npt.NDArray[np.int64]:
    """Return the rows that stand at places `samples` of training's endless sequence.

    The sequence is epoch after epoch, each a permutation of all rows; a step that begins in one
    epoch ends in the next, so no row is ever dropped. A function of its arguments alone: nothing to
    save, and the same whatever the number of processes.
    """
    epochs, places = samples // num_rows, samples % num_rows
    rows = np.empty(len(samples), dtype=np.int64)
    for epoch in np.unique(epochs):
        is_in_epoch = epochs == epoch
        rows[is_in_epoch] = sequence_order(seed, int(epoch), places[is_in_epoch], num_rows)
    return rows


@dataclass(frozen=True, slots=True)
class _Read:
    """The rows of some steps, perhaps on their way to the device still."""

    batch: Batch
    num_targets: Sequence[int]
    """Of each step."""
    arrival: torch.cuda.Event | None = None

    def arrived(self) -> Batch:
        """Return the batch for use by what the device is given from now on."""
        if self.arrival is not None:
            user = torch.cuda.current_stream(self.batch.inputs.device)
            user.wait_event(self.arrival)
            for tensor in self.batch.tensors():
                tensor.record_stream(user)  # else its memory is taken anew while still in use
        return self.batch


def _sent(reads: Iterator[_Read], device: torch.device) -> Iterator[_Read]:
    """Send what is read to a GPU, beside what it is computing."""
    stream = torch.cuda.Stream(device)
    for read in reads:
        with torch.cuda.stream(stream):  # is set by thread, so never across a yield
            batch, arrival = read.batch.to(device), torch.cuda.Event()
            arrival.record(stream)
        yield _Read(batch, read.num_targets, arrival)
