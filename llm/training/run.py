"""From a model to a trained model: what pretraining and fine-tuning do alike around the loop's
steps.
"""

import math
import sys
from collections.abc import Generator, Mapping
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.checkpoint import checkpoint

from llm.artifact import ArtifactWriter, Json
from llm.config import OptimizationConfig, RuntimeConfig
from llm.data.packed import PackedSequences
from llm.errors import DataError, Interrupted
from llm.model.loss import ModelWithLoss
from llm.model.masked_lm import Masking
from llm.model.precision import fp32_products
from llm.model.transformer import Transformer
from llm.model.weights import save_model
from llm.monitoring.metrics import MetricsFile, write_num_parameters
from llm.monitoring.throughput import TERA, flops_per_token, peak_flops, peak_memory_bytes
from llm.runtime.job import METRICS, Job
from llm.seeds import derive_seed
from llm.tokenizer.base import Tokenizer
from llm.tokenizer.load import load_tokenizer
from llm.training.batches import MaskedTokens, NextToken, even_size
from llm.training.checkpoints import load_checkpoint, newest_checkpoint, save_checkpoint
from llm.training.loop import Step, Training, TrainState, divergence, training_steps
from llm.training.optimizers import Optimizer, make_optimizer
from llm.training.processes import make_accelerator
from llm.training.validation import Validation, validate

# What a micro-batch may keep for its backward pass. On a CPU more does not make a step faster; on a
# GPU it is a share of the memory.
ACTIVATION_BYTES = 512 << 20
ACTIVATION_SHARE = 1 / 3
GIGA = 1e9


def train(
    job: Job,
    writer: ArtifactWriter,
    model: Transformer,
    config: OptimizationConfig,
    tokenizer_folder: Path,
) -> dict[str, Json]:
    """Train `model` on the job's rows, from its newest checkpoint on, and write it as an artifact.

    A causal model learns to say the next token, another to fill in masked ones.

    Raises:
        ConfigError, DataError: rows, model and settings do not fit together.
        StageError: the loss is not finite.
        Interrupted: asked to stop; the last step is saved.
    """
    run = _Run(job, model, config, tokenizer_folder)
    with fp32_products(config.precision, run.accelerator.device.type):
        validation = _train(job, run)
    state = run.state
    if state.step < config.num_steps:
        run.save()
        run.accelerator.wait_for_everyone()  # a process that ends before the others seems to fail
        raise Interrupted(f"{job.stage} was asked to stop after step {state.step}")
    assert validation is not None, "the last step is followed by a validation"
    if run.is_writer:
        save_model(writer, model, run.tokenizer.to_files())
        writer.write_bytes(METRICS, (job.work / METRICS).read_bytes(), is_log=True)
    return {
        "num_parameters": model.num_parameters(),
        "num_steps": state.step,
        "num_tokens": state.tokens,
        "num_skipped_steps": state.skipped_steps,
        "train_loss": state.loss,
        "val_loss": validation.loss,
        **{f"val_{name}": value for name, value in validation.figures.items()},
        "throughput_device": run.device_name,
        "throughput_processes": run.accelerator.num_processes,
        "throughput_flops_per_token": run.flops_per_token,
        "throughput_peak_teraflops": run.peak / TERA if run.peak else "unknown",
    }


def _train(job: Job, run: "_Run") -> Validation | None:
    """Take the steps that are left, and do what is due between them; return the last validation."""
    runtime = job.runtime
    # Before training too. At the step of a checkpoint the model is measured again on resuming,
    # since the kill may have come between the two.
    is_due = run.is_due(run.state.step, runtime.validate_every_steps)
    validation = run.validate() if is_due else None
    with closing(run.steps()) as steps:
        for step in steps:
            if run.is_due(step.step, runtime.log_every_steps):
                run.log(run.point(step))
            if run.is_due(step.step, runtime.checkpoint_every_steps):
                run.save()  # before validation, so that what comes after a step cannot lose it
            if run.is_due(step.step, runtime.validate_every_steps):
                validation = run.validate()
            if run.is_writer:
                with suppress(Interrupted):  # stopping is agreed on by all processes, in the loop
                    job.report_progress(step.step, run.num_steps, run.unit)
    return validation


