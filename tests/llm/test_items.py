"""Items: the file round-trips, equal items give equal bytes, damage is named."""

import json
from pathlib import Path

import numpy as np
import pytest

from llm.artifact import ArtifactWriter
from llm.errors import ArtifactError
from llm.evaluation.items import ITEMS_JSONL, Items, hashed_id, make_items, read_items, write_items


def example() -> dict[str, dict[str, Items]]:
    return {
        model: {
            "bits_per_byte": make_items(["1", "2"], [1.25 * scale, 3.0], [8, 9]),
            "exact_match": make_items(["q"], [scale > 1], higher_is_better=True),
        }
        for model, scale in (("base", 1), ("chat", 2))
    }


def test_items_round_trip_one_record_a_line(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_items(ArtifactWriter(tmp_path / name), example())
    data = (tmp_path / "first" / ITEMS_JSONL).read_bytes()
    assert data == (tmp_path / "second" / ITEMS_JSONL).read_bytes()
    head, *records = map(json.loads, data.splitlines())
    assert head["higher_is_better"] == {"bits_per_byte": False, "exact_match": True}
    assert records[0] == {
        "metric": "bits_per_byte",
        "model": "base",
        "id": "1",
        "numerator": 1.25,
        "denominator": 8,
    }
    assert len(records) == 6
    found = read_items(tmp_path / "first")
    for model, of_model in example().items():
        for metric, items in of_model.items():
            read = found[model][metric]
            assert read.ids == items.ids and read.higher_is_better == items.higher_is_better
            assert np.array_equal(read.numerators, items.numerators)
            assert np.array_equal(read.denominators, items.denominators)


def test_ten_thousand_items_of_a_metric_stay_small(tmp_path: Path) -> None:
    ids = [hashed_id(index) for index in range(10_000)]
    numerators, denominators = np.random.default_rng(1).random((2, 10_000)) * 5000
    items = make_items(ids, numerators, np.ceil(denominators))
    write_items(ArtifactWriter(tmp_path / "made"), {"base": {"bits_per_byte": items}})
    assert (tmp_path / "made" / ITEMS_JSONL).stat().st_size < 1_300_000


def test_what_counts_nothing_is_left_out_and_equal_ids_are_numbered() -> None:
    items = make_items(["a", "b", "a", "a"], [1.0, 0.0, 2.0, 1 / 3], [1, 0, 2, 3])
    assert list(items.ids) == ["a", "a-2", "a-3"]
    assert items.numerators.tolist() == [1.0, 2.0, 0.333333]
    assert items.value == pytest.approx(3.333333 / 6)


def test_an_id_is_a_hash_of_question_and_answer() -> None:
    assert hashed_id("2+2?", "4") == hashed_id("2+2?", "4") != hashed_id("2+2?4", "")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "not there; evaluate again"),
        (b"", "line 1"),
        (b"{}\n", "line 1"),
        (b'{"format":"items","version":2,"higher_is_better":{}}\n', r"line 1.*expected"),
        (b'{"format":"items","version":1,"higher_is_better":{}}\n{"id":"a"}\n', "line 2"),
        (b'{"format":"items","version":1,"higher_is_better":{}}\n{"id"', "line 2"),
    ],
)
def test_damage_is_named(data: bytes | None, said: str, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / ITEMS_JSONL).write_bytes(data)
    with pytest.raises(ArtifactError, match=said):
        read_items(tmp_path)
