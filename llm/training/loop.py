"""The training loop: a generator of optimizer steps, one step ahead of the GPU.

While the GPU computes a step, the host gives it the next one and reads a step's metrics only when
they are ready. So a step is yielded while the next one runs, unless the caller needs the weights.

Shapes: B sequences in a micro-batch, T positions.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from llm.config import OptimizationConfig
from llm.data.packed import PackedSequences
from llm.errors import StageError
from llm.model.precision import autocast, computed_precision
from llm.runtime.failpoints import failpoint
from llm.seeds import derive_seed
from llm.training.async_metrics import AsyncMetrics, StepInFlight
from llm.training.batches import POSITIONS, StepBatches, batches_of_steps
from llm.training.kept_weights import KeptWeights
from llm.training.loss_scale import INITIAL_LOSS_SCALE, LossScale, StepGuard
from llm.training.objectives import Batch, Objective, OnPolicyObjective
from llm.training.optimizers import Optimizer
from llm.training.processes import sum_on_devices, sum_over_processes
from llm.training.schedules import learning_rate_factor
from llm.training.sequences import Source

UPDATE_NORM_EVERY_STEPS = 10  # measuring it takes a copy of the weights
# Steps in flight beside the one that is awaited. One hides the host's work; more would only make
# stopping slower. A CPU is the host itself.
STEPS_AHEAD = {"cpu": 0, "cuda": 1}


@dataclass(kw_only=True, slots=True)
class TrainState:
    """How far training is: with weights and optimizer state, all that a checkpoint needs.

    The names of the fields are those in a checkpoint's state.json.
    """

    # No random generator: everything random is a function of the seed and the step. No number of
    # processes either: it may change when training resumes.

    step: int = 0
    """Steps done."""
    tokens: int = 0
    """Input positions, padding included: sequences times their length."""
    epoch: int = 0
    """Completed passes over the training sequences; replayed ones do not count."""
    row: int = 0
    """Sequences read in the current epoch."""
    skipped_steps: int = 0
    """Steps that changed no weight: no targets on any process, or a gradient that overflowed fp16.
    """
    loss: float | None = None
    """Training loss of the last step that was not skipped, in nats per target."""
    loss_scale: float = INITIAL_LOSS_SCALE
    """fp16: the factor of the loss."""
    loss_scale_steps: int = 0
    """fp16: steps since `loss_scale` last changed."""
    best_step: int = 0
    """Step of the best weights so far; 0: none yet."""
    best_loss: float | None = None
    """Their validation loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Metrics of one step, the same on every process."""

    step: int
    """Steps done, this one included."""
    tokens: int
    """Input positions of this step over all processes, padding included."""
    num_targets: int
    """Targets over all processes. 0: the step was skipped."""
    loss: float
    """Mean loss of these targets before the update; in nats for tokens."""
    gradient_norm: float
    """Norm of the whole gradient before clipping. Not finite: overflow of fp16, step skipped."""
    learning_rate: float
    """AdamW's learning rate."""
    loss_scale: float | None
    """The loss scale, under fp16."""
    update_norm: float | None
    """Norm of the change of all weights; measured every tenth step."""
    weight_norm: float | None
    """Norm of all weights after the step; measured with it."""
    metrics: Mapping[str, float]
    """What else the objective measured, by name."""
    seconds: float
    """Duration."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSetup:
    """The parts of a training."""

    accelerator: Accelerator
    model: nn.Module
    """A ModelWithObjective as Accelerate prepared it."""
    optimizer: Optimizer
    sequences: PackedSequences
    objective: Objective
    config: OptimizationConfig
    stage: str
    seed: int
    """Decides the order of the sequences, and dropout."""
    micro_batch_size: int
    replay: Source | None = None
    """Of `global_batch_size`; the other sequences of a step are those of `sequences`."""
    kept: KeptWeights | None = None
    """Takes the weights of each step into their average."""


def training_steps(
    training: TrainingSetup,
    state: TrainState,
    *,
    is_stopping: Callable[[], bool],
    needs_weights: Callable[[int], bool] = lambda step: True,
) -> Generator[Step]:
    """Train from `state` to `config.num_steps`; yield each step with `state` updated to it.

    When `needs_weights(step)`, the model holds that step's weights as it is yielded; else a GPU may
    be a step ahead. Ends early, on all processes at the same step, when `is_stopping` on any.

    Raises:
        StageError: loss or gradient is not finite. Weights and optimizer are as before that step.
    """
    training.model.train()
    worker = _Worker(training, state)
    num_ahead = STEPS_AHEAD[training.accelerator.device.type]
    in_flight: deque[StepInFlight] = deque()
    last = training.config.num_steps
    with closing(worker.batches()) as batches:
        for number in range(state.step, last):
            started_at = time.perf_counter()
            mine = next(batches)
            # One message before any work: the number of targets to divide by, and whether to stop.
            # It goes between hosts (gloo), so it does not wait for the GPU either.
            num_targets, num_stopping, *sums = sum_over_processes(
                training.accelerator, mine.num_targets, is_stopping(), *mine.sums.values()
            )
            if num_stopping:
                break
            known = dict(zip(mine.sums, sums, strict=True))
            in_flight.append(worker.start(number, mine, int(num_targets), known, started_at))
            is_awaited = number + 1 == last or needs_weights(number + 1)
            while len(in_flight) > (0 if is_awaited else num_ahead):
                yield worker.finish(in_flight.popleft(), state)
    # after a stop: the steps given to the device are done, and must count
    while in_flight:
        yield worker.finish(in_flight.popleft(), state)


class _Worker:
    """Runs steps, and holds what stays on the device between them."""

    def __init__(self, training: TrainingSetup, state: TrainState) -> None:
        self._training, self._first_step = training, state.step
        self._device = device = training.accelerator.device
        # the order is that of the modules on every process: clipping sums norms in this order
        # without frozen ones, which have no gradient and never change
        self._parameters = [p for p in training.model.parameters() if p.requires_grad]
        is_fp16 = computed_precision(training.config.precision, device.type) == "fp16"
        loss_scale = LossScale(state.loss_scale, state.loss_scale_steps, device)
        self._guard = StepGuard(loss_scale if is_fp16 else None, device)
        self._last_done_at = 0.0

    def batches(self) -> Generator[StepBatches]:
        """Yield this process's share of each step."""
        training, accelerator = self._training, self._training.accelerator
        if isinstance(training.objective, OnPolicyObjective):
            # in this thread, when the next step is asked for: after the update before it
            return training.objective.sampled_steps(self._first_step)
        return batches_of_steps(
            training.sequences,
            training.objective,
            training.config,
            seed=training.seed,
            first_step=self._first_step,
            process=accelerator.process_index,
            num_processes=accelerator.num_processes,
            micro_batch_size=training.micro_batch_size,
            device=self._device,
            replay=training.replay,
        )

    def start(
        self,
        number: int,
        batches: StepBatches,
        num_targets: int,
        sums: Mapping[str, float],
        started_at: float,
    ) -> StepInFlight:
        """Give the device all the work of a step."""
        means: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        if num_targets:  # without any the loss would be 0 / 0: such a step is skipped
            self._seed_dropout(number)
            means = self._accumulate_gradient(batches.micro_batches, num_targets)
            metrics = means | self._update(number, means["loss"])
        if self._training.kept:
            # queued behind the update, so it reads the weights of this step
            self._training.kept.update_average(number + 1)
        return StepInFlight(
            number=number,
            num_targets=num_targets,
            sums=sums,
            means=[name for name in means if name != "loss"],
            started_at=started_at,
            metrics=AsyncMetrics(metrics),
        )

    def finish(self, step: StepInFlight, state: TrainState) -> Step:
        """Wait until a step is done and update `state`.

        Raises:
            StageError: its loss or gradient is not finite.
        """
        training, config = self._training, self._training.config
        metrics = step.metrics.read()  # only here does the host wait for the device
        loss, norm = metrics.get("loss", 0.0), metrics.get("gradient_norm", 0.0)
        if metrics.get("has_failed"):
            training.optimizer.zero_grad()  # those of a later step in flight
            found = f"a loss of {loss} and a gradient norm of {norm}"
            raise divergence(training.stage, step.number + 1, found, config)
        if metrics.get("is_skipped", 1.0):
            state.skipped_steps += 1
        else:
            state.loss = loss
        state.loss_scale = metrics.get("next_loss_scale", state.loss_scale)
        state.loss_scale_steps = int(metrics.get("loss_scale_steps", state.loss_scale_steps))
        state.step = step.number + 1
        # padding counts, since the device computes it: the axis is one of computation
        in_sequences = config.global_batch_size * training.sequences.seq_len
        num_tokens = int(step.sums.get(POSITIONS, in_sequences))
        state.tokens += num_tokens
        num_replayed = training.replay.per_step if training.replay else 0
        num_read = state.step * (config.global_batch_size - num_replayed)
        state.epoch, state.row = divmod(num_read, training.sequences.num_sequences)
        done_at = time.perf_counter()
        # the device began when it got the step, or after the step before: in flight they overlap
        began_at, self._last_done_at = max(step.started_at, self._last_done_at), done_at
        return Step(
            step=state.step,
            tokens=num_tokens,
            num_targets=step.num_targets,
            loss=loss,
            gradient_norm=norm,
            # computed again: a later step in flight has already changed the optimizer's
            learning_rate=config.learning_rate * learning_rate_factor(step.number, config),
            loss_scale=metrics.get("loss_scale"),
            update_norm=metrics.get("update_norm"),
            weight_norm=metrics.get("weight_norm"),
            metrics={**{name: metrics[name] for name in step.means}, **self._metrics_of(step.sums)},
            seconds=done_at - began_at,
        )

    def _metrics_of(self, sums: Mapping[str, float]) -> Mapping[str, float]:
        objective = self._training.objective
        return objective.step_metrics(sums) if isinstance(objective, OnPolicyObjective) else {}

    def _seed_dropout(self, number: int) -> None:
        # A function of seed, step and process: a resumed training drops what an uninterrupted one
        # would have dropped.
        process = self._training.accelerator.process_index
        seed = derive_seed(self._training.seed, "dropout", number, process)
        torch.default_generator.manual_seed(seed)
        if self._device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _accumulate_gradient(self, batches: Sequence[Batch], num_targets: int) -> dict[str, Tensor]:
        """Accumulate the gradient of the mean loss over all micro-batches and processes; return
        that loss, and the means of the objective's other sums.
        """
        accelerator, model = self._training.accelerator, self._training.model
        # DDP averages gradients over processes; times their number, it is the sum over all targets
        factor = accelerator.num_processes * self._guard.scale
        # fp64: for display only, but summed over micro-batches and processes
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        totals: dict[str, Tensor] = {}
        for number, batch in enumerate(batches, start=1):
            is_last = number == len(batches)  # gradients are exchanged once, in the last backward
            with nullcontext() if is_last else accelerator.no_sync(model):
                with autocast(self._training.config.precision, self._device.type):
                    sums: dict[str, Tensor] = model(batch)  # over the micro-batch's targets
                # Divided by all targets of the step. The mean of the micro-batches' means would
                # weight a target by how much padding surrounds it.
                means = {name: each / num_targets for name, each in sums.items()}
                means["loss"] = failpoint("training.loss", means["loss"])
                accelerator.backward(failpoint("training.gradient", means["loss"] * factor))
            for name, mean in means.items():
                totals[name] = totals.get(name, zero) + mean.detach()
        summed = sum_on_devices(accelerator, torch.stack(list(totals.values())))
        return dict(zip(totals, summed, strict=True))

    @torch.no_grad()
    def _update(self, number: int, loss: Tensor) -> dict[str, Tensor]:
        """Clip the gradient and apply the step, unless the device finds that it must be skipped."""
        config, optimizer = self._training.config, self._training.optimizer
        self._guard.unscale(self._parameters)
        # over all parameters together: clipping each alone would change the gradient's direction
        norm = nn.utils.clip_grad_norm_(self._parameters, config.max_gradient_norm)
        metrics = {"gradient_norm": norm, **self._guard.judge(loss, norm)}
        is_measured = (number + 1) % UPDATE_NORM_EVERY_STEPS == 0
        before = [weight.clone() for weight in self._parameters] if is_measured else []
        optimizer.set_learning_rates(learning_rate_factor(number, config))
        optimizer.step(metrics["is_skipped"])
        optimizer.zero_grad()
        if is_measured:
            # 0 for a skipped step; relative to the weights it tells whether the rate is sane
            changes = [now - old for now, old in zip(self._parameters, before, strict=True)]
            metrics["update_norm"] = nn.utils.get_total_norm(changes)
            metrics["weight_norm"] = nn.utils.get_total_norm(self._parameters)
        return metrics


def divergence(stage: str, step: int, found: str, config: OptimizationConfig) -> StageError:
    """Return the error for numbers that are not finite, with the settings to try."""
    # under Muon it is the rate of the matrices, which are most of the weights
    rate = "muon_learning_rate" if config.optimizer == "muon" else "learning_rate"
    advice = f"a lower {stage}.{rate} (now {getattr(config, rate):g})"
    advice += f" or more {stage}.warmup_steps (now {config.warmup_steps})"
    advice += f" or {stage}.precision=fp32" if config.precision != "fp32" else ""
    return StageError(
        f"{stage}: step {step} of {config.num_steps} gave {found}, expected finite numbers; try"
        f" {advice}"
    )
