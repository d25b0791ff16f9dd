"""The quality filters of C4 and Gopher, each rule with its drop reason.

Thresholds default to those of the papers. C4's rules on lines remove and count lines first.
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from llm.config import C4Config, GopherConfig
from llm.data.cleaning.ngrams import hash_ngrams

CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*(?=\s|$)")
C4_ENDS = (".", "?", "!", '"')
POLICIES = (
    "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies",
    "use cookies",
)  # fmt: skip
STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
BULLETS = ("•", "-")
ELLIPSES = ("...", "…")
PARAGRAPH_ENDS = re.compile(r"\n{2,}")
PUNCTUATION = "".join(chr(code) for code in range(33, 127) if not chr(code).isalnum())

Ends = npt.NDArray[np.int64]


def apply_c4(text: str, config: C4Config, removed_lines: Counter[str]) -> tuple[str, str]:
    """Return the lines of `text` that pass, and the reason to drop the text or "".

    Removed lines are counted by reason. Filtering is idempotent. Sentences end at . ! ? before
    whitespace, which needs no sentence splitter as C4's own count does.

    Source: Raffel et al. 2020, section 2.2, arXiv:1910.10683, and the code published with it.
    """
    kept: list[str] = []
    removed: Counter[str] = Counter()
    for line in text.split("\n"):
        stripped = _without_citations(line) if config.has_no_citations else line.strip()
        lowered = stripped.lower()
        reason = _c4_line_reason(stripped, lowered, config)
        if reason:
            removed[reason] += 1
        elif config.has_no_lorem_ipsum and "lorem ipsum" in lowered:
            return text, "c4: lorem ipsum"
        elif config.has_no_curly_bracket and "{" in stripped:
            return text, "c4: curly bracket"
        else:
            kept.append(stripped)
    page = "\n".join(kept)
    if config.blocked_words and _holds_any(page, config.blocked_words):
        return text, "c4: blocked word"
    if len(SENTENCE_END.findall(page)) < config.min_sentences:
        return text, "c4: too few sentences"
    removed_lines.update(removed)
    return page, ""


def gopher_reason(text: str, config: GopherConfig) -> str:
    """Return the first of Gopher's rules that `text` violates, or "".

    Source: Rae et al. 2021, appendix A.1.1 and table A1, arXiv:2112.11446. Only characters of words
    count; a character in overlapping n-grams counts once.
    """
    words = text.split()
    if reason := _quality_reason(text, words, config):
        return reason
    ids, ends = _number(words)
    del words  # ten times the bytes of a long text
    return _repetition_reason(text, ids, ends, config)


def _c4_line_reason(line: str, lowered: str, config: C4Config) -> str:
    words = line.split()
    if any(len(word) > config.max_word_characters for word in words):
        return "long word"
    if config.has_terminal_punctuation and (not line.endswith(C4_ENDS) or line.endswith("...")):
        return "no terminal punctuation"
    if len(words) < config.min_words_per_line:
        return "too few words"
    if config.has_no_javascript and "javascript" in lowered:
        return "javascript"
    if config.has_no_policy and any(policy in lowered for policy in POLICIES):
        return "policy"
    return ""


def _without_citations(line: str) -> str:
    """Remove citation marks until none is left: removing one from `[[1]]` leaves another."""
    num_removed = 1
    while num_removed:
        line, num_removed = CITATION.subn("", line) if "[" in line else (line, 0)
    return line.strip()


def _holds_any(text: str, words: Sequence[str]) -> bool:
    either = "|".join(re.escape(word) for word in words)
    return re.search(rf"(?<!\w)(?:{either})(?!\w)", text, re.IGNORECASE) is not None


def _quality_reason(text: str, words: Sequence[str], config: GopherConfig) -> str:
    num_words = len(words)
    if num_words < config.min_words:
        return "gopher: too few words"
    if num_words > config.max_words:
        return "gopher: too many words"
    if num_words == 0:
        return ""
    mean_characters = sum(map(len, words)) / num_words
    if mean_characters < config.min_mean_word_characters:
        return "gopher: words too short"
    if mean_characters > config.max_mean_word_characters:
        return "gopher: words too long"
    if text.count("#") / num_words > config.max_hashes_per_word:
        return "gopher: too many hashes"
    if sum(map(text.count, ELLIPSES)) / num_words > config.max_ellipses_per_word:
        return "gopher: too many ellipses"
    lines = [line.strip() for line in text.split("\n") if not line.isspace() and line]
    num_bullets = sum(line.startswith(BULLETS) for line in lines)
    if num_bullets / len(lines) > config.max_bullet_lines_fraction:
        return "gopher: too many bullet lines"
    num_ellipses = sum(line.endswith(ELLIPSES) for line in lines)
    if num_ellipses / len(lines) > config.max_ellipsis_lines_fraction:
        return "gopher: too many lines end in an ellipsis"
    num_alphabetic = sum(any(map(str.isalpha, word)) for word in words)
    if num_alphabetic / num_words < config.min_alphabetic_words_fraction:
        return "gopher: too few words with a letter"
    found = {word.lower().strip(PUNCTUATION) for word in words} & STOP_WORDS
    return "gopher: too few stop words" if len(found) < config.min_stop_words else ""


def _number(words: Sequence[str]) -> tuple[npt.NDArray[np.uint64], Ends]:
    """Return an id for each word, (W,), and the cumulative word lengths, (W + 1,)."""
    numbers: dict[str, int] = {}
    ids = (numbers.setdefault(word, len(numbers)) for word in words)
    ends = np.zeros(len(words) + 1, dtype=np.int64)
    np.cumsum(np.fromiter(map(len, words), dtype=np.int64, count=len(words)), out=ends[1:])
    return np.fromiter(ids, dtype=np.uint64, count=len(words)), ends


def _repetition_reason(
    text: str, ids: npt.NDArray[np.uint64], ends: Ends, config: GopherConfig
) -> str:
    lines = [line for line in text.split("\n") if line]
    paragraphs = PARAGRAPH_ENDS.split(text.strip("\n"))
    for name, parts, max_parts, max_characters in (
        ("paragraphs", paragraphs, config.max_duplicate_paragraphs_fraction,
         config.max_duplicate_paragraph_characters_fraction),
        ("lines", lines, config.max_duplicate_lines_fraction,
         config.max_duplicate_line_characters_fraction),
    ):  # fmt: skip
        parts_fraction, characters_fraction = _repeated(parts)
        if parts_fraction > max_parts:
            return f"gopher: duplicate {name}"
        if characters_fraction > max_characters:
            return f"gopher: characters in duplicate {name}"
    for num_words in range(2, 11):
        kind = "top" if num_words < 5 else "duplicate"
        fraction = top_fraction if num_words < 5 else duplicate_fraction
        limit: float = getattr(config, f"max_{kind}_{num_words}gram_fraction")
        if fraction(ids, ends, num_words) > limit:
            return f"gopher: {kind} {num_words}-gram"
    return ""


def top_fraction(ids: npt.NDArray[np.uint64], ends: Ends, num_words: int) -> float:
    """Return the share of characters in the most frequent n-gram, the longest of several.

    An n-gram that occurs once counts nothing. `ids`: a number per distinct word, (W,); `ends`:
    cumulative word lengths, (W + 1,).
    """
    hashes = hash_ngrams(ids, num_words)
    _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    if not counts.size or (most := counts.max()) < 2:
        return 0.0
    first = first[counts == most]
    longest = (ends[first + num_words] - ends[first]).max()
    return min(float(longest * most / ends[-1]), 1.0)  # occurrences may overlap


def duplicate_fraction(ids: npt.NDArray[np.uint64], ends: Ends, num_words: int) -> float:
    """Return the share of characters in n-grams that occur more than once."""
    hashes = hash_ngrams(ids, num_words)
    _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    starts = np.flatnonzero(counts[inverse] > 1)
    steps = np.zeros(len(ends), dtype=np.int64)  # (W + 1,)
    steps[starts] += 1
    steps[starts + num_words] -= 1
    is_covered = np.cumsum(steps)[:-1] > 0  # (W,)
    return float(np.diff(ends)[is_covered].sum() / max(ends[-1], 1))


def _repeated(parts: Sequence[str]) -> tuple[float, float]:
    """Return the share of parts that occurred before, and of their characters."""
    num_characters = sum(map(len, parts))
    counts = Counter(parts)
    num_repeated = len(parts) - len(counts)
    repeated_characters = num_characters - sum(map(len, counts))
    return num_repeated / max(len(parts), 1), repeated_characters / max(num_characters, 1)
