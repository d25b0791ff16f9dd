"""Measure base and chat model on what neither has seen, beside what needs no model at all."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch

from llm.artifact import ArtifactWriter, Json, Manifest, read_manifest
from llm.config import EvaluateConfig, ModelConfig, read_section
from llm.data.packed import PackedSequences
from llm.errors import ArtifactError, ConfigError
from llm.evaluation import masked
from llm.evaluation.baselines import Baselines, measure_baselines
from llm.evaluation.bits_per_byte import DocumentScores, score_sequences
from llm.evaluation.instructions import (
    HeldOut,
    answer_instructions,
    exact_match,
    exact_match_by_kind,
    one_of_each_kind,
    read_instructions,
)
from llm.evaluation.leak import LeakResult, find_leaks, leak_metrics
from llm.evaluation.prompts import encode_prompts
from llm.evaluation.report import Metric, Report, Sample, rounded, samples_json
from llm.evaluation.samples import continue_prompts
from llm.inference.sampling import Sampling
from llm.model.masked_lm import Masking
from llm.model.precision import Precision, fp32_products
from llm.model.transformer import Transformer
from llm.model.weights import load_model
from llm.runtime.job import Job, run_job
from llm.seeds import derive_seed
from llm.tokenizer.base import Tokenizer
from llm.tokenizer.load import load_tokenizer

MODELS = ("base", "chat")
NUM_SHOWN_INSTRUCTIONS = 6
ROWS_PER_READ = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """What both models are measured on."""

    tokenizer: Tokenizer
    text: PackedSequences
    chats: PackedSequences
    held_out: HeldOut
    prompts: list[list[int]]
    is_text_masked: bool
    """Score text as the base model was trained: within documents only, or across them."""
    is_chat_masked: bool
    """Score answers as the chat model was trained."""
    precisions: dict[str, Precision]
    """In which each model was trained, and is scored."""
    masking: Masking | None
    """What is hidden from models that fill in; None for those that go on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """What was found about one model."""

    text: DocumentScores
    chats: DocumentScores
    leak: LeakResult
    answers: list[str]
    continuations: list[str]


@dataclass(kw_only=True, slots=True)
class Progress:
    """One bar over all that is read, scored or answered, each counted as a row."""

    job: Job
    total: int
    done: int = 0

    def advance(self, num_rows: int) -> None:
        """Say that so many rows more are done.

        Raises:
            Interrupted: the stage was asked to stop.
        """
        self.done += num_rows
        self.job.report_progress(self.done, self.total, "rows")


def evaluate(job: Job, writer: ArtifactWriter) -> dict[str, Json]:
    """Score, question and compare the two models; write report.json, report.md and samples.json.

    Raises:
        ArtifactError: models, rows and tokenizer do not belong together, or a model is broken.
        ConfigError: a prompt that does not fit the context, or a device that is not there.
    """
    config = read_section(EvaluateConfig, job.settings)
    if job.runtime.num_threads:
        torch.set_num_threads(job.runtime.num_threads)
    device = _device(job.runtime.device)
    folders = {name: Path(job.inputs[name]) for name in MODELS}
    manifests = {name: read_manifest(folder) for name, folder in folders.items()}
    data = _open_data(job, config, manifests)
    per_model = data.text.num_rows + data.chats.num_rows
    per_model += (
        masked.num_pseudo_sequences(data.text) if data.masking else len(data.held_out.instructions)
    )
    progress = Progress(job=job, total=data.text.num_rows + len(MODELS) * per_model)
    baselines = measure_baselines(_text_bytes(data, progress))
    if baselines.num_bytes != data.text.info.num_bytes:
        raise ArtifactError(
            f"{job.inputs['text_sequences']}: the validation sequences hold"
            f" {baselines.num_bytes} bytes of text, pack.json says"
            f" {data.text.info.num_bytes}; run pack again"
        )
    metrics = _data_metrics(data, baselines)
    findings: dict[str, Findings] = {}
    shapes: list[tuple[ModelConfig, int]] = []
    for name, folder in folders.items():  # one after the other: one model in memory
        model, precision = _load(folder, device, data), data.precisions[name]
        shapes.append((model.config, model.num_parameters()))
        with fp32_products(precision, device.type):
            if data.masking is None:
                findings[name] = _measure(model, data, precision, config, job.seed, progress)
            else:
                filled_in = masked.measure(
                    model,
                    {
                        "": (data.text, data.is_text_masked),
                        "answer_": (data.chats, data.is_chat_masked),
                    },
                    data.masking,
                    precision,
                    progress.advance,
                )
                metrics |= {f"{name}/{figure}": metric for figure, metric in filled_in.items()}
        del model
    report = Report(
        metrics=metrics | _metrics(findings, data.held_out),
        samples=tuple(_samples(findings, config.prompts, data.held_out)),
        settings=_settings(*shapes[0], data, manifests),
        notes=tuple(_notes(data.held_out, config.num_instructions)) if findings else masked.NOTES,
    )
    writer.write_bytes("report.json", report.to_json())
    writer.write_bytes("report.md", report.to_markdown().encode())
    writer.write_json("samples.json", samples_json(report.samples))
    return dict(report.values())


