"""Decontamination: a shared n-gram is found wherever it stands in a text."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data.cleaning import decontaminate
from llm.data.cleaning.decontaminate import Protected, ngrams_of, write_protected


def judge(
    folder: Path, num_words: int, protected: Sequence[str], texts: Sequence[str]
) -> list[bool]:
    """Return which texts share an n-gram with the protected ones."""
    parts = [np.frombuffer(ngrams_of(text, num_words), dtype="<u8") for text in protected]
    write_protected(parts, sum(map(len, parts)), folder / "all")
    judged = Protected(folder / "all", num_words)
    return [judged.is_in(text) for text in texts]


def ngrams(text: str, num_words: int) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + num_words]) for i in range(len(words) - num_words + 1)}


SENTENCES = st.lists(st.sampled_from("abcd"), max_size=12).map(" ".join)


@given(st.lists(SENTENCES, max_size=5), st.lists(SENTENCES, max_size=8), st.integers(1, 4))
@settings(deadline=None)
def test_shared_ngrams_equal_brute_force(
    protected: list[str], texts: list[str], num_words: int
) -> None:
    known = {ngram for text in protected for ngram in ngrams(text, num_words)}
    expected = [bool(ngrams(text, num_words) & known) for text in texts]
    with TemporaryDirectory() as folder:
        found = judge(Path(folder), num_words, protected, texts)
    assert found == expected


def test_case_and_punctuation_hide_nothing(tmp_path: Path) -> None:
    question = "What is the name of the function that returns the first of two given values?"
    answer = "So: 'what IS the name of the function -- that returns the first of two', he said."
    shorter = "What is the name of the function that returns the first of"
    assert judge(tmp_path, 13, [question], [answer, shorter]) == [True, False]


def test_ngrams_are_merged_once_each_and_sorted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decontaminate, "NGRAMS_AT_ONCE", 3)
    numbers = np.random.default_rng(1).integers(0, 20, 50).astype("<u8")
    write_protected(np.split(numbers, [0, 30]), len(numbers), tmp_path / "all")
    assert np.fromfile(tmp_path / "all", dtype="<u8").tolist() == sorted(set(numbers.tolist()))
