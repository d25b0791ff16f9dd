"""Run a training stage: resume, train, log, checkpoint, validate, write the model.

Shared by pretraining and fine-tuning; a stage with another loss passes its own objective.
"""

import math
import sys
from collections.abc import Generator, Mapping
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.checkpoint import checkpoint

from llm.artifact import ArtifactWriter, Json
from llm.config import OptimizationConfig, RuntimeConfig, TuningConfig
from llm.consistency import tuning_problems
from llm.errors import ConfigError, Interrupted
from llm.model.lora import add_adapters, merge_adapters, save_adapter
from llm.model.loss import ModelWithLoss
from llm.model.precision import fp32_products
from llm.model.transformer import Transformer
from llm.model.weights import save_model, trained_weights_of
from llm.monitoring.metrics import METRICS_FILE, MetricsWriter, write_num_parameters
from llm.monitoring.throughput import TERA, flops_per_token, peak_flops, peak_memory_bytes
from llm.runtime.job import STARTING_MODEL, Job
from llm.seeds import derive_seed
from llm.tokenizer.load import load_tokenizer
from llm.training.checkpoints import resume, save_checkpoint
from llm.training.kept_weights import KeptWeights, describe_weights
from llm.training.loop import Step, TrainingSetup, divergence, training_steps
from llm.training.objectives import (
    MakeObjective,
    ModelWithObjective,
    TrainingStart,
    language_modeling,
)
from llm.training.optimizers import make_optimizer
from llm.training.processes import make_accelerator
from llm.training.selection import make_selection
from llm.training.sequences import open_replay, open_sequences
from llm.training.shares import even_size, idle_share, uneven_warning
from llm.training.validation import Validation, validate

# Memory for the activations of a micro-batch. On a CPU more does not make a step faster; on a GPU
# it is a share of the memory, and the rest is for weights, gradients and optimizer.
ACTIVATION_BYTES = 512 << 20
ACTIVATION_SHARE = 1 / 3
GIGA = 1e9


def train(
    job: Job,
    writer: ArtifactWriter,
    model: Transformer,
    config: OptimizationConfig,
    tokenizer_folder: Path,
    make_objective: MakeObjective = language_modeling,
) -> dict[str, Json]:
    """Train `model` on the job's packed sequences and write it as an artifact.

    Resumes from the newest checkpoint. Returns the summary.

    Raises:
        ConfigError, DataError: sequences, model and settings do not fit together.
        StageError: the loss is not finite.
        Interrupted: asked to stop; the last step is saved.
    """
    if problems := tuning_problems(config, job.stage):
        raise ConfigError("; ".join(problems))
    run = _Run(job, model, config, tokenizer_folder, make_objective)
    # around everything: the backward pass must use the same precision as the forward pass
    with fp32_products(config.precision, run.accelerator.device.type):
        last = _train(job, run)
        state = run.state
        if state.step < config.num_steps:
            run.save()  # whatever checkpoint_every_steps says: no finished step is lost
            if not run.selection.has_stopped_early:
                # the launcher takes a rank that ends before the others for a failed one
                run.accelerator.wait_for_everyone()
                raise Interrupted(f"{job.stage} was asked to stop after step {state.step}")
        validation = run.finish(last)
    num_trained = sum(weight.numel() for weight in trained_weights_of(model).values())
    if run.lora:
        if run.is_writer:
            save_adapter(writer, model, run.lora, Path(job.inputs[STARTING_MODEL]))
        merge_adapters(model)  # evaluation, chat and export then read a model like any other
    if run.is_writer:
        # with its tokenizer, so that a model folder is usable by itself
        save_model(writer, model, run.tokenizer.to_files())
        # a log: times differ from run to run, so it is not part of the artifact's digest
        writer.write_bytes(METRICS_FILE, (job.work / METRICS_FILE).read_bytes(), is_log=True)
    return {
        "content": run.content,
        "num_parameters": model.num_parameters(),
        "num_trained_parameters": num_trained,
        "weights": describe_weights(config, state.best_step),
        "num_steps": state.step,
        **run.selection.summary(),
        "num_tokens": state.tokens,
        **run.epochs(),
        "num_skipped_steps": state.skipped_steps,
        "train_loss": state.loss,
        "val_loss": validation.loss,
        **{f"val_{name}": value for name, value in validation.metrics.items()},
        "throughput_device": run.device_name,
        "throughput_processes": run.accelerator.num_processes,
        "throughput_flops_per_token": run.flops_per_token,
        "throughput_peak_teraflops": run.peak / TERA if run.peak else "unknown",
    }


