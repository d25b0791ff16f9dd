"""The evaluate stage: every task on every model, beside baselines that need no model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import cast

import numpy as np
import torch

from llm.artifact import ArtifactWriter, Json, Manifest, read_manifest
from llm.config import EvaluateConfig, ModelConfig, read_section
from llm.data.packed import PackedSequences
from llm.errors import ArtifactError, ConfigError
from llm.evaluation.baselines import Baselines, measure_baselines
from llm.evaluation.instructions import SEQUENCES_PER_READ, read_instructions
from llm.evaluation.items import ModelItems, write_items
from llm.evaluation.paired import compare_models
from llm.evaluation.prompts import encode_prompts
from llm.evaluation.report import Metric, Report, Sample, rounded, samples_json
from llm.evaluation.tasks import (
    TASKS,
    Evaluated,
    EvaluationData,
    EvaluationSplit,
    EvaluationTask,
    TaskResult,
)
from llm.model.masked_lm import Masking
from llm.model.precision import Precision, fp32_products
from llm.model.transformer import Transformer
from llm.model.weights import load_model
from llm.runtime.job import Job, run_job
from llm.seeds import derive_seed
from llm.tokenizer.load import load_tokenizer


def evaluate(job: Job, writer: ArtifactWriter) -> dict[str, Json]:
    """Measure the models among the inputs; write report.json, report.md, samples.json and
    items.jsonl.

    Raises:
        ArtifactError: models, sequences and tokenizer do not match, or a model is damaged.
        ConfigError: a prompt longer than the context, or a device that is missing.
    """
    config = read_section(EvaluateConfig, job.settings)
    if job.runtime.num_threads:
        torch.set_num_threads(job.runtime.num_threads)
    device = _device(job.runtime.device)
    folders = {name: Path(job.inputs[name]) for name in config.models}
    manifests = {name: read_manifest(folder) for name, folder in folders.items()}
    data = _open_data(job, config, manifests)
    tasks = {name: task for name, task in TASKS.items() if task.predicts == data.predicts}
    per_model = sum(task.num_units(data) for task in tasks.values())
    advance = _progress(job, data.text.sequences.num_sequences + len(folders) * per_model)
    baselines = measure_baselines(_text_bytes(data, advance))
    if baselines.num_bytes != data.text.sequences.info.num_bytes:
        raise ArtifactError(
            f"{job.inputs['text_sequences']}: the validation sequences hold"
            f" {baselines.num_bytes} bytes of text, pack.json says"
            f" {data.text.sequences.info.num_bytes}; run pack again"
        )
    results: dict[str, dict[str, TaskResult]] = {task: {} for task in tasks}
    shapes: list[tuple[ModelConfig, int]] = []
    for name, folder in folders.items():  # one after the other, so that memory holds one model
        model = _load(folder, device, data)
        shapes.append((model.config, model.num_parameters()))
        precision = cast(Precision, manifests[name].settings.get("precision", "fp32"))
        evaluated = Evaluated(name=name, model=model, precision=precision, advance=advance)
        with fp32_products(precision, device.type):
            for task_name, task in tasks.items():
                results[task_name][name] = task.measure(evaluated, data)
        del model, evaluated
    metrics = _data_metrics(data, baselines)
    samples: list[Sample] = []
    for task_name, task in tasks.items():
        metrics |= _metrics(task, results[task_name])
        samples += _samples([result.samples for result in results[task_name].values()])
    items = _items(results, config.models)
    report = Report(
        models=config.models,
        metrics=metrics,
        samples=tuple(samples),
        settings=_settings(*shapes[0], data, manifests),
        notes=tuple(note for task in tasks.values() for note in task.notes(data)),
        comparisons=tuple(compare_models(items, _compared_pairs(config.models))),
    )
    write_items(writer, items)
    writer.write_bytes("report.json", report.to_json())
    writer.write_bytes("report.md", report.to_markdown().encode())
    writer.write_json("samples.json", samples_json(report.samples))
    return dict(report.values())


def _device(requested: str) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if requested == "cuda" and not has_gpu:
        raise ConfigError("runtime.device: found cuda, but there is no GPU here; use auto or cpu")
    return torch.device("cuda" if has_gpu and requested != "cpu" else "cpu")


def _open_data(
    job: Job, config: EvaluateConfig, manifests: Mapping[str, Manifest]
) -> EvaluationData:
    tokenizer = load_tokenizer(Path(job.inputs["tokenizer"]))
    trained = next(iter(manifests.values())).settings  # later models keep the first one's shape
    shape = trained.get("model")
    masking = None
    if isinstance(shape, Mapping) and shape.get("is_causal") is False:
        masking = Masking(
            seed=derive_seed(job.seed, "evaluation masks"),
            fraction=cast(float, trained["masked_fraction"]),
            mask_id=tokenizer.mask_id,
            is_text=tokenizer.token_bytes > 0,
        )

    def split(input_name: str, kind: str) -> EvaluationSplit:
        trained_on_it = (
            manifest.settings
            for manifest in manifests.values()
            if manifest.summary.get("content") == kind
        )
        return EvaluationSplit(
            sequences=PackedSequences(Path(job.inputs[input_name]), "validation"),
            document_mask=next(trained_on_it, {}).get("document_mask") is True,
        )

    text, chats = split("text_sequences", "text"), split("chat_sequences", "chats")
    return EvaluationData(
        config=config,
        seed=job.seed,
        tokenizer=tokenizer,
        text=text,
        chats=chats,
        held_out=read_instructions(chats.sequences, tokenizer, config.num_instructions),
        prompts=encode_prompts(config.prompts, tokenizer, text.sequences.seq_len),
        masking=masking,
    )


def _progress(job: Job, total: int) -> Callable[[int], None]:
    """Return a function that reports so many more sequences, read, scored or answered, as done."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        job.report_progress(done, total, "sequences")

    return advance


