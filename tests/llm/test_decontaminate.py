"""Decontamination: a shared n-gram is found wherever it stands; common phrases are no sign."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data.cleaning import decontaminate
from llm.data.cleaning.decontaminate import (
    DocumentCounts,
    Protected,
    merge_ngrams,
    ngrams_of,
    write_uncommon,
)


def judge(
    folder: Path,
    num_words: int,
    max_documents: int,
    protected: Sequence[str],
    texts: Sequence[str],
    num_shards: int = 1,
) -> list[bool]:
    """Judge as the stage does, with texts in shards."""
    shards = range(num_shards)
    paths = [folder / str(number) for number in shards]
    for number, path in enumerate(paths):
        found = (ngrams_of(text, num_words) for text in protected[number::num_shards])
        path.write_bytes(b"".join(found))
    num_ngrams = merge_ngrams(paths, folder / "all")
    judged = Protected(folder / "all", num_words)
    if max_documents:
        total = DocumentCounts(num_ngrams)
        for number in shards:
            counts = DocumentCounts(num_ngrams)
            for text in texts[number::num_shards]:
                counts.add(judged.find(text))
            total.add_bytes(counts.to_bytes())
        write_uncommon(folder / "all", total, max_documents, folder / "uncommon")
        judged = Protected(folder / "uncommon", num_words)
    return [judged.find(text).size > 0 for text in texts]


def ngrams(text: str, num_words: int) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + num_words]) for i in range(len(words) - num_words + 1)}


SENTENCES = st.lists(st.sampled_from("abcd"), max_size=12).map(" ".join)


@given(st.lists(SENTENCES, max_size=5), st.lists(SENTENCES, max_size=8), st.integers(1, 4),
       st.integers(0, 3), st.integers(1, 3))  # fmt: skip
@settings(deadline=None)
def test_the_judgement_is_that_of_brute_force(
    protected: list[str], texts: list[str], num_words: int, max_documents: int, num_shards: int
) -> None:
    known = {ngram for text in protected for ngram in ngrams(text, num_words)}
    expected: list[bool] = []
    for text in texts:
        shared = ngrams(text, num_words) & known
        counts = [sum(ngram in ngrams(other, num_words) for other in texts) for ngram in shared]
        expected.append(any(not max_documents or count <= max_documents for count in counts))
    with TemporaryDirectory() as folder:
        found = judge(Path(folder), num_words, max_documents, protected, texts, num_shards)
    assert found == expected


def test_case_and_punctuation_hide_nothing(tmp_path: Path) -> None:
    question = "What is the name of the function that returns the first of two given values?"
    answer = "So: 'what IS the name of the function -- that returns the first of two', he said."
    shorter = "What is the name of the function that returns the first of"
    assert judge(tmp_path, 13, 10, [question], [answer, shorter]) == [True, False]


def test_counts_stop_at_what_a_byte_holds_in_whatever_parts_they_come() -> None:
    parts = [DocumentCounts(2) for _ in range(3)]
    for counts in parts:
        for _ in range(100):
            counts.add(np.array([1]))
    total = DocumentCounts(2)
    for counts in parts:
        total.add_bytes(counts.to_bytes())
    assert total.values.tolist() == [0, 255]


def test_ngrams_are_merged_once_each_and_sorted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decontaminate, "NGRAMS_AT_ONCE", 3)
    numbers = np.random.default_rng(1).integers(0, 20, 50).astype("<u8")
    for number, part in enumerate(np.split(numbers, [0, 30])):
        (tmp_path / str(number)).write_bytes(part.tobytes())
    num_ngrams = merge_ngrams([tmp_path / str(number) for number in range(3)], tmp_path / "all")
    assert np.fromfile(tmp_path / "all", dtype="<u8").tolist() == sorted(set(numbers.tolist()))
    assert num_ngrams == len(set(numbers.tolist()))
