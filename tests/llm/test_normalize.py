"""Normalization: equivalent texts become equal, and it is idempotent."""

from hypothesis import given
from hypothesis import strategies as st

from llm.data.cleaning.normalize import normalize


def test_line_ends_and_composed_characters() -> None:
    assert normalize("a\r\nb\rc\u2028d\x0ce\n\r", "lf", "as_is") == "a\nb\nc\nd\ne\n\n"
    assert normalize("e\u0301 \u212b \ufb01", "as_is", "nfc") == "é \u00c5 \ufb01"
    assert normalize("e\u0301\r\n", "as_is", "as_is") == "e\u0301\r\n"


@given(st.text())
def test_a_second_time_changes_nothing(text: str) -> None:
    once = normalize(text, "lf", "nfc")
    assert normalize(once, "lf", "nfc") == once