def _load(folder: Path, device: torch.device, data: EvaluationData) -> Transformer:
    """Load a model.

    Raises:
        ArtifactError: its vocabulary or context does not fit the data.
    """
    model = load_model(folder, device).eval()
    text, chats = data.text.sequences, data.chats.sequences
    sizes = {
        "tokenizer": data.tokenizer.vocab_size,
        "text sequences": text.layout.vocab_size,
        "chat sequences": chats.layout.vocab_size,
    }
    for what, size in sizes.items():
        if size != model.vocab_size:
            raise ArtifactError(
                f"{folder}: a model of {model.vocab_size} tokens, but the {what} have {size};"
                " evaluate a model with the tokenizer and sequences it was trained with"
            )
    longest = max(text.seq_len, chats.seq_len)
    if longest > model.seq_len:
        raise ArtifactError(
            f"{folder}: a model with a context of {model.seq_len} tokens, but sequences of"
            f" {longest}; evaluate a model with the sequences it was trained with"
        )
    return model


def _text_bytes(data: EvaluationData, advance: Callable[[int], None]) -> Iterator[bytes]:
    """Yield the exact bytes of the validation text: those of every target, in order."""
    sequences = data.text.sequences
    for start in range(0, sequences.num_sequences, SEQUENCES_PER_READ):
        indices = np.arange(start, min(start + SEQUENCES_PER_READ, sequences.num_sequences))
        arrays = sequences.read(indices)
        yield data.tokenizer.decode_bytes(arrays.tokens[arrays.mask].tolist())
        advance(len(indices))


def _metrics(task: EvaluationTask, results: Mapping[str, TaskResult]) -> dict[str, Metric]:
    """Return a task's metrics, combined or prefixed with the model's name."""
    if task.combine is not None:
        return dict(task.combine([result.metrics for result in results.values()]))
    return {
        f"{model}/{name}": metric
        for model, result in results.items()
        for name, metric in result.metrics.items()
    }


def _samples(by_model: Sequence[Sequence[Sample]]) -> Iterator[Sample]:
    """Join the samples of all models, prompt by prompt."""
    for same_prompt in zip(*by_model, strict=True):
        completions = [each.completions for each in same_prompt]
        merged = {model: text for each in completions for model, text in each.items()}
        yield replace(same_prompt[0], completions=merged)


def _items(
    results: Mapping[str, Mapping[str, TaskResult]], models: Sequence[str]
) -> dict[str, ModelItems]:
    """Return the items of each model from the results by task and model."""
    return {
        model: {
            metric: items
            for of_task in results.values()
            for metric, items in of_task[model].items.items()
        }
        for model in models
    }


def _compared_pairs(models: Sequence[str]) -> list[tuple[str, str]]:
    """Return each later model after the first, and after the one before it, which is another."""
    with_first = [(models[0], model) for model in models[1:]]
    return with_first + list(pairwise(models[1:]))


def _data_metrics(data: EvaluationData, baselines: Baselines) -> dict[str, Metric]:
    """Return the metrics that need no model."""
    metrics = {
        f"baseline/{name}": Metric(
            value=rounded(value), unit="bits per byte", num_examples=baselines.num_bytes
        )
        for name, value in asdict(baselines).items()
        if name.endswith("_bits_per_byte")
    }
    info = data.text.sequences.info
    for name, total in (
        ("bytes", info.num_bytes),
        ("tokens", info.num_tokens - info.num_documents),  # without the bos of each
    ):
        metrics[f"data/validation_{name}"] = Metric(
            value=float(total), unit=name, num_examples=info.num_documents
        )
    return metrics


def _settings(
    shape: ModelConfig,
    num_parameters: int,
    data: EvaluationData,
    manifests: Mapping[str, Manifest],
) -> dict[str, str]:
    settings = {
        "model": f"{shape.num_layers} layers of width {shape.d_model}, {shape.num_heads} heads,"
        f" {num_parameters:,} parameters",
        "vocabulary": f"{data.tokenizer.vocab_size:,} tokens",
        "context": f"{data.text.sequences.seq_len:,} tokens",
    }
    for name, manifest in manifests.items():
        steps, tokens = manifest.summary.get("num_steps"), manifest.summary.get("num_tokens")
        if isinstance(steps, int) and isinstance(tokens, int):
            settings[f"{name} model, trained for"] = f"{steps:,} steps on {tokens:,} tokens"
    return settings


if __name__ == "__main__":
    run_job(evaluate)
