"""Weights kept beside those in training: their average over steps (EMA, snapshots), and the best.

The finished model holds them instead of the weights of the last step.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from llm.config import OptimizationConfig
from llm.model.weights import check_tensors

AVERAGE, BEST = "average", "best"  # first part of the names in a checkpoint


class KeptWeights:
    """Copies of the weights in training; empty until the first is due."""

    def __init__(self, model: nn.Module, config: OptimizationConfig) -> None:
        self._config = config
        # frozen weights never change, so their average is themselves: no memory for them
        # The parameters, not their tensors of now: Accelerate gives parameters other tensors when
        # it wraps a model for several processes.
        self._trained = {name: w for name, w in model.named_parameters() if w.requires_grad}
        self._copies: dict[str, dict[str, Tensor]] = {AVERAGE: {}, BEST: {}}

    @torch.no_grad()
    def update_average(self, step: int) -> None:
        """Add the weights after `step` steps to the average, if they are part of it."""
        # a step skipped for want of targets or by fp16's overflow counts too, with the weights as
        # they were: so a step in flight on a GPU needs no answer from it
        share = averaging_share(step, self._config)
        if share == 1.0:
            self._copies[AVERAGE] = {name: w.detach().clone() for name, w in self._trained.items()}
        elif share > 0.0:
            # fp32, like the weights. A running mean needs one copy, whatever the number of steps.
            # One call: on a GPU it is a few kernels for all weights, not one for each.
            average = [self._copies[AVERAGE][name] for name in self._trained]
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
                average, list(self._trained.values()), share
            )

    @contextmanager
    def averaged(self) -> Generator[None]:
        """Hold the average, if there is one, in the model; afterwards the weights in training."""
        self._swap_average()
        try:
            yield
        finally:
            self._swap_average()

    def keep_best(self) -> None:
        """Copy the model's weights as the best so far."""
        # to the host: they are read at the end and by checkpoints only
        trained = self._trained.items()
        self._copies[BEST] = {name: w.detach().to("cpu", copy=True) for name, w in trained}

    @torch.no_grad()
    def use(self) -> bool:
        """Put the best weights, else the average, into the model; tell whether there are any."""
        chosen = self._copies[BEST] or self._copies[AVERAGE]
        for name, weight in chosen.items():
            self._trained[name].copy_(weight)
        return bool(chosen)

    def state_dict(self) -> dict[str, Tensor]:
        """Return all copies by name: `average/blocks.0.attention.query.weight`."""
        return {
            f"{kind}/{name}": tensor
            for kind, tensors in self._copies.items()
            for name, tensor in tensors.items()
        }

    def load_state_dict(self, tensors: Mapping[str, Tensor], source: Path) -> None:
        """Load what `state_dict` returned.

        Raises:
            ArtifactError: the copies are those of other weights.
        """
        shapes = {name: weight.shape for name, weight in self._trained.items()}
        for kind in (AVERAGE, BEST):
            prefix = f"{kind}/"
            found = {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
            if found:  # none before the first is due
                check_tensors(found, shapes, source)
            self._copies[kind] = found
        # the best stay on the host
        for name, tensor in self._copies[AVERAGE].items():
            self._copies[AVERAGE][name] = tensor.to(self._trained[name].device)

    @torch.no_grad()
    def _swap_average(self) -> None:
        # in place: DDP, the optimizer and a compiled model hold on to the tensors
        for name, average in self._copies[AVERAGE].items():
            weight = self._trained[name]
            before = weight.clone()
            weight.copy_(average)
            average.copy_(before)


def averaging_share(step: int, config: OptimizationConfig) -> float:
    """Return how far the average moves towards the weights after `step` steps (from 1).

    1 starts the average, 0 leaves it: these weights are no part of it. It depends on the step
    alone, so nothing but the average itself must be saved.
    """
    if config.averaging == "ema":
        # Corrected for its start as in Adam (arXiv 1412.6980, section 3): without the correction
        # the weights before training would keep a share of decay^step, 0.9 after 100 steps.
        return (1.0 - config.ema_decay) / (1.0 - config.ema_decay**step)
    if config.averaging == "snapshots":
        # the latest ones, equally weighted: LAWA (arXiv 2209.14981)
        num_later, rest = divmod(config.num_steps - step, config.snapshot_every_steps)
        number = num_snapshots(config) - num_later  # 1 for the first of the average
        return 1.0 / number if not rest and number > 0 else 0.0
    return 0.0


def num_snapshots(config: OptimizationConfig) -> int:
    """Return how many snapshots are averaged: a short training has fewer than the setting."""
    # the weights before the first step are not one
    most = -(-config.num_steps // config.snapshot_every_steps)
    return min(config.averaged_snapshots, most)


def describe_weights(config: OptimizationConfig, best_step: int) -> str:
    """Return which weights the finished model holds; `best_step` is 0 without a selection."""
    averages = {
        "none": "last step",
        "ema": f"ema {config.ema_decay:g}",
        "snapshots": f"mean of {num_snapshots(config)} snapshots",
    }
    average = averages[config.averaging]
    if not best_step:
        return average
    best = f"best, step {best_step}"
    return best if config.averaging == "none" else f"{average}, {best}"