def _device(wanted: str) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise ConfigError("runtime.device: found cuda, but there is no GPU here; use auto or cpu")
    return torch.device("cuda" if has_gpu and wanted != "cpu" else "cpu")


def _open_data(job: Job, config: EvaluateConfig, manifests: dict[str, Manifest]) -> Data:
    tokenizer = load_tokenizer(Path(job.inputs["tokenizer"]))
    trained = manifests["base"].settings
    shape = trained.get("model")
    masking = None
    if isinstance(shape, Mapping) and shape.get("is_causal") is False:
        masking = Masking(
            seed=derive_seed(job.seed, "evaluation masks"),
            fraction=cast(float, trained["masked_fraction"]),
            mask_id=tokenizer.mask_id,
            is_text=tokenizer.token_bytes > 0,
        )
    text = PackedSequences(Path(job.inputs["text_sequences"]), "validation")
    chats = PackedSequences(Path(job.inputs["chat_sequences"]), "validation")
    return Data(
        tokenizer=tokenizer,
        text=text,
        chats=chats,
        held_out=read_instructions(chats, tokenizer, config.num_instructions),
        prompts=encode_prompts(config.prompts, tokenizer, text.seq_len),
        is_text_masked=manifests["base"].settings.get("document_mask") is True,
        is_chat_masked=manifests["chat"].settings.get("document_mask") is True,
        precisions={
            name: cast(Precision, manifest.settings.get("precision", "fp32"))
            for name, manifest in manifests.items()
        },
        masking=masking,
    )


def _load(folder: Path, device: torch.device, data: Data) -> Transformer:
    """Load a model and refuse it where it does not fit the data."""
    model = load_model(folder, device).eval()
    sizes = {
        "tokenizer": data.tokenizer.vocab_size,
        "text rows": data.text.layout.vocab_size,
        "chat rows": data.chats.layout.vocab_size,
    }
    for what, size in sizes.items():
        if size != model.vocab_size:
            raise ArtifactError(
                f"{folder}: a model of {model.vocab_size} tokens, but the {what} have {size};"
                " evaluate a model with the tokenizer and rows it was made with"
            )
    longest = max(data.text.seq_len, data.chats.seq_len)
    if longest > model.seq_len:
        raise ArtifactError(
            f"{folder}: a model with a context of {model.seq_len} tokens, but rows of {longest};"
            " evaluate a model with the rows it was made with"
        )
    return model


def _text_bytes(data: Data, progress: Progress) -> Iterator[bytes]:
    """Yield the bytes of the validation text, exactly: those of every target, in order."""
    for start in range(0, data.text.num_rows, ROWS_PER_READ):
        indices = np.arange(start, min(start + ROWS_PER_READ, data.text.num_rows))
        arrays = data.text.read(indices)
        yield data.tokenizer.decode_bytes(arrays.tokens[arrays.mask].tolist())
        progress.advance(len(indices))


def _measure(
    model: Transformer,
    data: Data,
    precision: Precision,
    config: EvaluateConfig,
    seed: int,
    progress: Progress,
) -> Findings:
    text = _score(model, data, data.text, precision, progress)
    chats = _score(model, data, data.chats, precision, progress)
    answers: list[str] = []
    for batch in answer_instructions(
        model, data.tokenizer, data.held_out.instructions, config.max_new_tokens
    ):
        answers += batch
        progress.advance(len(batch))
    return Findings(
        text=text,
        chats=chats,
        answers=answers,
        leak=find_leaks(
            model,
            data.text,
            document_mask=data.is_text_masked,
            seed=derive_seed(seed, "leak"),
        ),
        continuations=continue_prompts(
            model,
            data.tokenizer,
            data.prompts,
            max_new_tokens=config.max_new_tokens,
            sampling=Sampling(
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                min_p=config.min_p,
                repetition_penalty=config.repetition_penalty,
                seed=derive_seed(seed, "samples"),
            ),
        ),
    )


