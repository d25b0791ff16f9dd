"""The one training loop: a generator of steps. What to do with a step is up to who asks for it.

Shapes: B rows in a micro-batch, T positions.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from llm.config import OptimizationConfig
from llm.data.rows import Rows
from llm.errors import StageError
from llm.training.batches import Batch, make_batch, sample_rows
from llm.training.optimizers import Optimizer
from llm.training.processes import sum_over_processes
from llm.training.schedules import learning_rate_factor


@dataclass(kw_only=True, slots=True)
class TrainState:
    """How far training is: with weights and optimizer, all that a checkpoint needs.

    No generator is here because none is kept: whatever is random is a function of the seed and the
    step. Neither is the number of processes, which may change between two runs.
    """

    step: int = 0
    """Steps done."""
    tokens: int = 0
    """Positions read, padding included: rows times their length."""
    epoch: int = 0
    """Passes over the training rows completed."""
    row: int = 0
    """Rows read in the epoch under way."""
    skipped_steps: int = 0
    """Steps whose rows, on all processes, held nothing to learn; they changed no weight."""
    loss: float | None = None
    """Training loss of the last step that learned, in nats per token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What one step did, the same on every process."""

    step: int
    """Steps done, this one included."""
    tokens: int
    """Positions read in this step over all processes, padding included."""
    num_targets: int
    """Positions learned from, over all processes. 0: the step was skipped."""
    loss: float
    """Mean loss of these targets before the update, in nats per token."""
    gradient_norm: float
    """Norm of the whole gradient before clipping."""
    learning_rate: float
    """AdamW's learning rate in this step."""
    seconds: float
    """How long it took."""


def training_steps(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    rows: Rows,
    config: OptimizationConfig,
    state: TrainState,
    *,
    stage: str,
    seed: int,
    micro_batch_rows: int,
    is_stopping: Callable[[], bool],
) -> Iterator[Step]:
    """Train from `state` to `config.num_steps`; yield after each step, `state` brought up to date.

    `model` is a ModelWithLoss as Accelerate prepared it. Training ends early, between two steps and
    on all processes alike, when any of them is asked to stop; `state.step` is then below
    `config.num_steps`.

    Raises:
        StageError: loss or gradient is not finite. Weights and optimizer are as before that step.
    """
    model.train()
    while state.step < config.num_steps:
        started_at = time.perf_counter()
        batches = step_batches(rows, config, state.step, seed, accelerator, micro_batch_rows)
        # One message before any work: how many targets there are to divide by, and whether to stop.
        local_targets = sum(batch.num_targets() for batch in batches)
        num_targets, num_stopping = sum_over_processes(accelerator, local_targets, is_stopping())
        if num_stopping:
            return
        loss, gradient_norm = 0.0, 0.0
        factor = learning_rate_factor(state.step, config)
        if num_targets:
            loss = _accumulate_gradient(accelerator, model, batches, num_targets, config)
            norm = accelerator.clip_grad_norm_(model.parameters(), config.max_gradient_norm)
            gradient_norm = float(cast(Tensor, norm))
            # Both are sums over all processes, so all of them decide alike.
            if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
                optimizer.zero_grad()
                found = f"a loss of {loss} and a gradient norm of {gradient_norm}"
                raise divergence(stage, state.step + 1, found, config)
            optimizer.set_learning_rates(factor)
            optimizer.step()
            optimizer.zero_grad()
            state.loss = loss
        else:
            state.skipped_steps += 1
        state.step += 1
        state.tokens += config.rows_per_step * rows.seq_len
        state.epoch, state.row = divmod(state.step * config.rows_per_step, rows.num_rows)
        yield Step(
            step=state.step,
            tokens=config.rows_per_step * rows.seq_len,
            num_targets=int(num_targets),
            loss=loss,
            gradient_norm=gradient_norm,
            learning_rate=config.learning_rate * factor,
            seconds=time.perf_counter() - started_at,
        )


def _accumulate_gradient(
    accelerator: Accelerator,
    model: nn.Module,
    batches: Sequence[Batch],
    num_targets: float,
    config: OptimizationConfig,
) -> float:
    """Add up the gradient of the mean loss over all micro-batches and processes; return that loss.

    The mean is over all targets, whatever each micro-batch's share of padding: the sum of every
    token's loss over the number of tokens. DDP averages gradients over the processes, so that each
    loss is multiplied by their number to give the sum.
    """
    total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for number, batch in enumerate(batches, start=1):
        is_last = number == len(batches)  # processes exchange gradients once, in the last backward
        with nullcontext() if is_last else accelerator.no_sync(model):
            local = batch.to(accelerator.device)
            documents = local.document_ids if config.is_document_masked else None
            losses = model(local.inputs, local.targets, documents)  # (B, T)
            share = losses.sum() / num_targets
            accelerator.backward(share * accelerator.num_processes)
        total += share.detach()
    (loss,) = sum_over_processes(accelerator, total)
    return loss


def step_batches(
    rows: Rows,
    config: OptimizationConfig,
    step: int,
    seed: int,
    accelerator: Accelerator,
    micro_batch_rows: int,
) -> list[Batch]:
    """Return this process's micro-batches of `step`: its slice of the rows that all of them learn
    from.
    """
    per_process = config.rows_per_step // accelerator.num_processes
    first = step * config.rows_per_step + accelerator.process_index * per_process
    mine = sample_rows(seed, first, per_process, rows.num_rows)
    return [
        make_batch(rows.read(mine[start : start + micro_batch_rows]))
        for start in range(0, per_process, micro_batch_rows)
    ]


def divergence(stage: str, step: int, found: str, config: OptimizationConfig) -> StageError:
    """Return the error that says where training left the numbers, and what to try."""
    rate = "muon_learning_rate" if config.optimizer == "muon" else "learning_rate"
    advice = f"a lower {stage}.{rate} (now {getattr(config, rate):g})"
    advice += f" or more {stage}.warmup_steps (now {config.warmup_steps})"
    advice += f" or {stage}.precision=fp32" if config.precision != "fp32" else ""
    return StageError(
        f"{stage}: step {step} of {config.num_steps} gave {found}, expected finite numbers; try"
        f" {advice}"
    )
