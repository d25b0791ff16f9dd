"""Python's engine splits as the library's does, and long texts are cut where no token crosses."""

import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from llm.tokenizer import pre_tokenization
from llm.tokenizer.base import Ids
from llm.tokenizer.bpe import ByteLevelBPE
from llm.tokenizer.pre_tokenization import (
    PRE_TOKENIZATIONS,
    library_pattern,
    split_text,
    word_finder,
)
from llm.tokenizer.word_cache import WordCache

GPT4 = (  # as tiktoken publishes it for cl100k_base
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# what the patterns tell apart, and what engines are known to differ in
HARD = (
    " \n\r\t\x0b\x1c\x85\xa0\u2028\u200b\u180e\ufeffab_S'sSLl\u017fKDd\u212a\u0130é漢ªⅧ²٣1234!?.-"
    "🎉👍🏽\0"
)
hard_text = st.text(alphabet=HARD, max_size=40) | st.text(max_size=40)
fast = settings(max_examples=500, deadline=None)


def library_split(pattern: str, text: str) -> list[str]:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return [piece for piece, _ in split.pre_tokenize_str(text)]


@pytest.mark.parametrize("max_digits", [0, 1, 3])
@pytest.mark.parametrize("name", PRE_TOKENIZATIONS)
def test_both_engines_split_the_same(name: str, max_digits: int) -> None:
    find, pattern = word_finder(name, max_digits), library_pattern(name, max_digits)

    @fast
    @given(text=hard_text)
    def check(text: str) -> None:
        words = find(text)
        assert words is None or words == library_split(pattern, text)

    check()


@pytest.mark.parametrize(("name", "published"), [("gpt2", GPT2), ("gpt4", GPT4)])
@fast
@given(text=hard_text)
def test_published_patterns_are_as_published(name: str, published: str, text: str) -> None:
    pattern = library_pattern(name, max_digits=3 if name == "gpt4" else 0)
    assert library_split(pattern, text) == library_split(published, text)


def test_every_character_that_python_may_split_has_the_same_class_in_the_library() -> None:
    """All of Unicode, one by one: letters, numbers, blanks and the rest."""
    find = word_finder("code", 3)
    sure = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000 and find(chr(i))]
    assert len(sure) > 45_000
    for written, is_member in (
        (r"\p{L}", lambda c: unicodedata.category(c)[0] == "L"),
        (r"\p{N}", lambda c: unicodedata.category(c)[0] == "N"),
        (r"\s", lambda c: c in pre_tokenization._WHITESPACE),
    ):
        matched = pre_tokenizers.Split(Regex(f"{written}+"), behavior="removed")
        left = "".join(piece for piece, _ in matched.pre_tokenize_str("".join(sure)))
        assert left == "".join(c for c in sure if not is_member(c)), written


@pytest.mark.parametrize("name", PRE_TOKENIZATIONS)
def test_usual_text_is_split_by_python(name: str) -> None:
    texts = [
        "def f(x):\n    return 'é'",
        "Straße, Ελλάδα, Москва, 漢字, かな, عربى",
        "“so” — €5 🎉",
    ]
    assert None not in map(word_finder(name, 3), texts)


@pytest.mark.parametrize("name", PRE_TOKENIZATIONS)
def test_words_cut_at_a_cut_are_the_words_of_the_whole(name: str) -> None:
    pattern = library_pattern(name, 3)
    (cuts,) = pre_tokenization._CUTS[name]

    @fast
    @given(parts=st.lists(hard_text, max_size=8), joint=st.sampled_from([" ", "\n", "\n\n", "a b"]))
    def check(parts: list[str], joint: str) -> None:
        text = joint.join(parts)
        places = [0, *(found.start() for found in cuts.finditer(text)), len(text)]
        pieces = [text[start:end] for start, end in pairwise(places)]
        words = [word for piece in pieces for word in library_split(pattern, piece)]
        assert words == library_split(pattern, text)

    check()


def test_long_texts_are_split_into_bounded_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pre_tokenization, "CHUNK_CHARACTERS", 20)
    text = "one two three, four; five!\n" * 9 + "x" * 100 + "漢" * 70
    for name in PRE_TOKENIZATIONS:
        chunks = list(split_text(text, name))
        assert "".join(chunks) == text
        assert max(map(len, chunks)) <= 40


def test_ids_by_words_are_the_librarys_own(tokenizer: ByteLevelBPE, corpus: list[str]) -> None:
    """Also where the cache starts anew in the middle, and where a text needs the library."""
    texts = [*corpus, "a\u1e9e \U00010330 b", "", "x\u0378"]  # of Unicode 5.1, beyond 16 bits, none
    texts += ["a\uffffb", "\uffff"]  # what words are joined by
    expected = [list(ids) for ids in tokenizer._encode_by_library(texts)]
    assert tokenizer.encode_batch(texts) == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm.tokenizer.word_cache.MAX_WORDS", 50)
        patch.setattr("llm.tokenizer.word_cache.CALL_CHARACTERS", 2000)
        assert tokenizer.encode_batch(texts * 2) == expected * 2


def test_the_cache_forgets_when_it_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def encode(words: Sequence[str]) -> tuple[Ids, npt.NDArray[np.int64]]:
        asked.extend(words)
        ids = np.array([ord(c) for word in words for c in word], dtype=np.uint32)
        return ids, np.array([len(word) for word in words])

    cache = WordCache(encode)
    assert [list(ids) for ids in cache.encode([["a", "bc", "a"], [], ["bc"]])] == [
        [97, 98, 99, 97], [], [98, 99],
    ]  # fmt: skip
    assert cache.encode([]) == []
    assert asked == ["a", "bc"]
    monkeypatch.setattr("llm.tokenizer.word_cache.MAX_CHARACTERS", 2)
    assert [list(ids) for ids in cache.encode([["a"]])] == [[97]]
    assert asked == ["a", "bc", "a"]


def test_wikitext_in_both_ways(tokenizer: ByteLevelBPE) -> None:
    path = Path(__file__).parents[2] / "../shared/data/wikitext2/valid.txt"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    text = path.read_text(encoding="utf-8")[:300_000]
    (by_library,) = tokenizer._encode_by_library([text])
    assert tokenizer.encode_batch([text]) == [by_library.tolist()]
    assert re.search("[^\0-\x7f]", text), "some of it is not ASCII"