def _train(job: Job, run: "_Run") -> Validation | None:
    """Take the remaining steps, with logging, checkpoints and validation; return the last one."""
    runtime = job.runtime
    # Before training too: the first point of the curve is the loss of random weights. On resuming,
    # a validation at the checkpoint's step is repeated, since the kill may have come before it.
    validation = run.validate_if_due()
    with closing(run.steps()) as steps:
        for step in steps:
            if run.is_due(step.step, runtime.log_every_steps):
                run.log(run.point(step))
            if run.is_due(step.step, runtime.checkpoint_every_steps):
                run.save()  # first, so that a failure of validation loses no step
            validation = run.validate_if_due()
            if run.is_writer:
                # the loop stops all processes at the same step; this one must not stop alone
                with suppress(Interrupted):
                    job.report_progress(*run.progress())
    return validation


class _Run:
    """A training in progress: its parts, and what is done between steps."""

    def __init__(
        self,
        job: Job,
        model: Transformer,
        config: OptimizationConfig,
        tokenizer_folder: Path,
        make_objective: MakeObjective,
    ) -> None:
        self._job, self._config, self._model = job, config, model
        self.num_steps = config.num_steps
        self.accelerator = make_accelerator(job.runtime, config)
        device = self.accelerator.device
        self.is_writer = self.accelerator.is_main_process
        if self.is_writer:
            # early: the tracker puts it into the name of the running model
            write_num_parameters(job.work, model.num_parameters())
        self.lora = config.lora if isinstance(config, TuningConfig) and config.lora.rank else None
        if self.lora:  # before objective and optimizer, which see the adapted model
            seed = derive_seed(job.seed, job.stage, "lora")
            add_adapters(model, self.lora, seed, f"{job.stage}.lora")
        self.tokenizer = load_tokenizer(tokenizer_folder)
        sequences, self._validation_sequences = open_sequences(job, model, self.tokenizer)
        self.content = sequences.layout.content
        self.flops_per_token = flops_per_token(model)
        self.peak = peak_flops(device, config.precision)
        is_gpu = device.type == "cuda"
        self.device_name = torch.cuda.get_device_name(device) if is_gpu else device.type
        micro_batch_size = _micro_batch_size(
            model, self.accelerator, config, job.runtime.micro_batch_size
        )
        # Validation calls this module, not the one in DDP, which synchronizes its buffers in each
        # forward pass: the processes may validate unequal numbers of batches.
        self._model_with_loss = _place(model, device, job.runtime)
        start = TrainingStart(
            job=job,
            config=config,
            accelerator=self.accelerator,
            model=self._model_with_loss,
            tokenizer=self.tokenizer,
            sequences=sequences,
            micro_batch_size=micro_batch_size,
            # masks differ by stage: fine-tuning would otherwise hide the positions of pretraining
            seed=derive_seed(job.seed, job.stage, "masks"),
        )
        objective = make_objective(start)
        # Validation has its own masks, the same in pretraining and in fine-tuning, so that the
        # losses of the two compare.
        seed = derive_seed(job.seed, "validation masks")
        self._validation_objective = make_objective(
            replace(start, sequences=self._validation_sequences, seed=seed)
        )
        module = ModelWithObjective(self._model_with_loss, objective)
        # after _place, which moves the weights: these and the optimizer hold on to the tensors
        self._kept = KeptWeights(model, config)
        self._training = TrainingSetup(
            accelerator=self.accelerator,
            model=self.accelerator.prepare_model(module),
            optimizer=make_optimizer(model, config),
            sequences=sequences,
            objective=objective,
            config=config,
            stage=job.stage,
            seed=derive_seed(job.seed, job.stage, "rows"),
            micro_batch_size=micro_batch_size,
            replay=open_replay(job, config, model, self.tokenizer),
            kept=self._kept,
        )
        shares = config.global_batch_size, self.accelerator.num_processes
        idle = idle_share(*shares)
        self._unit = f"steps ({idle:.0%} of all devices idle)" if idle else "steps"
        if self.is_writer and idle:  # a warning only: the result is right, the time wasted
            print(uneven_warning(job.stage, *shares), file=sys.stderr)
        self._checkpoints = job.work / "checkpoints"
        # last: it loads into weights and optimizer state on their device
        optimizer = self._training.optimizer
        self.state = resume(self.accelerator, self._checkpoints, model, optimizer, self._kept)
        self.selection = make_selection(config, self.state, self._kept)
        path = job.work / METRICS_FILE
        # only now is it known where the curves continue
        self._metrics = MetricsWriter(path, self.state.step) if self.is_writer else None

    def steps(self) -> Generator[Step]:
        """Yield steps; those of a checkpoint or validation with their own weights."""
        runtime = self._job.runtime
        return training_steps(
            self._training,
            self.state,
            # this process's own wish; the loop asks for those of the others
            is_stopping=lambda: self._job.is_stopping or self.selection.has_stopped_early,
            needs_weights=lambda step: (
                self.is_due(step, runtime.checkpoint_every_steps)
                or self.is_due(step, runtime.validate_every_steps)
                or self.selection.is_due(step)
            ),
        )

    def is_due(self, step: int, every_steps: int) -> bool:
        """Tell whether something done every so many steps, and after the last, is due."""
        return step % every_steps == 0 or step == self.num_steps

    def progress(self) -> tuple[int, int, str]:
        """Return steps done, in total, and what they are; all are done where training ends."""
        step = self.state.step
        if self.selection.has_stopped_early:
            return step, step, f"{self._unit}, stopped early of {self.num_steps:,}"
        return step, self.num_steps, self._unit

    def epochs(self) -> dict[str, Json]:
        """Return the passes over the stage's data, and over replayed text, for the summary."""
        state, training = self.state, self._training
        own = state.epoch + state.row / training.sequences.num_sequences
        if training.replay is None:
            return {"epochs": own}
        return {"epochs": own, "replay_epochs": training.replay.epochs(state.step)}

    def log(self, values: Mapping[str, float]) -> None:
        """Add a point to the metrics file."""
        if self._metrics:
            self._metrics.append(self.state.step, self.state.tokens, values)

    def point(self, step: Step) -> dict[str, float]:
        """Return the metrics of a step; one without targets has no loss."""
        # of all positions, padding included: the speed of the machine, not of learning
        tokens_per_second = step.tokens / step.seconds
        point = {
            "learning_rate": step.learning_rate,
            "throughput/tokens_per_second": round(tokens_per_second, 1),
            **step.metrics,
        }
        if self.peak:
            num_devices = self.accelerator.num_processes
            # PaLM's model FLOPs utilization (arXiv 2204.02311, appendix B)
            mfu = tokens_per_second * self.flops_per_token / (self.peak * num_devices)
            point["throughput/mfu"] = round(mfu, 4)
        if step.num_targets:
            point["train/loss"] = step.loss
        if step.num_targets and math.isfinite(step.gradient_norm):  # JSON has no infinity
            point["gradient_norm"] = step.gradient_norm
        if step.loss_scale is not None:
            point["loss_scale"] = step.loss_scale
        if step.update_norm is not None and step.weight_norm is not None:
            point["update_norm"] = step.update_norm
            # about 1e-3 is usual; far above, the learning rate is too high
            point["update_norm_relative"] = step.update_norm / step.weight_norm
            point["memory/peak_gb"] = round(peak_memory_bytes(self.accelerator.device) / GIGA, 3)
        return point

    def save(self) -> None:
        """Write a checkpoint, from the main process, once a step is done."""
        if self._metrics and self.state.step:
            # first: resuming cuts the file back to the checkpoint's step, and could not add to it
            self._metrics.make_durable()
            keep = self._job.runtime.keep_checkpoints
            optimizer = self._training.optimizer
            save_checkpoint(
                self._checkpoints, self._model, optimizer, self.state, keep=keep, kept=self._kept
            )

    def validate_if_due(self) -> Validation | None:
        """Measure and log what is due at this step; return the validation of the curve.

        The curve `val/loss` is that of the weights in training. The best weights are chosen by
        `val/selection_loss`: of the averaged weights, where there is an average.

        Raises:
            StageError: a validation loss is not finite.
        """
        found = None
        if self.is_due(self.state.step, self._job.runtime.validate_every_steps):
            found = self._measure(self._job.runtime.validation_sequences)
            self._log_now(
                {"val/loss": found.loss} | {f"val/{k}": v for k, v in found.metrics.items()}
            )
        if self.selection.is_due(self.state.step):
            with self._kept.averaged():
                loss = self._measure(self.selection.config.num_sequences).loss
                self.selection.consider(loss)
            self._log_now({"val/selection_loss": loss})
        return found

    def finish(self, last: Validation | None) -> Validation:
        """Put the kept weights into the model, if any, and measure them; `last` is that of the
        last step's weights.
        """
        if self._kept.use():
            # for the summary, no point of the curve: these are not the weights in training
            return self._measure(self._job.runtime.validation_sequences)
        assert last is not None, "the last step is followed by a validation"
        return last

    def _measure(self, num_sequences: int) -> Validation:
        if self._metrics:
            self._metrics.write()  # validation takes long: the curves are shown as they are
        found = validate(
            self.accelerator,
            self._model_with_loss,
            self._validation_sequences,
            self._validation_objective,
            self.tokenizer.token_bytes,
            precision=self._config.precision,
            num_sequences=num_sequences,
            max_batch_size=self._training.micro_batch_size,
        )
        # the training loss of this step was finite, so the last update broke the weights
        if not math.isfinite(found.loss):
            what = f"a validation loss of {found.loss}"
            raise divergence(self._job.stage, self.state.step, what, self._config)
        return found

    def _log_now(self, values: Mapping[str, float]) -> None:
        self.log(values)
        if self._metrics:
            self._metrics.write()  # a rare point: shown at once


