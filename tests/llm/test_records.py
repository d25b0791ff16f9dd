"""Record boundaries: nothing is lost, memory is bounded, cuts depend on the bytes alone."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.data.raw import records
from llm.data.raw.records import cut_text, split_array, split_lines
from llm.errors import DataError

TEXTS = st.lists(
    st.sampled_from(
        ["a", "word ", "\n", "\n\n", "\r\n\r\n", " \t\n", "é", "😀", "\u2028", "x" * 30]
    )
).map("".join)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


class Trickle(io.BytesIO):
    """A file whose reads return a few bytes at a time."""

    def __init__(self, data: bytes, most_bytes: int) -> None:
        super().__init__(data)
        self.most_bytes = most_bytes

    def read(self, size: int | None = -1) -> bytes:
        return super().read(min(size or 0, self.most_bytes))


@given(TEXTS, st.integers(1, 40), st.integers(1, 64))
def test_joined_segments_are_the_file_and_do_not_depend_on_read_sizes(
    text: str, target_bytes: int, most_bytes: int
) -> None:
    data = text.encode()
    segments = list(cut_text(io.BytesIO(data), target_bytes))
    assert b"".join(segments) == data
    assert all(0 < len(segment) <= 2 * target_bytes for segment in segments)
    assert segments == list(cut_text(Trickle(data, most_bytes), target_bytes))


@given(TEXTS, st.integers(4, 40))
def test_no_cut_goes_through_a_character(text: str, target_bytes: int) -> None:
    segments = cut_text(io.BytesIO(text.encode()), target_bytes)
    assert "".join(segment.decode() for segment in segments) == text


@given(st.binary(), st.integers(1, 40))
def test_joined_segments_of_any_bytes_are_the_file(data: bytes, target_bytes: int) -> None:
    assert b"".join(cut_text(io.BytesIO(data), target_bytes)) == data


def test_text_is_cut_after_the_first_blank_lines_past_the_target() -> None:
    text = b"one\ntwo\n\nthree\n \t\n\nfour\n\nfive"
    assert list(cut_text(io.BytesIO(text), 10)) == [b"one\ntwo\n\nthree\n \t\n\n", b"four\n\nfive"]


def test_text_without_blank_lines_is_cut_at_line_ends_else_anywhere() -> None:
    lines = b"0123456\n" * 10
    assert all(segment.endswith(b"\n") for segment in cut_text(io.BytesIO(lines), 10))
    assert [len(segment) for segment in cut_text(io.BytesIO(b"x" * 50), 10)] == [20, 20, 10]


@given(st.lists(VALUES), st.sampled_from([None, 1]), st.integers(1, 64))
def test_the_elements_of_an_array_equal_those_of_json(
    values: list[object], indent: int | None, most_bytes: int
) -> None:
    data = json.dumps(values, indent=indent, ensure_ascii=False).encode("utf-8", "surrogatepass")
    found = list(split_array(Trickle(data, most_bytes), "f.json"))
    raw = [
        element.decode("utf-8", "surrogatepass") for _, _, element in found if element is not None
    ]
    assert [json.loads(element) for element in raw] == values
    for line, offset_bytes, element in found:
        assert element is not None and data[offset_bytes:].startswith(element)
        assert line == 1 + data[:offset_bytes].count(b"\n")


@given(st.lists(st.text().filter(lambda text: "\n" not in text)))
def test_lines_are_found_with_number_and_offset(lines: list[str]) -> None:
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    for line, offset_bytes, raw in split_lines(io.BytesIO(data)):
        assert raw is not None and data[offset_bytes:].startswith(raw)
        assert raw.rstrip(b"\n").decode("utf-8", "surrogatepass") == lines[line - 1]


def test_records_over_the_limit_are_skipped_and_later_ones_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 20)
    monkeypatch.setattr(records, "BLOCK_BYTES", 7)
    long = '"' + "x, ]\n" * 20 + '"'
    assert list(split_lines(io.BytesIO(b"1\n" + b"x" * 100 + b"\n3"))) == [
        (1, 0, b"1\n"), (2, 2, None), (3, 103, b"3"),
    ]  # fmt: skip
    found = list(split_array(io.BytesIO(f"[1, {long},\n3]".encode()), "f"))
    assert [raw for _, _, raw in found] == [b"1", None, b"3"]
    assert found[2][0] == 1 + 20 + 1
    assert list(split_array(io.BytesIO(b'{"a": "' + b"x" * 30 + b'"}'), "f")) == [(1, 0, None)]


@pytest.mark.parametrize("data", ["[", "[1, 2", '["]', "[[1]", '[{"a": 1}, {"b": "\\"]'])
def test_an_array_that_is_not_closed_is_an_error(data: str) -> None:
    with pytest.raises(DataError, match=r"f\.json: the JSON array is not closed: .* line 1"):
        list(split_array(io.BytesIO(data.encode()), "f.json"))


def test_more_behind_an_array_is_an_error() -> None:
    with pytest.raises(DataError, match=r"f\.json: data after the end"):
        list(split_array(io.BytesIO(b"[1]\n[2]"), "f.json"))


def test_broken_elements_come_as_they_are() -> None:
    found = split_array(io.BytesIO(b"[1,,{'a': 2}, }, ]"), "f.json")
    assert [raw for _, _, raw in found] == [b"1", b"", b"{'a': 2}", b"}", b""]
