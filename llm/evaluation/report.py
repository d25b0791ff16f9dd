"""What an evaluation found, as values, as JSON for programs and as Markdown for people."""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from llm.artifact import Json, canonical
from llm.errors import ArtifactError

FORMAT, VERSION = "report", 1
SIGNIFICANT_DIGITS = 6  # below the last, the order of a sum shows: threads, batch sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One figure, with what is needed to judge it."""

    value: float
    unit: str
    num_examples: int
    """Independent examples it was measured on: documents, bytes, instructions or trials."""
    standard_error: float | None = None
    """In the same unit; None where the figure is exact or one example gave it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One prompt with what both models made of it."""

    kind: Literal["continuation", "instruction"]
    prompt: str
    expected: str | None
    """The right answer of an instruction; a continuation has none."""
    base: str
    chat: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """All figures and samples of one evaluation of a base model and the chat model made of it."""

    metrics: Mapping[str, Metric]
    samples: tuple[Sample, ...]
    settings: Mapping[str, str] = field(default_factory=dict[str, str])
    """What was evaluated, for people: model size, tokens seen, data. No times, no places."""
    notes: tuple[str, ...] = ()
    """What was left out of a figure, and how much."""

    def values(self) -> dict[str, float]:
        """Return every metric's bare value by name, sorted: what trackers and tables take."""
        return {name: self.metrics[name].value for name in sorted(self.metrics)}

    def to_json(self) -> bytes:
        """Encode so that equal reports give equal bytes."""
        tree = canonical({"format": FORMAT, "version": VERSION, **asdict(self)})
        return json.dumps(tree, indent=2, sort_keys=True, allow_nan=False).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> "Report":
        """Read what `to_json` wrote.

        Raises:
            ArtifactError: the bytes are no report of this version.
        """
        try:
            tree: dict[str, Any] = json.loads(data)
            found = (tree.pop("format"), tree.pop("version"))
            if found != (FORMAT, VERSION):
                raise ValueError(f"found {found}, expected {(FORMAT, VERSION)}")
            metrics = {name: Metric(**metric) for name, metric in tree.pop("metrics").items()}
            samples = tuple(Sample(**sample) for sample in tree.pop("samples"))
            notes = tuple(tree.pop("notes"))
            return cls(metrics=metrics, samples=samples, notes=notes, **tree)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArtifactError(
                f"report.json: no report of this version ({error}); evaluate again"
            ) from error

    def to_markdown(self) -> str:
        """Render the report to be read from top to bottom: verdict, figures, samples, settings."""
        sections = [
            "# Evaluation",
            _leak_verdict(self.metrics),
            _text_section(self.metrics),
            _answers_section(self.metrics),
            _masked_section(self.metrics),
            "\n".join(f"- {escape_markdown(note)}" for note in self.notes),
            *_samples_sections(self.samples),
            _settings_section(self.settings),
            _all_metrics_section(self.metrics),
        ]
        return "\n\n".join(section for section in sections if section) + "\n"


def samples_json(samples: Sequence[Sample]) -> list[Json]:
    """Return the samples as the rows of `samples.json`."""
    rows = canonical([asdict(sample) for sample in samples])
    assert isinstance(rows, list)
    return rows


def rounded(value: float, digits: int = SIGNIFICANT_DIGITS) -> float:
    """Round to significant digits, so that a report's bytes say no more than was measured."""
    return float(f"{value:.{digits}g}")


def escape_markdown(text: str) -> str:
    """Return `text` to stand literally in a Markdown table cell, whatever a model put into it.

    Markup is escaped, line breaks become `<br>`, indentation is kept, control characters (which a
    terminal might obey) become U+FFFD.
    """
    lines = text.replace("\r\n", "\n").replace("\t", "    ").split("\n")
    return "<br>".join(map(_escape_line, lines))


def _escape_line(line: str) -> str:
    body = line.lstrip(" ")
    indentation = "&nbsp;" * (len(line) - len(body))
    body = "".join("\ufffd" if unicodedata.category(c) == "Cc" else c for c in body)
    body = body.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return indentation + re.sub(r"([\\`*_{}\[\]|~#$!])", r"\\\1", body)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: int = 0) -> str:
    """Lay out a table whose last `right` columns hold numbers."""
    rule = ["---"] * (len(header) - right) + ["---:"] * right
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def _figure(metric: Metric | None, digits: int = 4) -> str:
    if metric is None:
        return "-"
    error = "" if metric.standard_error is None else f" ± {metric.standard_error:.{digits}f}"
    return f"{metric.value:.{digits}f}{error}"


def _leak_verdict(metrics: Mapping[str, Metric]) -> str:
    passed = metrics.get("leak/passed")
    if passed is None:
        return ""
    if passed.value == 1:
        return "The leak test passed: no model sees a token before it has predicted it."
    return (
        "> **THE LEAK TEST FAILED.** A model sees tokens that it is asked to predict, or it repeats"
        " the token it has just read (trained on targets that were not shifted, or hardly trained)."
        " No other figure on this page means anything until that is mended; the `leak/` figures at"
        " the end say which check failed."
    )