def _place(model: Transformer, device: torch.device, runtime: RuntimeConfig) -> ModelWithLoss:
    """Move the model to its device, compiled and with activation checkpointing as the settings
    say.
    """
    model_with_loss = ModelWithLoss(model.to(device))
    # a third more work, the second forward pass; a layer then keeps one tensor instead of 14
    if runtime.activation_checkpointing:
        # without dropout there is no random state that the second forward pass must repeat
        has_dropout = any(isinstance(part, torch.nn.Dropout) for part in model.modules())
        for block in model.blocks:
            # use_reentrant=False is the variant that torch recommends, and that DDP supports
            block.forward = partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=has_dropout
            )
    # a short training on a CPU rarely wins back the time of compiling
    is_compiled = {"always": True, "never": False, "auto": device.type == "cuda"}
    if is_compiled[runtime.compile]:
        # model and softmax only: an objective's own few operations stay plain torch
        model_with_loss.compile()
    return model_with_loss


def _micro_batch_size(
    model: Transformer, accelerator: Accelerator, config: OptimizationConfig, limit: int = 0
) -> int:
    """Return the number of sequences of a forward pass: at most `limit`; 0: what memory allows."""
    # A layer keeps about 10 tensors of d_model and 4 of d_ff, counted as fp32 whatever the
    # precision. Logits do not count: the chunked loss never holds those of all positions.
    shape = model.config
    sequence_bytes = 4 * model.seq_len * shape.num_layers * (10 * shape.d_model + 4 * shape.d_ff)
    room_bytes = ACTIVATION_BYTES
    if accelerator.device.type == "cuda":
        memory_bytes = torch.cuda.get_device_properties(accelerator.device).total_memory
        room_bytes = int(ACTIVATION_SHARE * memory_bytes)
    # of the process with the most sequences: all use the same size, hence the same shape
    largest_share = -(-config.global_batch_size // accelerator.num_processes)
    return even_size(largest_share, limit or max(1, room_bytes // sequence_bytes))
