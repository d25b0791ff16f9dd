"""Evaluation tasks: everything that is measured on each model, as one table.

A new task is a function from model and data to a `TaskResult`, and an entry of `TASKS`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from llm.config import EvaluateConfig
from llm.data.packed import PackedSequences
from llm.evaluation import masked
from llm.evaluation.bits_per_byte import DocumentScores, score_documents
from llm.evaluation.instructions import (
    HeldOut,
    answer_instructions,
    are_right,
    exact_match,
    exact_match_by_kind,
    one_of_each_kind,
)
from llm.evaluation.items import Items, hashed_id, make_items
from llm.evaluation.leak import find_leaks, leak_metrics, worst_metrics
from llm.evaluation.report import Metric, Sample
from llm.inference.generate import generate_texts
from llm.inference.options import GenerationOptions
from llm.model.masked_lm import Masking
from llm.model.precision import Precision
from llm.model.transformer import Transformer
from llm.seeds import derive_seed
from llm.tokenizer.base import Tokenizer

NUM_SHOWN_INSTRUCTIONS = 6

Prediction = Literal["next_token", "masked_tokens"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSplit:
    """Validation sequences, and how attention is masked on them."""

    sequences: PackedSequences
    document_mask: bool
    """As the first model trained on this kind of data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationData:
    """What all models are measured on, with the settings and the seed of the evaluation."""

    config: EvaluateConfig
    seed: int
    tokenizer: Tokenizer
    text: EvaluationSplit
    chats: EvaluationSplit
    held_out: HeldOut
    prompts: Sequence[Sequence[int]]
    """Token ids of `config.prompts`."""
    masking: Masking | None
    """Chooses the tokens to mask; None for models that predict the next token."""

    @property
    def predicts(self) -> Prediction:
        """What the models were trained to predict."""
        return "masked_tokens" if self.masking else "next_token"


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """The model that a task measures."""

    name: str
    model: Transformer
    precision: Precision
    """In which it was trained."""
    advance: Callable[[int], None]
    """Takes the number of sequences or prompts just done, for the progress bar."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskResult:
    """What one task found on one model."""

    metrics: Mapping[str, Metric] = field(default_factory=dict[str, Metric])
    """By name, without the model's."""
    samples: Sequence[Sample] = ()
    """With one completion each; every model gives as many, in the same order."""
    items: Mapping[str, Items] = field(default_factory=dict[str, Items])
    """By the name of the metric that they make: models are compared on it, item by item."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationTask:
    """One measurement."""

    measure: Callable[[Evaluated, EvaluationData], TaskResult]
    predicts: Prediction = "next_token"
    """Applies to models that predict this."""
    num_units: Callable[[EvaluationData], int] = lambda data: 0
    """How much a model advances the progress bar."""
    combine: Callable[[Sequence[Mapping[str, Metric]]], Mapping[str, Metric]] | None = None
    """Merges the metrics of all models into one set; None prefixes each model's with its name."""
    notes: Callable[[EvaluationData], Iterator[str]] = lambda data: iter(())
    """Remarks for the report: what was left out, how to read a metric."""


def _bits_per_byte(evaluated: Evaluated, data: EvaluationData) -> TaskResult:
    scores = _score(evaluated, data, data.text)
    items = make_items(data.text.sequences.document_ids(), scores.bits, scores.num_bytes)
    return TaskResult(
        metrics={"bits_per_byte": scores.bits_per_byte()}, items={"bits_per_byte": items}
    )


def _answer_loss(evaluated: Evaluated, data: EvaluationData) -> TaskResult:
    scores = _score(evaluated, data, data.chats)
    items = make_items(data.chats.sequences.document_ids(), scores.nats, scores.num_tokens)
    return TaskResult(
        metrics={"answer_loss": scores.nats_per_token()}, items={"answer_loss": items}
    )


def _score(evaluated: Evaluated, data: EvaluationData, split: EvaluationSplit) -> DocumentScores:
    return score_documents(
        evaluated.model,
        split.sequences,
        data.tokenizer.token_bytes,
        document_mask=split.document_mask,
        has_control_targets=split is data.chats,
        precision=evaluated.precision,
        advance=evaluated.advance,
    )


