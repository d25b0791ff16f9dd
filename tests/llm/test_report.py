"""The report: round trips, equal bytes, and text that cannot break out of its table cell."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.errors import ArtifactError
from llm.evaluation.report import (
    Comparison,
    Difference,
    Metric,
    Report,
    Sample,
    escape_markdown,
    rounded,
    samples_json,
)

finite = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
metrics = st.builds(
    Metric,
    value=finite,
    unit=texts,
    num_examples=st.integers(0, 10**12),
    standard_error=finite | st.none(),
)
samples = st.builds(
    Sample,
    kind=st.sampled_from(["continuation", "instruction"]),
    prompt=texts,
    expected=texts | st.none(),
    completions=st.fixed_dictionaries({"base": texts, "chat": texts}),
)
differences = st.builds(
    Difference,
    a=finite,
    b=finite,
    difference=finite,
    interval=st.tuples(finite, finite),
    p_value=finite,
    p_holm=finite,
    verdict=st.sampled_from(["better", "worse", "not distinguishable"]),
    num_items=st.integers(2, 10**6),
    num_unpaired=st.integers(0, 10**6),
)
comparisons = st.builds(
    Comparison,
    a=st.just("base"),
    b=st.just("chat"),
    metrics=st.dictionaries(texts, differences, max_size=2),
    notes=st.lists(texts, max_size=2).map(tuple),
)
reports = st.builds(
    Report,
    models=st.just(("base", "chat")),
    metrics=st.dictionaries(texts, metrics, max_size=4),
    samples=st.lists(samples, max_size=3).map(tuple),
    settings=st.dictionaries(texts, texts, max_size=3),
    notes=st.lists(texts, max_size=2).map(tuple),
    comparisons=st.lists(comparisons, max_size=2).map(tuple),
)


def example(**changed: float) -> Report:
    values = {
        "base/bits_per_byte": 1.5,
        "chat/bits_per_byte": 1.75,
        "baseline/xz_bits_per_byte": 2.0,
        "baseline/gzip_bits_per_byte": 2.25,
        "baseline/unigram_bits_per_byte": 4.5,
        "base/exact_match": 0.0,
        "chat/exact_match": 0.625,
        "leak/passed": 1.0,
    } | changed
    made = {
        name: Metric(value=value, unit="u", num_examples=8, standard_error=0.125)
        for name, value in values.items()
    }
    shown = (
        Sample(
            kind="instruction",
            prompt="add(a, b)?",
            expected="a, b",
            completions={"base": "|", "chat": "a, b"},
        ),
        Sample(
            kind="continuation",
            prompt="def",
            expected=None,
            completions={"base": " f():\n    x", "chat": "<b>"},
        ),
    )
    return Report(
        models=("base", "chat"),
        metrics=made,
        samples=shown,
        settings={"context": "64"},
        notes=("one note",),
        comparisons=(
            Comparison(
                a="base",
                b="chat",
                metrics={
                    "exact_match": Difference(
                        a=0.0,
                        b=0.625,
                        difference=0.625,
                        interval=(0.25, 0.875),
                        p_value=0.0625,
                        p_holm=0.125,
                        verdict="not distinguishable",
                        num_items=8,
                        num_unpaired=0,
                    )
                },
                notes=("answer_loss: not measured on base",),
            ),
        ),
    )


@given(report=reports)
def test_json_round_trips_and_equal_reports_give_equal_bytes(report: Report) -> None:
    data = report.to_json()
    read = Report.from_json(data)
    assert read == report
    assert read.to_json() == data
    assert read.to_markdown() == report.to_markdown()


def test_order_of_insertion_changes_no_byte() -> None:
    report = example()
    turned = Report(
        models=report.models,
        metrics=dict(reversed(report.metrics.items())),
        samples=report.samples,
        settings=dict(reversed(report.settings.items())),
        notes=report.notes,
        comparisons=report.comparisons,
    )
    assert turned.to_json() == report.to_json()
    assert turned.to_markdown() == report.to_markdown()


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"format": "report", "version": 2}'])
def test_another_format_is_refused(data: bytes) -> None:
    with pytest.raises(ArtifactError, match="evaluate again"):
        Report.from_json(data)


def test_a_metric_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        example(**{"base/bits_per_byte": math.nan}).to_json()


def test_markdown_shows_models_beside_baselines_and_answers_beside_the_right_one() -> None:
    text = example().to_markdown()
    lines = text.split("\n")
    headline = ["base model", "chat model", "xz -9e", "gzip -9", "byte unigram"]
    start = lines.index("| base model | 1.5000 ± 0.1250 |")
    assert [line.split(" | ")[0][2:] for line in lines[start : start + 5]] == headline
    assert "| chat model | 0.625 ± 0.125 | - |" in lines
    assert "| add(a, b)? | a, b | \\| | a, b |" in lines
    assert "| def | &nbsp;f():<br>&nbsp;&nbsp;&nbsp;&nbsp;x | &lt;b&gt; |" in lines
    assert "- one note" in lines
    compared = "| chat | base | exact\\_match | 0.6250 | 0.0000 | +0.6250 | +0.2500 to +0.8750 "
    assert compared + "| 0.12 | 8 | not distinguishable |" in lines
    assert "- chat and base: answer\\_loss: not measured on base" in lines
    assert "leak test passed" in text


def test_a_failed_leak_test_is_shown_before_every_metric() -> None:
    text = example(**{"leak/passed": 0.0}).to_markdown()
    assert text.index("LEAK TEST FAILED") < text.index("1.5000")


@given(text=texts)
def test_escaped_text_is_one_cell_of_one_line_without_markup(text: str) -> None:
    cell = escape_markdown(text)
    assert "\n" not in cell and "\r" not in cell and "\x1b" not in cell
    without_breaks = cell.replace("<br>", "")
    assert "<" not in without_breaks and ">" not in without_breaks
    for index, character in enumerate(cell):
        if character in "|`*_[]":
            backslashes = len(cell[:index]) - len(cell[:index].rstrip("\\"))
            assert backslashes % 2 == 1, "an odd number of backslashes escapes it"


def test_values_are_flat_and_sorted() -> None:
    values = example().values()
    assert list(values) == sorted(values)
    assert values["chat/exact_match"] == 0.625


def test_samples_json_has_one_record_a_sample() -> None:
    first, second = samples_json(example().samples)
    assert first == {
        "kind": "instruction",
        "prompt": "add(a, b)?",
        "expected": "a, b",
        "base": "|",
        "chat": "a, b",
    }
    assert isinstance(second, dict) and second["expected"] is None


@pytest.mark.parametrize(
    ("value", "shown"), [(1.23456789, 1.23457), (0.0, 0.0), (-1e-9, -1e-9), (123456789.0, 123457e3)]
)
def test_rounding_keeps_six_significant_digits(value: float, shown: float) -> None:
    assert rounded(value) == shown
