"""Words and n-grams: the same words have the same hashes, wherever they stand."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.data.cleaning import ngrams
from llm.data.cleaning.ngrams import hash_distinct_ngrams, hash_ngrams, hash_words

SINGLES = "\u3000-\udfff"  # scripts without spaces
WORD = re.compile(rf"[{SINGLES}]|(?:(?![{SINGLES}\u2000-\u2fff])[0-9a-z\x80-\U0010ffff])+")
LETTERS = st.sampled_from("aB9 \n.,-é漢字かな한“—…😀\x00")
TEXTS = st.text(LETTERS | st.characters(codec="utf-8"), max_size=80)


def words_of(text: str) -> list[str]:
    """The oracle: one regular expression over characters instead of bytes."""
    return WORD.findall(text.lower())


@given(st.lists(TEXTS, max_size=5))
def test_a_hash_stands_for_a_word(texts: list[str]) -> None:
    words = [word for text in texts for word in words_of(text)]
    hashes = [value for text in texts for value in hash_words(text).tolist()]
    assert len(words) == len(hashes)
    assert len(set(zip(words, hashes, strict=True))) == len(set(words)) == len(set(hashes))


@given(TEXTS, TEXTS)
def test_hashes_do_not_depend_on_the_text_before(before: str, text: str) -> None:
    own = hash_words(text)
    whole = hash_words(f"{before} {text}")
    assert np.array_equal(whole[len(whole) - len(own) :], own)


def test_blocks_are_cut_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Some words, é and 漢字, of a long text.\n" * 20
    whole = hash_words(text)
    monkeypatch.setattr(ngrams, "TEXT_BLOCK_BYTES", 64)
    assert np.array_equal(hash_words(text), whole)
    assert len(hash_words("é" * 100)) == 4, "longer than a block: cut between characters"


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 6))
def test_ngrams_are_equal_where_their_words_are(words: list[str], num_words: int) -> None:
    hashes = hash_ngrams(hash_words(" ".join(words)), num_words)
    expected = [tuple(words[start : start + num_words]) for start in range(len(words))]
    expected = [ngram for ngram in expected if len(ngram) == num_words]
    assert len(expected) == len(hashes)
    assert len(set(zip(expected, hashes.tolist(), strict=True))) == len(set(expected))
    distinct = hash_distinct_ngrams(" ".join(words), num_words)
    assert distinct.tolist() == sorted(set(hashes.tolist())) or len(words) < num_words
    assert len(distinct) > 0 or not words


def test_hashes_are_the_same_on_every_machine() -> None:
    assert hash_words("Hello, world").tolist() == [17087129923793103246, 9306942353692814212]