def _text_section(metrics: Mapping[str, Metric]) -> str:
    names = {
        "base model": "base/bits_per_byte",
        "chat model": "chat/bits_per_byte",
        "xz -9e": "baseline/xz_bits_per_byte",
        "gzip -9": "baseline/gzip_bits_per_byte",
        "byte unigram": "baseline/unigram_bits_per_byte",
    }
    if is_masked := "base/masked_loss" in metrics:
        names = {label: name for label, name in names.items() if name.startswith("baseline/")}
    rows = [(label, _figure(metrics.get(name))) for label, name in names.items()]
    size = metrics.get("data/validation_bytes")
    documents = "" if size is None else f" in {size.num_examples:,} documents"
    where = "" if size is None else f"All of it, {int(size.value):,} bytes{documents}. "
    return (
        "## Held-out text\n\n"
        + _table(("", "bits per byte"), rows, right=1)
        + f"\n\n{where}Lower is better; every line is measured on the same bytes. "
        + ("" if is_masked else "The models have read the training text before, ")
        + "gzip and xz start from nothing, and the byte unigram knows these bytes' own frequencies."
        + ("" if is_masked else " ± is one standard error, by document.")
    )


def _masked_section(metrics: Mapping[str, Metric]) -> str:
    """Return the figures of models that fill in; nothing for those that go on."""
    if "base/masked_loss" not in metrics:
        return ""

    def rows(*names: str) -> list[tuple[str, ...]]:
        return [
            (f"{model} model", *(_figure(metrics.get(f"{model}/{name}")) for name in names))
            for model in ("base", "chat")
        ]

    heading = ("accuracy", "loss (nats per token)")
    of_text = rows("masked_accuracy", "masked_loss", "pseudo_perplexity")
    return (
        "## Masked tokens of held-out text\n\n"
        + _table(("", *heading, "pseudo-perplexity"), of_text, right=3)
        + "\n\n## Masked tokens of held-out answers\n\n"
        + _table(("", *heading), rows("answer_masked_accuracy", "answer_masked_loss"), right=2)
        + "\n\nAccuracy is the share of hidden tokens that the model thought the likeliest. Both"
        " models fill in the same places. ± is one standard error, by document; of the"
        " pseudo-perplexity by row."
    )


def _answers_section(metrics: Mapping[str, Metric]) -> str:
    if "base/masked_loss" in metrics:
        return ""
    rows = [
        (
            f"{model} model",
            _figure(metrics.get(f"{model}/exact_match"), 3),
            _figure(metrics.get(f"{model}/answer_loss")),
        )
        for model in ("base", "chat")
    ]
    section = "## Held-out instructions\n\n" + _table(
        ("", "exact match", "answer loss (nats per token)"), rows, right=2
    )
    prefix = "chat/exact_match/"
    kinds = [name.removeprefix(prefix) for name in sorted(metrics) if name.startswith(prefix)]
    if not kinds:
        return section
    by_kind = [
        (
            escape_markdown(kind),
            *(_figure(metrics.get(f"{model}/exact_match/{kind}"), 3) for model in ("base", "chat")),
            f"{metrics[prefix + kind].num_examples:,}",
        )
        for kind in kinds
    ]
    header = ("exact match by kind", "base model", "chat model", "instructions")
    return section + "\n\n" + _table(header, by_kind, right=3)


def _samples_sections(samples: Sequence[Sample]) -> list[str]:
    sections: list[str] = []
    instructions = [sample for sample in samples if sample.kind == "instruction"]
    continuations = [sample for sample in samples if sample.kind == "continuation"]
    if instructions:
        rows = [
            [escape_markdown(text) for text in (s.prompt, s.expected or "", s.base, s.chat)]
            for s in instructions
        ]
        table = _table(("instruction", "expected", "base model", "chat model"), rows)
        sections.append(f"## Answers\n\n{table}")
    if continuations:
        rows = [
            [escape_markdown(text) for text in (s.prompt, s.base, s.chat)] for s in continuations
        ]
        table = _table(("prompt", "base model", "chat model"), rows)
        sections.append(f"## Continuations\n\n{table}")
    return sections


def _settings_section(settings: Mapping[str, str]) -> str:
    if not settings:
        return ""
    rows = [
        (escape_markdown(name), escape_markdown(text)) for name, text in sorted(settings.items())
    ]
    return "## What was evaluated\n\n" + _table(("", ""), rows)


def _all_metrics_section(metrics: Mapping[str, Metric]) -> str:
    rows = [
        (
            f"`{name}`",
            f"{metric.value:g}",
            "-" if metric.standard_error is None else f"{metric.standard_error:.2g}",
            escape_markdown(metric.unit),
            f"{metric.num_examples:,}",
        )
        for name, metric in sorted(metrics.items())
    ]
    header = ("metric", "value", "standard error", "unit", "examples")
    return "## All figures\n\n" + _table(header, rows)
