"""Metrics of steps in flight: copied from the device to the host while the device goes on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class AsyncMetrics:
    """Numbers on their way from the device to the host, all in one copy."""

    def __init__(self, numbers: dict[str, Tensor]) -> None:
        """Start copying scalars."""
        self._names = list(numbers)
        self._arrival: torch.cuda.Event | None = None
        if not numbers:
            return
        # fp64 holds every fp32 loss and every count of steps exactly
        # one copy instead of up to eight
        stacked = torch.stack([number.double() for number in numbers.values()])
        self._numbers = stacked.to("cpu", non_blocking=True)
        if stacked.is_cuda:
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def read(self) -> dict[str, float]:
        """Wait for the copy and return the numbers by name."""
        if not self._names:
            return {}
        if self._arrival is not None:
            # an event, since a synchronized device would have finished the next step as well
            self._arrival.synchronize()
        return dict(zip(self._names, self._numbers.tolist(), strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInFlight:
    """A step given to the device, which may not have finished it."""

    number: int
    """Steps before it."""
    num_targets: int
    sums: Mapping[str, float]
    """As in StepBatches, over all processes."""
    means: Sequence[str]
    """Names of the objective's own among `metrics`."""
    started_at: float
    metrics: AsyncMetrics
