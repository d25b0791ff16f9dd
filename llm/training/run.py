"""From a model to a trained model: what pretraining and fine-tuning do alike around the loop's
steps.
"""

from contextlib import suppress
from pathlib import Path

from accelerate import Accelerator

from llm.artifact import ArtifactWriter, Json
from llm.config import OptimizationConfig
from llm.data.rows import Rows
from llm.errors import ConfigError, DataError, Interrupted
from llm.job import METRICS, Job
from llm.model.store import save_model
from llm.model.transformer import Transformer
from llm.seeds import derive_seed
from llm.tokenizer.bpe import ByteLevelBPE
from llm.training.checkpoints import load_checkpoint, newest_checkpoint, save_checkpoint
from llm.training.loop import Step, TrainState, training_steps
from llm.training.metrics import MetricsFile
from llm.training.optimizers import Optimizer, make_optimizer
from llm.training.processes import make_accelerator
from llm.training.validation import Validation, validate

# The logits of a micro-batch are the largest tensor there is, and the loss and its gradient need
# two or three more of their size. 64 MiB of them keep a small model below 1 GiB and were the
# fastest size measured on a CPU.
LOGITS_BYTES = {"cpu": 64 << 20, "cuda": 4 << 30}


def train(
    job: Job,
    writer: ArtifactWriter,
    model: Transformer,
    config: OptimizationConfig,
    tokenizer_folder: Path,
) -> dict[str, Json]:
    """Train `model` on the job's rows from the newest checkpoint on, and write it as an artifact.

    Raises:
        ConfigError, DataError: rows, model and settings do not fit together.
        StageError: the loss is not finite.
        Interrupted: asked to stop; a checkpoint of the last step is saved.
    """
    accelerator = make_accelerator(job.runtime, config)
    tokenizer = ByteLevelBPE.load(tokenizer_folder)
    train_rows, validation_rows = _open_rows(Path(job.inputs["rows"]), model, tokenizer)
    _check_rows_per_step(job.stage, config, accelerator)
    micro_batch_rows = job.runtime.micro_batch_rows or _micro_batch_rows(model, accelerator, config)
    is_writer = accelerator.is_main_process

    wrapped = accelerator.prepare_model(model)  # moves `model`; several processes: wraps it in DDP
    optimizer = make_optimizer(model, config)
    checkpoints = job.work / "checkpoints"
    state = _resume(accelerator, checkpoints, model, optimizer)
    metrics = MetricsFile(job.work / METRICS, state.step) if is_writer else None

    def measure() -> Validation:
        """Validate, and write the point."""
        found = validate(
            accelerator,
            model,
            validation_rows,
            tokenizer.token_bytes,
            num_rows=job.runtime.validation_rows,
            micro_batch_rows=micro_batch_rows,
            is_document_masked=config.is_document_masked,
        )
        if metrics:
            values = {"val/loss": found.loss, "val/bits_per_byte": found.bits_per_byte}
            metrics.append(state.step, state.tokens, values)
        return found

    def is_due(every_steps: int) -> bool:
        """Tell whether what happens every so many steps, and after the last, happens now."""
        return state.step % every_steps == 0 or state.step == config.num_steps

    # Measured before training too. At the step of a checkpoint it is measured again on resuming,
    # since the kill may have come between the two.
    validation = measure() if is_due(job.runtime.validate_every_steps) else None
    for step in training_steps(
        accelerator,
        wrapped,
        optimizer,
        train_rows,
        config,
        state,
        stage=job.stage,
        seed=derive_seed(job.seed, job.stage, "rows"),
        micro_batch_rows=micro_batch_rows,
        is_stopping=lambda: job.is_stopping,
    ):
        if metrics and is_due(job.runtime.log_every_steps):
            metrics.append(state.step, state.tokens, _point(step))
        if metrics and is_due(job.runtime.checkpoint_every_steps):
            metrics.make_durable()
            save_checkpoint(checkpoints, model, optimizer, state, keep=job.runtime.keep_checkpoints)
        if is_due(job.runtime.validate_every_steps):
            validation = measure()
        if is_writer:
            with suppress(Interrupted):  # stopping is agreed on by all processes, in the loop
                job.report_progress(state.step, config.num_steps, "steps")

    if state.step < config.num_steps:
        if metrics and state.step:
            metrics.make_durable()
            save_checkpoint(checkpoints, model, optimizer, state, keep=job.runtime.keep_checkpoints)
        raise Interrupted(f"{job.stage} was asked to stop and saved step {state.step}")
    assert validation is not None, "the last step is followed by a validation"
    if is_writer:
        save_model(writer, model, tokenizer.to_json())
        writer.write_bytes(METRICS, (job.work / METRICS).read_bytes(), is_log=True)
    return {
        "num_parameters": model.num_parameters(),
        "num_steps": state.step,
        "num_tokens": state.tokens,
        "num_skipped_steps": state.skipped_steps,
        "train_loss": state.loss,
        "val_loss": validation.loss,
        "val_bits_per_byte": validation.bits_per_byte,
    }


def _point(step: Step) -> dict[str, float]:
    """Return what is written of a step; one that learned nothing has no loss."""
    point = {
        "learning_rate": step.learning_rate,
        "throughput/tokens_per_second": round(step.tokens / step.seconds, 1),
    }
    if step.num_targets:
        point |= {"train/loss": step.loss, "gradient_norm": step.gradient_norm}
    return point


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


def _open_rows(folder: Path, model: Transformer, tokenizer: ByteLevelBPE) -> tuple[Rows, Rows]:
    """Open the rows of both splits and compare them with the model.

    Raises:
        DataError: they are of another context or vocabulary, or there are none.
    """
    splits = Rows(folder, "train"), Rows(folder, "validation")
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
                f"{name}: found {rows.num_rows} rows with {rows.info.num_target_tokens} tokens to learn,"
                " expected some; give more data or change clean.validation_fraction"
            )
    if problems:
        raise DataError(
            f"{folder}: these rows do not fit the model; pack them with its tokenizer and context\n"
            + "\n".join(f"  {problem}" for problem in problems)
        )
    return splits


def _check_rows_per_step(stage: str, config: OptimizationConfig, accelerator: Accelerator) -> None:
    if config.rows_per_step % accelerator.num_processes:
        raise ConfigError(
            f"{stage}.rows_per_step: found {config.rows_per_step}, expected a multiple of the number of"
            f" processes, {accelerator.num_processes}"
        )


def _micro_batch_rows(
    model: Transformer, accelerator: Accelerator, config: OptimizationConfig
) -> int:
    """Return as many rows as a process has in a step, or as their logits in fp32 have room for."""
    row_bytes = 4 * model.seq_len * model.vocab_size
    fitting = max(1, LOGITS_BYTES[accelerator.device.type] // row_bytes)
    return min(config.rows_per_step // accelerator.num_processes, fitting)
