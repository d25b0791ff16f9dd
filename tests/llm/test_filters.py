"""Quality filters: each rule has a text that violates it alone; shares equal brute force."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.config import C4Config, GopherConfig
from llm.data.cleaning.filters import apply_c4, duplicate_fraction, gopher_reason, top_fraction

PROSE = (
    "The committee met on Tuesday to discuss plans for restoring the old mill beside the river. "
    "Several members have spoken with builders, and that work should begin before winter arrives. "
    "Neighbors asked whether traffic would be diverted; an engineer explained two possible routes. "
    "Money remains scarce, so volunteers will repair windows while specialists examine timbers.\n"
)  # fmt: skip
NUMBERS = " ".join(map(str, range(1000, 1200)))
PAIRS = [f"{one}{other}" for one in "bcdfghk" for other in "aeiouxyz"]
WORDS = " ".join(f"{pair}word" for pair in PAIRS)
NUMBERED = "".join(f"\n\n{number}" for number in range(9))
GOPHER = {
    "too few words": "The end of that.",
    "too many words": PROSE,
    "words too short": "a b to of the " + " ".join("abcdefghijklmnopqrstuvwxyz" * 3),
    "words too long": "the of " + " ".join(pair * 6 for pair in PAIRS),
    "too many hashes": PROSE + "# " * 30,
    "too many ellipses": PROSE + "... and … " * 6,
    "too many bullet lines": "".join(f"- {line}\n" for line in PROSE.replace(".", ",").split(",")),
    "too many lines end in an ellipsis": "".join(f"{line}…\n" for line in PROSE.split(".")),
    "too few words with a letter": PROSE + NUMBERS,
    "too few stop words": WORDS,
    "duplicate paragraphs": PROSE + "\n\nShort." * 4,
    "characters in duplicate paragraphs": NUMBERED + f"\n\n{PROSE}" * 2,
    "duplicate lines": PROSE + "\nShort." * 4,
    "characters in duplicate lines": "".join(f"line {n}\n" for n in range(9)) + PROSE * 2,
    "top 2-gram": PROSE + " ".join(f"Some thing {word}" for word in WORDS.split()),
    "top 3-gram": " ".join(f"of the to {pair * 12}" for pair in PAIRS),
}  # fmt: skip
C4_LINE = "A whole sentence has more than four words."
C4 = {
    "lorem ipsum": f"{C4_LINE}\nThen came the Lorem Ipsum of the page.",
    "curly bracket": f"{C4_LINE}\nHere is a function {{ of some code.",
    "too few sentences": C4_LINE,
    "blocked word": f"{C4_LINE} {C4_LINE} And one FORBIDDEN word is in it.",
}
C4_LINES = {
    "no terminal punctuation": ["Home and about and contact us", "And then it ended so..."],
    "too few words": ["Read it.", "[1][2][3] [citation needed] too short."],
    "javascript": ["Please turn on JavaScript to read this page."],
    "policy": ["We use cookies to make this page better."],
    "long word": [f"This one has {'x' * 1001} in it."],
}


def test_prose_passes() -> None:
    assert gopher_reason(PROSE, GopherConfig()) == ""


@pytest.mark.parametrize("rule", GOPHER)
def test_each_of_gophers_rules_drops_a_text(rule: str) -> None:
    config = GopherConfig(max_words=20) if rule == "too many words" else GopherConfig()
    assert gopher_reason(GOPHER[rule], config) == f"gopher: {rule}"


@pytest.mark.parametrize("num_words", range(4, 11))
def test_rules_on_ngrams_have_a_threshold_each(num_words: int) -> None:
    kind = "top" if num_words == 4 else "duplicate"
    config = GopherConfig(**{
        f"max_{'top' if n < 5 else 'duplicate'}_{n}gram_fraction": 1.0 for n in range(2, 11)
    })  # fmt: skip
    config = replace(config, max_duplicate_line_characters_fraction=1.0,
                     max_duplicate_paragraph_characters_fraction=1.0)  # fmt: skip
    text = PROSE * 3
    assert gopher_reason(text, replace(config, max_duplicate_lines_fraction=1.0)) == ""
    strict = replace(config, max_duplicate_lines_fraction=1.0,
                     **{f"max_{kind}_{num_words}gram_fraction": 0.01})  # fmt: skip
    assert gopher_reason(text, strict) == f"gopher: {kind} {num_words}-gram"


@given(st.text(st.sampled_from("ab .\n-•…#é漢{"), max_size=300))
def test_with_every_threshold_open_any_text_passes(text: str) -> None:
    config = GopherConfig(
        min_words=0, min_mean_word_characters=0, max_mean_word_characters=1e9, min_stop_words=0,
        max_hashes_per_word=1e9, max_ellipses_per_word=1e9, max_bullet_lines_fraction=1.0,
        max_ellipsis_lines_fraction=1.0, min_alphabetic_words_fraction=0.0,
    )  # fmt: skip
    shares = {field.name: 1.0 for field in fields(config) if "_duplicate_" in field.name}
    shares |= {f"max_top_{num_words}gram_fraction": 1.0 for num_words in (2, 3, 4)}
    assert gopher_reason(text, replace(config, **shares)) == ""


@given(st.lists(st.sampled_from(["a", "bb", "ccc"]), min_size=1, max_size=25), st.integers(2, 6))
def test_shares_of_ngrams_equal_brute_force(words: list[str], num_words: int) -> None:
    numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
    ids = np.array([numbers[word] for word in words], dtype=np.uint64)
    ends = np.cumsum([0, *map(len, words)])
    places = range(len(words) - num_words + 1)
    counts = Counter(tuple(words[place : place + num_words]) for place in places)
    repeated = {ngram: count for ngram, count in counts.items() if count > 1}
    covered = {
        place + offset for place in places for offset in range(num_words)
        if tuple(words[place : place + num_words]) in repeated
    }  # fmt: skip
    num_characters = sum(map(len, words))
    expected = sum(len(words[place]) for place in covered) / num_characters
    assert duplicate_fraction(ids, ends, num_words) == pytest.approx(expected, abs=1e-12)
    most = max(repeated.values(), default=0)
    longest = max((len("".join(n)) for n, count in repeated.items() if count == most), default=0)
    expected = min(longest * most / num_characters, 1.0)
    assert top_fraction(ids, ends, num_words) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("rule", C4)
def test_each_of_c4s_rules_drops_a_page(rule: str) -> None:
    page, removed = C4[rule], Counter[str]()
    assert apply_c4(page, C4Config(blocked_words=("forbidden",)), removed) == (page, f"c4: {rule}")
    assert not removed, "what is dropped whole is not counted by lines"


@pytest.mark.parametrize("rule", C4_LINES)
def test_each_of_c4s_rules_removes_lines(rule: str) -> None:
    removed = Counter[str]()
    kept = [f"{C4_LINE} {C4_LINE}", f'He said, "{C4_LINE}"']
    page = "\n".join([kept[0], *C4_LINES[rule], f' {kept[1][:-1]} [edit][12]" '])
    assert apply_c4(page, C4Config(), removed) == ("\n".join(kept).replace('."', '. "'), "")
    assert removed == {rule: len(C4_LINES[rule])}


@given(st.lists(st.sampled_from([
    C4_LINE, "[[1]]" + C4_LINE, "x[[1]2].", " [edit] One two three four five! [ ]", "", "no",
    "a b c d e...[1]", "a b c d [1] e.[", "We use cookies here and there.",
]), max_size=8))  # fmt: skip
def test_c4_is_idempotent(lines: Sequence[str]) -> None:
    config = C4Config(min_sentences=0)
    page, _ = apply_c4("\n".join(lines), config, Counter())
    removed = Counter[str]()
    assert apply_c4(page, config, removed) == (page, "")
    assert not removed - Counter({"no terminal punctuation": 1}), "an empty page is one empty line"


def test_rules_can_be_turned_off() -> None:
    off = C4Config(
        has_terminal_punctuation=False, min_words_per_line=0, has_no_javascript=False,
        has_no_policy=False, has_no_citations=False, min_sentences=0, has_no_lorem_ipsum=False,
        has_no_curly_bracket=False,
    )  # fmt: skip
    page = "lorem ipsum {\nJavascript [1]\nuse cookies\n\nno"
    assert apply_c4(page, off, Counter()) == (page, "")