class _Run:
    """A training under way: its parts, put together, and what is done with them between steps."""

    def __init__(
        self, job: Job, model: Transformer, config: OptimizationConfig, tokenizer_folder: Path
    ) -> None:
        self._job, self._config, self._model = job, config, model
        self.num_steps = config.num_steps
        self.accelerator = make_accelerator(job.runtime, config)
        device = self.accelerator.device
        self.is_writer = self.accelerator.is_main_process
        if self.is_writer:
            write_num_parameters(job.work, model.num_parameters())
        self.tokenizer = load_tokenizer(tokenizer_folder)
        rows, self._validation_sequences = _open_rows(job, model, self.tokenizer)
        self.flops_per_token = flops_per_token(model)
        self.peak = peak_flops(device, config.precision)
        is_gpu = device.type == "cuda"
        self.device_name = torch.cuda.get_device_name(device) if is_gpu else device.type
        self._model_with_loss = ModelWithLoss(model)
        self._training = Training(
            accelerator=self.accelerator,
            model=_prepare(self.accelerator, self._model_with_loss, model, job.runtime),
            optimizer=make_optimizer(model, config),
            rows=rows,
            objective=self._objective(derive_seed(job.seed, job.stage, "masks")),
            config=config,
            stage=job.stage,
            seed=derive_seed(job.seed, job.stage, "rows"),
            micro_batch_size=_micro_batch_rows(
                model, self.accelerator, config, job.runtime.micro_batch_size
            ),
        )
        idle_share = _idle_share(config, self.accelerator.num_processes)
        self.unit = "steps" if not idle_share else f"steps ({idle_share:.0%} of all devices idle)"
        if self.is_writer and idle_share:
            print(_uneven(job.stage, config, self.accelerator.num_processes), file=sys.stderr)
        self._checkpoints = job.work / "checkpoints"
        self.state = _resume(self.accelerator, self._checkpoints, model, self._training.optimizer)
        self._metrics = MetricsFile(job.work / METRICS, self.state.step) if self.is_writer else None

    def steps(self) -> Generator[Step]:
        """Train, step by step."""
        runtime = self._job.runtime
        return training_steps(
            self._training,
            self.state,
            is_stopping=lambda: self._job.is_stopping,
            is_looked_at=lambda step: (
                self.is_due(step, runtime.checkpoint_every_steps)
                or self.is_due(step, runtime.validate_every_steps)
            ),
        )

    def is_due(self, step: int, every_steps: int) -> bool:
        """Tell whether what happens every so many steps, and after the last, happens at `step`."""
        return step % every_steps == 0 or step == self.num_steps

    def log(self, values: Mapping[str, float]) -> None:
        """Add one point to the curves."""
        if self._metrics:
            self._metrics.append(self.state.step, self.state.tokens, values)

    def point(self, step: Step) -> dict[str, float]:
        """Return what is written of a step; one that learned nothing has no loss."""
        tokens_per_second = step.tokens / step.seconds
        point = {
            "learning_rate": step.learning_rate,
            "throughput/tokens_per_second": round(tokens_per_second, 1),
        }
        if self.peak:
            num_devices = self.accelerator.num_processes
            share = tokens_per_second * self.flops_per_token / (self.peak * num_devices)
            point["throughput/mfu"] = round(share, 4)
        if step.num_targets:
            point["train/loss"] = step.loss
        if step.num_targets and math.isfinite(step.gradient_norm):
            point["gradient_norm"] = step.gradient_norm
        if step.loss_scale is not None:
            point["loss_scale"] = step.loss_scale
        if step.update_norm is not None and step.weight_norm is not None:
            point["update_norm"] = step.update_norm
            point["update_norm_relative"] = step.update_norm / step.weight_norm
            point["memory/peak_gb"] = round(peak_memory_bytes(self.accelerator.device) / GIGA, 3)
        return point

    def save(self) -> None:
        """Publish a checkpoint, if there is anything to save."""
        if self._metrics and self.state.step:
            self._metrics.make_durable()
            keep = self._job.runtime.keep_checkpoints
            optimizer = self._training.optimizer
            save_checkpoint(self._checkpoints, self._model, optimizer, self.state, keep=keep)

    def validate(self) -> Validation:
        """Measure the model as it is and write the point."""
        if self._metrics:
            self._metrics.write()
        found = validate(
            self.accelerator,
            self._model,
            self._model_with_loss,
            self._validation_sequences,
            self._objective(derive_seed(self._job.seed, "validation masks")),
            self.tokenizer.token_bytes,
            precision=self._config.precision,
            num_rows=self._job.runtime.validation_sequences,
            room=self._training.micro_batch_size,
        )
        if not math.isfinite(found.loss):
            what = f"a validation loss of {found.loss}"
            raise divergence(self._job.stage, self.state.step, what, self._config)
        self.log({"val/loss": found.loss} | {f"val/{k}": v for k, v in found.figures.items()})
        if self._metrics:
            self._metrics.write()
        return found

    def _objective(self, seed: int) -> NextToken | MaskedTokens:
        document_mask = self._config.document_mask
        if self._model.config.is_causal:
            return NextToken(document_mask=document_mask)
        masking = Masking(
            seed=seed,
            fraction=self._config.masked_fraction,
            mask_id=self.tokenizer.mask_id,
            is_text=self.tokenizer.token_bytes > 0,
        )
        return MaskedTokens(document_mask=document_mask, masking=masking)


