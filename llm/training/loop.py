"""The one training loop: a generator of steps. What to do with a step is up to who asks for it.

A GPU is never waited for in vain: while it computes a step, the host gives it the next one, and
reads the figures of a step when they are there. So a step is yielded while the next one runs,
unless the caller said that it wants to look at the weights then.

Shapes: B rows in a micro-batch, T positions.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from llm.config import OptimizationConfig
from llm.data.packed import PackedSequences
from llm.errors import StageError
from llm.model.precision import FIRST_LOSS_SCALE, LossScale, autocast, computed_precision
from llm.runtime.failpoints import failpoint
from llm.seeds import derive_seed
from llm.training.batches import Batch, Objective, StepBatches, batches_of_steps
from llm.training.optimizers import Optimizer
from llm.training.processes import sum_on_devices, sum_over_processes
from llm.training.schedules import learning_rate_factor

UPDATE_NORM_EVERY_STEPS = 10  # it costs a copy of the weights
STEPS_AHEAD = {"cpu": 0, "cuda": 1}  # given to the device while one is not known to be done


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
    """Steps that changed no weight: their rows, on all processes, held nothing to learn, or their
    gradient was too large for fp16.
    """
    loss: float | None = None
    """Training loss of the last step that learned, in nats per token."""
    loss_scale: float = FIRST_LOSS_SCALE
    """fp16: what losses are multiplied by."""
    loss_scale_steps: int = 0
    """fp16: steps since that last changed."""


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
    """Norm of the whole gradient before clipping. Not finite: too large for fp16, and skipped."""
    learning_rate: float
    """AdamW's learning rate in this step."""
    loss_scale: float | None
    """What the loss was multiplied by, under fp16."""
    update_norm: float | None
    """Norm of the change of all weights; measured in every tenth step."""
    weight_norm: float | None
    """Norm of all weights after the step; measured with it."""
    seconds: float
    """How long it took."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """What a training is made of, put together."""

    accelerator: Accelerator
    model: nn.Module
    """A ModelWithLoss as Accelerate prepared it."""
    optimizer: Optimizer
    rows: PackedSequences
    objective: Objective
    config: OptimizationConfig
    stage: str
    seed: int
    """Decides which rows a step reads, and what dropout drops."""
    micro_batch_size: int


def training_steps(
    training: Training,
    state: TrainState,
    *,
    is_stopping: Callable[[], bool],
    is_looked_at: Callable[[int], bool] = lambda step: True,
) -> Generator[Step]:
    """Train from `state` to `config.num_steps`; yield every step, `state` brought up to date.

    The weights are those of the yielded step where `is_looked_at` says so of its number; elsewhere
    a GPU may be a step ahead. Training ends early, between two steps and on all processes alike,
    when any of them is asked to stop; `state.step` is then below `config.num_steps`.

    Raises:
        StageError: loss or gradient is not finite. Weights and optimizer are as before that step.
    """
    training.model.train()
    worker = _Worker(training, state)
    num_ahead = STEPS_AHEAD[training.accelerator.device.type]
    under_way: deque[_StepUnderWay] = deque()
    last = training.config.num_steps
    with closing(worker.batches()) as batches:
        for number in range(state.step, last):
            started_at = time.perf_counter()
            mine = next(batches)
            # One message before any work: how many targets to divide by, and whether to stop.
            num_targets, num_stopping = sum_over_processes(
                training.accelerator, mine.num_targets, is_stopping()
            )
            if num_stopping:
                break
            micro_batches = mine.micro_batches
            under_way.append(worker.start(number, micro_batches, int(num_targets), started_at))
            is_awaited = number + 1 == last or is_looked_at(number + 1)
            while len(under_way) > (0 if is_awaited else num_ahead):
                yield worker.finish(under_way.popleft(), state)
    while under_way:
        yield worker.finish(under_way.popleft(), state)


@dataclass(frozen=True, kw_only=True, slots=True)
class _StepUnderWay:
    """A step given to the device, which may not have done it yet."""

    number: int
    """Steps done before it."""
    num_targets: int
    started_at: float
    figures: "_Figures"


class _Figures:
    """Numbers on their way from the device to the host."""

    def __init__(self, numbers: dict[str, Tensor]) -> None:
        self._names = list(numbers)
        self._arrival: torch.cuda.Event | None = None
        if not numbers:
            return
        sent = torch.stack([number.double() for number in numbers.values()])
        self._numbers = sent.to("cpu", non_blocking=True)
        if sent.is_cuda:
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def read(self) -> dict[str, float]:
        """Wait for the numbers, and for nothing that the device was given after them."""
        if not self._names:
            return {}
        if self._arrival is not None:
            self._arrival.synchronize()
        return dict(zip(self._names, self._numbers.tolist(), strict=True))


class _Worker:
    """Does steps, and holds what lives on the device from one to the next."""

    def __init__(self, training: Training, state: TrainState) -> None:
        self._training, self._first_step = training, state.step
        self._device = device = training.accelerator.device
        self._parameters = list(training.model.parameters())
        is_fp16 = computed_precision(training.config.precision, device.type) == "fp16"
        self._loss_scale = (
            LossScale(state.loss_scale, state.loss_scale_steps, device) if is_fp16 else None
        )
        # 1 once a loss or gradient was not finite: no step changes anything after that
        self._has_failed = torch.zeros((), device=device)
        self._last_done_at = 0.0

    def batches(self) -> Generator[StepBatches]:
        """Yield what this process learns from, step after step."""
        training, accelerator = self._training, self._training.accelerator
        return batches_of_steps(
            training.rows,
            training.objective,
            training.config,
            seed=training.seed,
            first_step=self._first_step,
            process=accelerator.process_index,
            num_processes=accelerator.num_processes,
            micro_batch_size=training.micro_batch_size,
            device=self._device,
        )

    def start(
        self, number: int, batches: Sequence[Batch], num_targets: int, started_at: float
    ) -> _StepUnderWay:
        """Give the device all the work of a step."""
        figures: dict[str, Tensor] = {}
        if num_targets:
            self._seed_dropout(number)
            figures["loss"] = self._accumulate_gradient(batches, num_targets)
            figures |= self._update(number, figures["loss"])
        return _StepUnderWay(
            number=number,
            num_targets=num_targets,
            started_at=started_at,
            figures=_Figures(figures),
        )

    def finish(self, under_way: _StepUnderWay, state: TrainState) -> Step:
        """Wait until a step is done and bring `state` up to it.

        Raises:
            StageError: its loss or gradient is not finite.
        """
        training, config = self._training, self._training.config
        figures = under_way.figures.read()
        loss, norm = figures.get("loss", 0.0), figures.get("gradient_norm", 0.0)
        if figures.get("has_failed"):
            training.optimizer.zero_grad()
            found = f"a loss of {loss} and a gradient norm of {norm}"
            raise divergence(training.stage, under_way.number + 1, found, config)
        if figures.get("is_void", 1.0):
            state.skipped_steps += 1
        else:
            state.loss = loss
        state.loss_scale = figures.get("next_loss_scale", state.loss_scale)
        state.loss_scale_steps = int(figures.get("loss_scale_steps", state.loss_scale_steps))
        state.step = under_way.number + 1
        num_tokens = config.global_batch_size * training.rows.seq_len
        state.tokens += num_tokens
        state.epoch, state.row = divmod(
            state.step * config.global_batch_size, training.rows.num_rows
        )
        done_at = time.perf_counter()
        # the device began when it was given the step, or was done with the one before
        began_at, self._last_done_at = max(under_way.started_at, self._last_done_at), done_at
        return Step(
            step=state.step,
            tokens=num_tokens,
            num_targets=under_way.num_targets,
            loss=loss,
            gradient_norm=norm,
            learning_rate=config.learning_rate * learning_rate_factor(under_way.number, config),
            loss_scale=figures.get("loss_scale"),
            update_norm=figures.get("update_norm"),
            weight_norm=figures.get("weight_norm"),
            seconds=done_at - began_at,
        )

    def _seed_dropout(self, number: int) -> None:
        """Make what is dropped a function of the seed, the step and the process."""
        process = self._training.accelerator.process_index
        seed = derive_seed(self._training.seed, "dropout", number, process)
        torch.default_generator.manual_seed(seed)
        if self._device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _accumulate_gradient(self, batches: Sequence[Batch], num_targets: int) -> Tensor:
        """Add up the gradient of the mean loss over all micro-batches and processes; return that
        loss.

        The mean is over all targets, whatever each micro-batch's share of padding: the sum of every
        token's loss over the number of tokens. DDP averages gradients over the processes, so that
        each loss is multiplied by their number to give the sum.
        """
        accelerator, model = self._training.accelerator, self._training.model
        factor: float | Tensor = accelerator.num_processes
        if self._loss_scale is not None:
            factor = factor * self._loss_scale.scale
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for number, batch in enumerate(batches, start=1):
            is_last = number == len(batches)  # gradients are exchanged once, in the last backward
            with nullcontext() if is_last else accelerator.no_sync(model):
                with autocast(self._training.config.precision, self._device.type):
                    losses = model(batch.inputs, batch.targets, batch.document_ids)  # (B, T)
                share = failpoint("training.loss", losses.sum() / num_targets)
                accelerator.backward(failpoint("training.gradient", share * factor))
            total += share.detach()
        return sum_on_devices(accelerator, total)

    @torch.no_grad()
    def _update(self, number: int, loss: Tensor) -> dict[str, Tensor]:
        """Clip the gradient and take the step, or none where it is not finite, as the device finds.

        Loss and gradient are sums over all processes, so all of them find alike.
        """
        config, optimizer = self._training.config, self._training.optimizer
        if self._loss_scale is not None:
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(self._loss_scale.scale)
        norm = nn.utils.clip_grad_norm_(self._parameters, config.max_gradient_norm)
        figures = {"gradient_norm": norm, **self._judge(loss, norm)}
        is_measured = (number + 1) % UPDATE_NORM_EVERY_STEPS == 0
        before = [weight.clone() for weight in self._parameters] if is_measured else []
        optimizer.set_learning_rates(learning_rate_factor(number, config))
        optimizer.step(figures["is_void"])
        optimizer.zero_grad()
        if is_measured:
            changes = [now - old for now, old in zip(self._parameters, before, strict=True)]
            figures["update_norm"] = nn.utils.get_total_norm(changes)
            figures["weight_norm"] = nn.utils.get_total_norm(self._parameters)
        return figures

    def _judge(self, loss: Tensor, norm: Tensor) -> dict[str, Tensor]:
        """Decide on the device whether the step counts, and whether training has failed."""
        is_overflow = 1.0 - torch.isfinite(norm).float()
        is_failure = 1.0 - torch.isfinite(loss).float()
        figures: dict[str, Tensor] = {}
        if self._loss_scale is None:
            is_failure = torch.maximum(is_failure, is_overflow)
        else:  # fp16 is expected to overflow now and then, but not unscaled
            scale = self._loss_scale.scale
            figures["loss_scale"] = scale
            is_failure = torch.maximum(is_failure, is_overflow * (scale <= 1.0).float())
            self._loss_scale.update(is_overflow)
            figures["next_loss_scale"] = self._loss_scale.scale
            figures["loss_scale_steps"] = self._loss_scale.num_steps
        self._has_failed = torch.maximum(self._has_failed, is_failure)
        is_void = torch.maximum(self._has_failed, is_overflow)
        return figures | {"has_failed": self._has_failed, "is_void": is_void}


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