def _score(
    model: Transformer, data: Data, rows: PackedSequences, precision: Precision, progress: Progress
) -> DocumentScores:
    is_text = rows is data.text
    scores = DocumentScores(rows.info.num_documents)
    for scored in score_sequences(
        model,
        rows,
        data.tokenizer.token_bytes,
        document_mask=data.is_text_masked if is_text else data.is_chat_masked,
        has_control_targets=not is_text,
        precision=precision,
    ):
        scores.add(scored)
        progress.advance(scored.num_rows)
    return scores


def _metrics(findings: dict[str, Findings], held_out: HeldOut) -> dict[str, Metric]:
    metrics: dict[str, Metric] = {}
    for name, found in findings.items():
        metrics[f"{name}/bits_per_byte"] = found.text.bits_per_byte()
        metrics[f"{name}/answer_loss"] = found.chats.nats_per_token()
        if held_out.instructions:
            metrics[f"{name}/exact_match"] = exact_match(found.answers, held_out.instructions)
            by_kind = exact_match_by_kind(found.answers, held_out.instructions)
            metrics |= {f"{name}/exact_match/{kind}": share for kind, share in by_kind.items()}
    leaks = [found.leak for found in findings.values()]
    return metrics | (leak_metrics(leaks) if leaks else {})


def _data_metrics(data: Data, baselines: Baselines) -> dict[str, Metric]:
    """Return the figures that need no model."""
    metrics = {
        f"baseline/{name}_bits_per_byte": Metric(
            value=rounded(value), unit="bits per byte", num_examples=baselines.num_bytes
        )
        for name, value in (
            ("unigram", baselines.unigram_bits_per_byte),
            ("gzip", baselines.gzip_bits_per_byte),
            ("xz", baselines.xz_bits_per_byte),
        )
    }
    info = data.text.info
    for name, total in (
        ("bytes", info.num_bytes),
        ("tokens", info.num_tokens - info.num_documents),  # without the bos of each
    ):
        metrics[f"data/validation_{name}"] = Metric(
            value=float(total), unit=name, num_examples=info.num_documents
        )
    return metrics


def _samples(
    findings: dict[str, Findings], prompts: Sequence[str], held_out: HeldOut
) -> Iterator[Sample]:
    if not findings:
        return
    base, chat = findings["base"], findings["chat"]
    for place in one_of_each_kind(held_out.instructions, NUM_SHOWN_INSTRUCTIONS):
        asked = held_out.instructions[place]
        yield Sample(
            kind="instruction",
            prompt=asked.prompt,
            expected=asked.expected,
            base=base.answers[place],
            chat=chat.answers[place],
        )
    continued = zip(prompts, base.continuations, chat.continuations, strict=True)
    for prompt, by_base, by_chat in continued:
        yield Sample(kind="continuation", prompt=prompt, expected=None, base=by_base, chat=by_chat)


def _settings(
    shape: ModelConfig, num_parameters: int, data: Data, manifests: dict[str, Manifest]
) -> dict[str, str]:
    settings = {
        "model": f"{shape.num_layers} layers of width {shape.d_model}, {shape.num_heads} heads,"
        f" {num_parameters:,} parameters",
        "vocabulary": f"{data.tokenizer.vocab_size:,} tokens",
        "context": f"{data.text.seq_len:,} tokens",
    }
    for name, manifest in manifests.items():
        steps, tokens = manifest.summary.get("num_steps"), manifest.summary.get("num_tokens")
        if isinstance(steps, int) and isinstance(tokens, int):
            settings[f"{name} model, trained for"] = f"{steps:,} steps on {tokens:,} tokens"
    return settings


def _notes(held_out: HeldOut, wanted: int) -> Iterator[str]:
    found = len(held_out.instructions)
    if found < wanted:
        yield f"{found} held-out instructions, all there are; {wanted} were asked for."
    if held_out.num_other_shapes:
        yield (f"{held_out.num_other_shapes} chats passed over: not one question and one answer.")
    if held_out.num_too_long:
        yield f"{held_out.num_too_long} chats passed over: longer than the context."


if __name__ == "__main__":
    run_job(evaluate)