def _prepare(
    accelerator: Accelerator, module: ModelWithLoss, model: Transformer, runtime: RuntimeConfig
) -> torch.nn.Module:
    """Put the model on its device, compiled and in DDP where that is wanted."""
    if runtime.activation_checkpointing:
        has_dropout = model.config.dropout > 0  # only then is there a generator to wind back
        for block in model.blocks:
            block.forward = partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=has_dropout
            )
    is_compiled = {"always": True, "never": False, "auto": accelerator.device.type == "cuda"}
    if is_compiled[runtime.compile]:
        module.compile()
    return accelerator.prepare_model(module)


def _resume(
    accelerator: Accelerator, folder: Path, model: Transformer, optimizer: Optimizer
) -> TrainState:
    """Go on from the newest whole checkpoint, the same on every process, or start."""
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        newest_checkpoint(folder)  # sets damaged ones aside before the others look
    accelerator.wait_for_everyone()
    path = newest_checkpoint(folder)
    return load_checkpoint(path, model, optimizer) if path else TrainState()


def _open_rows(
    job: Job, model: Transformer, tokenizer: Tokenizer
) -> tuple[PackedSequences, PackedSequences]:
    """Open the rows of both splits and compare them with the model.

    Raises:
        DataError: they are of another context or vocabulary, or there are none.
    """
    folder = Path(job.inputs["sequences"])
    splits = PackedSequences(folder, "train"), PackedSequences(folder, "validation")
    layout = splits[0].layout
    problems: list[str] = []
    if layout.seq_len != model.seq_len:
        problems.append(f"seq_len: found {layout.seq_len}, expected the model's {model.seq_len}")
    for what, found in (("rows", layout.vocab_size), ("tokenizer", tokenizer.vocab_size)):
        if found != model.vocab_size:
            problems.append(
                f"vocab_size: found {found} in the {what}, expected the model's {model.vocab_size}"
            )
    for name, rows in zip(("train", "validation"), splits, strict=True):
        if not rows.num_rows or not rows.info.num_target_tokens:
            problems.append(
                f"{name}: found {rows.num_rows} rows with {rows.info.num_target_tokens} tokens to"
                " learn, expected some; give more data or change clean.validation_fraction"
            )
    if problems:
        raise DataError(
            f"{folder}: these rows do not fit the model; pack them with its tokenizer and context\n"
            + "\n".join(f"  {problem}" for problem in problems)
        )
    return splits


def _micro_batch_rows(
    model: Transformer, accelerator: Accelerator, config: OptimizationConfig, room: int = 0
) -> int:
    """Return how many rows each pass takes: at most `room`; 0 is what the memory has room for.

    A layer keeps about 10 tensors of the model's width and 4 of the feed-forward's; what it keeps
    in 16 bits is taken for 32. Logits do not count: they never stand in memory whole.
    """
    shape = model.config
    row_bytes = 4 * model.seq_len * shape.num_layers * (10 * shape.d_model + 4 * shape.d_ff)
    room_bytes = ACTIVATION_BYTES
    if accelerator.device.type == "cuda":
        memory_bytes = torch.cuda.get_device_properties(accelerator.device).total_memory
        room_bytes = int(ACTIVATION_SHARE * memory_bytes)
    largest_share = -(-config.global_batch_size // accelerator.num_processes)
    return even_size(largest_share, room or max(1, room_bytes // row_bytes))


def _idle_share(config: OptimizationConfig, num_processes: int) -> float:
    """Return the share of all processes' time in which some wait for those with a row more."""
    largest_share = -(-config.global_batch_size // num_processes)
    return 1 - config.global_batch_size / (largest_share * num_processes)


def _uneven(stage: str, config: OptimizationConfig, num_processes: int) -> str:
    """Say what shares that differ cost, and how to avoid it."""
    largest_share = -(-config.global_batch_size // num_processes)
    return (
        f"{stage}.global_batch_size: {config.global_batch_size} sequences among {num_processes}"
        f" processes: some learn from {largest_share} in each step, some from fewer and wait,"
        f" which is {_idle_share(config, num_processes):.0%} of the time of all. As fast:"
        f" runtime.num_processes={-(-config.global_batch_size // largest_share)}"
    )
