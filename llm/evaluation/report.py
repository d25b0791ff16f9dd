"""The evaluation report: metrics and samples as values, as JSON and as Markdown."""

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from llm.artifact import Json, canonical
from llm.errors import ArtifactError

FORMAT, VERSION = "report", 1
SIGNIFICANT_DIGITS = 6  # further digits depend on the order of sums: threads, batch sizes
HOW_COMPARED = (
    "Both models of a row are measured on the same items. The difference is that of the model minus"
    " that of the baseline, with its 95 % bootstrap interval over items. p is two-sided: McNemar's"
    " exact test where answers are right or wrong, else a sign-flip test; after Holm's correction"
    " for all rows. Below 0.05 there is a verdict. It is about these models: another seed of the"
    " same training is another model."
)

Verdict = Literal["better", "worse", "not distinguishable"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """A value with its unit and uncertainty."""

    value: float
    unit: str
    num_examples: int
    """Independent examples behind it: documents, bytes, instructions or trials."""
    standard_error: float | None = None
    """In the same unit; None for exact values and for a single example."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One prompt with the completion of each model."""

    kind: Literal["continuation", "instruction"]
    prompt: str
    expected: str | None = None
    """The right answer to an instruction; None for a continuation."""
    completions: Mapping[str, str]
    """By the model's name."""

    def to_tree(self) -> dict[str, Json]:
        """Return one flat record, with a field for each model."""
        fields = {"kind": self.kind, "prompt": self.prompt, "expected": self.expected}
        return {**fields, **self.completions}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> "Sample":
        """Read what `to_tree` made."""
        completions = dict(tree)
        fields = {name: completions.pop(name) for name in ("kind", "prompt", "expected")}
        return cls(**fields, completions=completions)


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One metric of model b compared with that of model a, on the items of both."""

    a: float
    b: float
    difference: float
    """b - a."""
    interval: tuple[float, float]
    """Of the difference, 95 %."""
    p_value: float
    p_holm: float
    """After Holm's correction for everything compared at once."""
    verdict: Verdict
    """Of b."""
    num_items: int
    """Of both models."""
    num_unpaired: int
    """Items of one model only, left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Model b compared with model a."""

    a: str
    b: str
    metrics: Mapping[str, Difference]
    notes: tuple[str, ...] = ()
    """What could not be compared, and why."""

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> "Comparison":
        """Read what `asdict` made, through JSON."""
        metrics: dict[str, Difference] = {}
        for name, found in tree["metrics"].items():
            fields = dict(found)
            low, high = fields.pop("interval")
            metrics[name] = Difference(interval=(low, high), **fields)
        return cls(a=tree["a"], b=tree["b"], metrics=metrics, notes=tuple(tree["notes"]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """All metrics and samples of one evaluation."""

    models: tuple[str, ...]
    """Names of the models, in training order."""
    metrics: Mapping[str, Metric]
    samples: tuple[Sample, ...]
    settings: Mapping[str, str] = field(default_factory=dict[str, str])
    """What was evaluated: model size, tokens seen, data. No times or paths: equal evaluations give
    equal bytes.
    """
    notes: tuple[str, ...] = ()
    """What a metric leaves out, and how much."""
    comparisons: tuple[Comparison, ...] = ()
    """Of each later model with the first, and with the one before."""

    def values(self) -> dict[str, float]:
        """Return the value of every metric by name, sorted."""
        return {name: self.metrics[name].value for name in sorted(self.metrics)}

    def to_json(self) -> bytes:
        """Encode so that equal reports give equal bytes."""
        fields = {**asdict(self), "samples": samples_json(self.samples)}
        tree = canonical({"format": FORMAT, "version": VERSION, **fields})
        return json.dumps(tree, indent=2, sort_keys=True, allow_nan=False).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> "Report":
        """Read what `to_json` wrote.

        Raises:
            ArtifactError: not a report of this version.
        """
        try:
            tree: dict[str, Any] = json.loads(data)
            found = (tree.pop("format"), tree.pop("version"))
            if found != (FORMAT, VERSION):
                raise ValueError(f"found {found}, expected {(FORMAT, VERSION)}")
            metrics = {name: Metric(**metric) for name, metric in tree.pop("metrics").items()}
            samples = tuple(Sample.from_tree(sample) for sample in tree.pop("samples"))
            comparisons = tuple(map(Comparison.from_tree, tree.pop("comparisons")))
            models, notes = tuple(tree.pop("models")), tuple(tree.pop("notes"))
            return cls(
                models=models,
                metrics=metrics,
                samples=samples,
                notes=notes,
                comparisons=comparisons,
                **tree,
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArtifactError(
                f"report.json: no report of this version ({error}); evaluate again"
            ) from error

    def to_markdown(self) -> str:
        """Render the report: verdict, metrics, samples, settings."""
        models = self.models
        sections = [
            "# Evaluation",
            _leak_verdict(self.metrics),
            _text_section(self.metrics, models),
            _answers_section(self.metrics, models),
            _masked_section(self.metrics, models),
            _comparison_section(self.comparisons),
            "\n".join(f"- {escape_markdown(note)}" for note in self.notes),
            *_samples_sections(self.samples, models),
            _settings_section(self.settings),
            _all_metrics_section(self.metrics),
        ]
        return "\n\n".join(section for section in sections if section) + "\n"


def samples_json(samples: Sequence[Sample]) -> list[Json]:
    """Return the samples as the records of `samples.json`."""
    return [sample.to_tree() for sample in samples]


def rounded(value: float, digits: int = SIGNIFICANT_DIGITS) -> float:
    """Round to significant digits, so that a report's bytes hold no noise."""
    return float(f"{value:.{digits}g}")


def escape_markdown(text: str) -> str:
    """Escape any text for a Markdown table cell.

    Line breaks become `<br>`, indentation is kept, and control characters, which a terminal might
    obey, become U+FFFD.
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
    """Return a table with its last `right` columns aligned to the right."""
    rule = ["---"] * (len(header) - right) + ["---:"] * right
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def _cell(metrics: Mapping[str, Metric], name: str) -> str:
    metric, digits = metrics.get(name), 3 if "/exact_match" in name else 4
    if metric is None:
        return "-"
    error = "" if metric.standard_error is None else f" ± {metric.standard_error:.{digits}f}"
    return f"{metric.value:.{digits}f}{error}"


def _rows(
    metrics: Mapping[str, Metric], models: Sequence[str], *names: str
) -> list[tuple[str, ...]]:
    """Return a row per model with some of its metrics."""
    return [
        (f"{model} model", *(_cell(metrics, f"{model}/{name}") for name in names))
        for model in models
    ]


def _leak_verdict(metrics: Mapping[str, Metric]) -> str:
    passed = metrics.get("leak/passed")
    if passed is None:
        return ""
    if passed.value == 1:
        return "The leak test passed: no model sees a token before it has predicted it."
    return (
        "> **THE LEAK TEST FAILED.** A model sees tokens that it has to predict, or it repeats the"
        " last token (trained on unshifted targets, or hardly trained). No other metric of this"
        " report is valid until this is fixed; the `leak/` metrics at the end show which check"
        " failed."
    )


def _text_section(metrics: Mapping[str, Metric], models: Sequence[str]) -> str:
    is_masked = _is_masked(metrics, models)
    names = {} if is_masked else {f"{name} model": f"{name}/bits_per_byte" for name in models}
    names |= {
        "xz -9e": "baseline/xz_bits_per_byte",
        "gzip -9": "baseline/gzip_bits_per_byte",
        "byte unigram": "baseline/unigram_bits_per_byte",
    }
    rows = [(label, _cell(metrics, name)) for label, name in names.items()]
    size = metrics.get("data/validation_bytes")
    documents = "" if size is None else f" in {size.num_examples:,} documents"
    where = "" if size is None else f"Measured on all {int(size.value):,} bytes{documents}. "
    return (
        "## Held-out text\n\n"
        + _table(("", "bits per byte"), rows, right=1)
        + f"\n\n{where}Lower is better; every line is measured on the same bytes. "
        + ("" if is_masked else "The models have seen the training text; ")
        + "gzip and xz start from nothing, and the byte unigram uses these bytes' own frequencies."
        + ("" if is_masked else " ± is one standard error, by document.")
    )


def _masked_section(metrics: Mapping[str, Metric], models: Sequence[str]) -> str:
    """Return the metrics of masked language models, if the models are."""
    if not _is_masked(metrics, models):
        return ""
    heading = ("", "accuracy", "loss (nats per token)")
    of_text = _rows(metrics, models, "masked_accuracy", "masked_loss", "pseudo_perplexity")
    of_answers = _rows(metrics, models, "answer_masked_accuracy", "answer_masked_loss")
    return (
        "## Masked tokens of held-out text\n\n"
        + _table((*heading, "pseudo-perplexity"), of_text, right=3)
        + "\n\n## Masked tokens of held-out answers\n\n"
        + _table(heading, of_answers, right=2)
        + "\n\nAccuracy is the share of masked tokens that the model ranks first. The same tokens"
        " are masked for every model. ± is one standard error, by document; for the"
        " pseudo-perplexity by sequence."
    )


def _answers_section(metrics: Mapping[str, Metric], models: Sequence[str]) -> str:
    if _is_masked(metrics, models):
        return ""
    rows = _rows(metrics, models, "exact_match", "answer_loss")
    header = ("", "exact match", "answer loss (nats per token)")
    section = "## Held-out instructions\n\n" + _table(header, rows, right=2)
    prefix = f"{models[-1]}/exact_match/" if models else "/"
    kinds = [name.removeprefix(prefix) for name in sorted(metrics) if name.startswith(prefix)]
    if not kinds:
        return section
    by_kind = [
        (
            escape_markdown(kind),
            *(_cell(metrics, f"{model}/exact_match/{kind}") for model in models),
            f"{metrics[prefix + kind].num_examples:,}",
        )
        for kind in kinds
    ]
    header = ("exact match by kind", *_columns(models), "instructions")
    return section + "\n\n" + _table(header, by_kind, right=len(models) + 1)


def _is_masked(metrics: Mapping[str, Metric], models: Sequence[str]) -> bool:
    return any(f"{model}/masked_loss" in metrics for model in models)


def _comparison_section(comparisons: Sequence[Comparison]) -> str:
    rows = [
        (
            *(one.b, one.a, escape_markdown(name)),
            *(f"{value:.4f}" for value in (found.b, found.a)),
            f"{found.difference:+.4f}",
            f"{found.interval[0]:+.4f} to {found.interval[1]:+.4f}",
            f"{found.p_holm:.2g}",
            f"{found.num_items:,}",
            found.verdict,
        )
        for one in comparisons
        for name, found in sorted(one.metrics.items())
    ]
    if not rows:
        return ""
    header = ("model", "baseline", "metric", "of the model", "of the baseline", "difference",
              "95 % interval", "p", "items", "the model is")  # fmt: skip
    notes = [
        f"- {one.b} and {one.a}: {escape_markdown(note)}"
        for one in comparisons
        for note in one.notes
    ]
    parts = ["## Comparison", _table(header, rows), HOW_COMPARED, "\n".join(notes)]
    return "\n\n".join(filter(None, parts))


def _columns(models: Iterable[str]) -> list[str]:
    return [f"{model} model" for model in models]


def _samples_sections(samples: Sequence[Sample], models: Sequence[str]) -> list[str]:
    sections: list[str] = []
    for kind, title, header in (
        ("instruction", "Answers", ("instruction", "expected")),
        ("continuation", "Continuations", ("prompt",)),
    ):
        shown = [sample for sample in samples if sample.kind == kind]
        if shown:
            rows = [
                [
                    *map(escape_markdown, (sample.prompt, sample.expected or "")[: len(header)]),
                    *(escape_markdown(sample.completions[model]) for model in models),
                ]
                for sample in shown
            ]
            table = _table((*header, *_columns(models)), rows)
            sections.append(f"## {title}\n\n{table}")
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
    return "## All metrics\n\n" + _table(header, rows)
