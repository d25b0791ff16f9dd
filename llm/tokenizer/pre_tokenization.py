"""Pre-tokenization: regular expressions that split text before BPE merging.

A pattern's matches concatenate to the whole text, and no token crosses them. The library
`tokenizers` runs it in its own engine. Here it is also translated for Python's engine, which is
several times faster, over the characters on whose classes both engines agree in every version.
"""

import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache

# `code` is GPT-2's pattern, changed for source code: underscores are letters, punctuation takes the
# line ends after it, and an indentation can be one token. In GPT-4's a word takes the sign before
# it: `(self` and `self` share no token, so that a model cannot copy one from the other.
# Sources: GPT-2, encoder.py; GPT-4, cl100k_base of tiktoken.
_TEMPLATES = {
    "code": (
        r" ?[\p{L}_]+|[\p{N}]DIGITS| ?[^\s\p{L}\p{N}_]+[\r\n]*"
        r"|[\s]*[\r\n]+|[\s]+(?![^\s])|[\s]+"
    ),
    "gpt2": (
        r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]DIGITS| ?[^\s\p{L}\p{N}]+"
        r"|[\s]+(?![^\s])|[\s]+"
    ),
    "gpt4": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}]+|[\p{N}]DIGITS"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|[\s]*[\r\n]+|[\s]+(?![^\s])|[\s]+"
    ),
}
PRE_TOKENIZATIONS = tuple(_TEMPLATES)
MAX_DIGITS = 3

CHUNK_CHARACTERS = 32_768  # long texts are cut: the library needs over 100 bytes per token
_LINE_START = r"(?<=\n)(?=\S)"
# a line end may belong to the punctuation before it, but not to a word
_LINE_OR_WORD = re.compile(rf"{_LINE_START}|(?<=[A-Za-z0-9])(?=[ \n\r\t])")
_CUTS = {
    "code": (_LINE_OR_WORD,),
    "gpt2": (re.compile(r"(?<=\S)(?=[ \n\r\t])"),),
    "gpt4": (_LINE_OR_WORD,),
    "imported": (re.compile(_LINE_START), re.compile(r"(?<=\S)(?= )")),  # whatever its pattern
}
_CLASSES = {r"\p{L}": "L", r"\p{N}": "N", r"\s": " "}
_WHITESPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
_FOLDING_TO_ASCII = "\u017f\u212a\ufb05\ufb06"  # to s, k, st: engines differ in ignoring case
_EMOJI = ("\U0001f300", "\U0001faff")  # a range without letters, numbers or whitespace


def library_pattern(pre_tokenization: str, max_digits: int) -> str:
    """Return the regular expression for `tokenizers`; `max_digits` 0 is no limit."""
    digits = f"{{1,{max_digits}}}" if max_digits else "+"
    return _TEMPLATES[pre_tokenization].replace("DIGITS", digits)


@cache
def word_finder(pre_tokenization: str, max_digits: int) -> Callable[[str], list[str] | None]:
    """Return a function that splits a text into words as the library would.

    It returns None for a text with characters that the two engines may class differently: those
    added to Unicode after 2002, or reclassified since.
    """
    pattern = library_pattern(pre_tokenization, max_digits)
    for written, name in _CLASSES.items():
        pattern = pattern.replace(written, _characters()[name])
    find = re.compile(pattern).findall
    find_strange = re.compile(f"[^{''.join(_characters().values())}{'-'.join(_EMOJI)}]").search
    return lambda text: find(text) if text.isascii() or not find_strange(text) else None


def split_text(text: str, pre_tokenization: str = "code") -> Iterator[str]:
    """Yield `text` in chunks of CHUNK_CHARACTERS to twice as many, cut where no token crosses.

    So the chunks' tokens are the text's. Without such a position the cut falls between any two
    characters: the round trip is still exact, in slightly different tokens.
    """
    start = 0
    while len(text) - start > CHUNK_CHARACTERS:
        first, last = start + CHUNK_CHARACTERS, start + 2 * CHUNK_CHARACTERS
        found = (cut.search(text, first, last) for cut in _CUTS[pre_tokenization])
        cut = next(filter(None, found), None)
        end = cut.start() if cut else first
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


@cache
def _characters() -> dict[str, str]:
    """Return the characters of each class (letters, numbers, whitespace, others) as regex ranges.

    Characters whose class differs between versions of Unicode are in none.
    """
    members: dict[str, list[int]] = {"L": [], "N": [], " ": [], "": []}
    for code_point in range(0x10000):
        character = chr(code_point)
        before = unicodedata.ucd_3_2_0.category(character)
        now = unicodedata.category(character)
        is_sure = _class(character, before) == _class(character, now)
        if is_sure and before not in ("Cn", "Cs", "Co") and character not in _FOLDING_TO_ASCII:
            members[_class(character, before)].append(code_point)
    return {name: _ranges(code_points) for name, code_points in members.items()}


def _class(character: str, category: str) -> str:
    if character in _WHITESPACE:
        return " "
    return category[0] if category[0] in "LN" else ""


def _ranges(code_points: list[int]) -> str:
    parts: list[str] = []
    first = last = code_points[0]
    for code_point in [*code_points[1:], sys.maxunicode + 2]:
        if code_point != last + 1:
            parts.append(f"\\u{first:04x}-\\u{last:04x}")
            first = code_point
        last = code_point
    return "".join(parts)