def _instructions(evaluated: Evaluated, data: EvaluationData) -> TaskResult:
    instructions = data.held_out.instructions
    answers: list[str] = []
    for batch in answer_instructions(
        evaluated.model, data.tokenizer, instructions, data.config.max_new_tokens
    ):
        answers += batch
        evaluated.advance(len(batch))
    if not instructions:
        return TaskResult()
    by_kind = exact_match_by_kind(answers, instructions)
    ids = [hashed_id(one.prompt, one.expected) for one in instructions]
    items = make_items(ids, are_right(answers, instructions), higher_is_better=True)
    return TaskResult(
        metrics={
            "exact_match": exact_match(answers, instructions),
            **{f"exact_match/{kind}": metric for kind, metric in by_kind.items()},
        },
        samples=[
            Sample(
                kind="instruction",
                prompt=instructions[index].prompt,
                expected=instructions[index].expected,
                completions={evaluated.name: answers[index]},
            )
            for index in one_of_each_kind(instructions, NUM_SHOWN_INSTRUCTIONS)
        ],
        items={"exact_match": items},
    )


def _instruction_notes(data: EvaluationData) -> Iterator[str]:
    found, wanted = len(data.held_out.instructions), data.config.num_instructions
    if found < wanted:
        yield f"{wanted} held-out instructions were requested, only {found} exist."
    if data.held_out.num_other_shapes:
        yield f"{data.held_out.num_other_shapes} chats skipped: not ending with their only answer."


def _leaks(evaluated: Evaluated, data: EvaluationData) -> TaskResult:
    result = find_leaks(
        evaluated.model,
        data.text.sequences,
        document_mask=data.text.document_mask,
        seed=derive_seed(data.seed, "leak"),
    )
    return TaskResult(metrics=leak_metrics(result))


def _continuations(evaluated: Evaluated, data: EvaluationData) -> TaskResult:
    config, tokenizer = data.config, data.tokenizer
    options = GenerationOptions(
        max_new_tokens=config.max_new_tokens,
        stop_ids=(tokenizer.bos_id, tokenizer.end_id),
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        seed=derive_seed(data.seed, "samples"),
    )
    completions = generate_texts(evaluated.model, tokenizer, data.prompts, options)
    return TaskResult(
        samples=[
            Sample(kind="continuation", prompt=prompt, completions={evaluated.name: completion})
            for prompt, completion in zip(config.prompts, completions, strict=True)
        ]
    )


def _fill_in(
    evaluated: Evaluated, data: EvaluationData, split: EvaluationSplit, prefix: str
) -> TaskResult:
    assert data.masking is not None
    result = masked.measure_filled_in(
        evaluated.model,
        split.sequences,
        data.masking,
        document_mask=split.document_mask,
        precision=evaluated.precision,
        advance=evaluated.advance,
    )
    loss, accuracy = f"{prefix}masked_loss", f"{prefix}masked_accuracy"
    ids, num_tokens = split.sequences.document_ids(), result.num_tokens
    return TaskResult(
        metrics={loss: result.loss, accuracy: result.accuracy},
        items={
            loss: make_items(ids, result.nats, num_tokens),
            accuracy: make_items(ids, result.num_right, num_tokens, higher_is_better=True),
        },
    )


def _pseudo_perplexity(evaluated: Evaluated, data: EvaluationData) -> TaskResult:
    assert data.masking is not None
    result = masked.pseudo_likelihood(
        evaluated.model,
        data.text.sequences,
        data.masking,
        document_mask=data.text.document_mask,
        precision=evaluated.precision,
        advance=evaluated.advance,
    )
    return TaskResult(
        metrics={"pseudo_perplexity": result.perplexity, "pseudo_loss": result.loss},
        items={"pseudo_loss": make_items(result.ids, result.nats, result.num_tokens)},
    )


TASKS: dict[str, EvaluationTask] = {
    "bits_per_byte": EvaluationTask(
        measure=_bits_per_byte, num_units=lambda data: data.text.sequences.num_sequences
    ),
    "answer_loss": EvaluationTask(
        measure=_answer_loss, num_units=lambda data: data.chats.sequences.num_sequences
    ),
    "instructions": EvaluationTask(
        measure=_instructions,
        num_units=lambda data: len(data.held_out.instructions),
        notes=_instruction_notes,
    ),
    "leaks": EvaluationTask(measure=_leaks, combine=worst_metrics),
    "continuations": EvaluationTask(measure=_continuations),
    "masked_text": EvaluationTask(
        measure=lambda evaluated, data: _fill_in(evaluated, data, data.text, ""),
        predicts="masked_tokens",
        num_units=lambda data: data.text.sequences.num_sequences,
        notes=lambda data: iter(masked.NOTES),
    ),
    "masked_answers": EvaluationTask(
        measure=lambda evaluated, data: _fill_in(evaluated, data, data.chats, "answer_"),
        predicts="masked_tokens",
        num_units=lambda data: data.chats.sequences.num_sequences,
    ),
    "pseudo_perplexity": EvaluationTask(
        measure=_pseudo_perplexity,
        predicts="masked_tokens",
        num_units=lambda data: masked.num_pseudo_sequences(data.text.sequences),
    ),
}
"""By name, in the order in which a model is measured and samples are shown."""
