"""Each step's training batches: sample packed sequences, make tensors, copy them to the device.

Shapes: B sequences, T positions.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import torch

from llm.config import OptimizationConfig
from llm.data.packed import PackedSequences
from llm.model.loss import IGNORED
from llm.runtime.prefetch import prefetch
from llm.training.objectives import Batch, Objective
from llm.training.sequences import Source, read_samples
from llm.training.shares import share_of

READ_TOKENS = 1 << 17  # 2 to 3 MB: small steps share the fixed cost of a read
POSITIONS = "positions"  # of StepBatches.sums: input positions, where a step's are not fixed
READS_AHEAD = 2  # one is being copied to the device while the next is read


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatches:
    """One process's share of one step."""

    micro_batches: Sequence[Batch]
    """On the device."""
    num_targets: int
    """Of all micro-batches together; counted on the host, which so need not wait for the device."""
    sums: Mapping[str, float] = field(default_factory=dict[str, float])
    """What else is added up over all processes: of the same names on each."""


def batches_of_steps(
    sequences: PackedSequences,
    objective: Objective,
    config: OptimizationConfig,
    *,
    seed: int,
    first_step: int,
    process: int,
    num_processes: int,
    micro_batch_size: int,
    device: torch.device,
    replay: Source | None = None,
) -> Generator[StepBatches]:
    """Yield one process's share of every step from `first_step` on.

    A thread prefetches and copies to the device; it ends when this generator is closed.
    """
    share = share_of(config.global_batch_size, process, num_processes)
    # Every process makes as many forward passes as the one with the largest share, all of one
    # shape: a compiled model compiles once, and no process waits for gradients never sent.
    largest = len(share_of(config.global_batch_size, num_processes - 1, num_processes))
    num_read = -(-largest // micro_batch_size) * micro_batch_size
    # a pass that is not full is filled with the sequences after it, their targets removed below
    indices = np.minimum(share.start + np.arange(num_read), config.global_batch_size - 1)
    replayed = [replay] if replay else []
    own = config.global_batch_size - sum(source.per_step for source in replayed)
    sources = [Source(sequences=sequences, seed=seed, per_step=own), *replayed]
    steps_at_once = max(1, READ_TOKENS // (num_read * sequences.seq_len))

    def read() -> Iterator[_Read]:
        for start in range(first_step, config.num_steps, steps_at_once):
            steps = np.arange(start, min(start + steps_at_once, config.num_steps))
            # global numbers: which process reads a sequence never changes what is in it
            samples = (steps[:, None] * config.global_batch_size + indices).ravel()
            batch = objective.make_batch(read_samples(sources, samples), samples)
            by_step = (len(steps), num_read)
            batch.targets.unflatten(0, by_step)[:, len(share) :] = IGNORED
            # after the line above, so that filled-up sequences count nothing
            num_targets = objective.count_targets(batch).unflatten(0, by_step).sum(dim=1)
            yield _Read(batch, num_targets.tolist())

    on_device = read() if device.type == "cpu" else _copied(read(), device)
    with closing(prefetch(on_device, READS_AHEAD)) as reads:
        for found in reads:
            batch = found.arrived()
            for number, num_targets in enumerate(found.num_targets):
                starts = range(number * num_read, (number + 1) * num_read, micro_batch_size)
                yield StepBatches(
                    micro_batches=[batch.sequences(start, micro_batch_size) for start in starts],
                    num_targets=num_targets,
                )


@dataclass(frozen=True, slots=True)
class _Read:
    """The sequences of some steps, perhaps still being copied to the device."""

    batch: Batch
    num_targets: Sequence[int]
    """Of each step."""
    arrival: torch.cuda.Event | None = None

    def arrived(self) -> Batch:
        """Return the batch; the device's current stream waits for the copy, the host does not."""
        if self.arrival is not None:
            stream = torch.cuda.current_stream(self.batch.inputs.device)
            stream.wait_event(self.arrival)
            for tensor in self.batch.tensors():
                # the allocator would reuse the memory of a tensor of another stream too early
                tensor.record_stream(stream)
        return self.batch


def _copied(reads: Iterator[_Read], device: torch.device) -> Iterator[_Read]:
    """Copy to a GPU in a stream of its own, while the GPU computes."""
    # a copy in the default stream would wait behind the forward passes given to the device
    stream = torch.cuda.Stream(device)
    for read in reads:
        with torch.cuda.stream(stream):  # the current stream is per thread: never across a yield
            batch, arrival = read.batch.to(device), torch.cuda.Event()
            arrival.record(stream)
        yield _Read(batch, read.num_targets, arrival)
