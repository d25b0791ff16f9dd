"""Pre-tokenization: regular expressions that split text before BPE merging.

A pattern's matches, one after another, are the whole text, and no token crosses them. The library
`tokenizers` runs it in its own engine. Here it is written a second time for Python's, which
is several times faster, over the characters on whose classes both engines agree in every version.
"""

import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache

# `code` is GPT-2's with three changes: a word with the space before it, underscores being letters;
# numbers; punctuation with the line ends after it; and runs of whitespace, so that an indentation
# can be one token. GPT-4's lets a word take the sign before it: `(self` and `self` share nothing,
# and a model cannot copy one from the other.
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

# The library needs over 100 bytes a token while it encodes, so a long text goes in pieces.
PIECE_CHARACTERS = 32_768
_LINE_START = r"(?<=\n)(?=\S)"
_CUTS = {
    # a line end may belong to the punctuation before it, but not to a word
    "code": re.compile(rf"{_LINE_START}|(?<=[A-Za-z0-9])(?=[ \n\r\t])"),
    "gpt2": re.compile(r"(?<=\S)(?=[ \n\r\t])"),
    "gpt4": re.compile(rf"{_LINE_START}|(?<=[A-Za-z0-9])(?=[ \n\r\t])"),
}
_CLASSES = {r"\p{L}": "L", r"\p{N}": "N", r"\s": " "}
_WHITESPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
_FOLDING_TO_ASCII = "\u017f\u212a\ufb05\ufb06"  # to s, k, st: engines differ in ignoring case
_EMOJI = ("\U0001f300", "\U0001faff")  # no letter, number or blank among them, nor ever will be


def library_pattern(pre_tokenization: str, max_digits: int) -> str:
    """Return the regular expression for `tokenizers`; 0 digits are as many as there are."""
    digits = f"{{1,{max_digits}}}" if max_digits else "+"
    return _TEMPLATES[pre_tokenization].replace("DIGITS", digits)


@cache
def word_finder(pre_tokenization: str, max_digits: int) -> Callable[[str], list[str] | None]:
    """Return a function that splits a text as the library would, in Python's own engine.

    It returns None for a text with characters that the engines may class differently: those that
    came to Unicode after 2002, or have changed since.
    """
    pattern = library_pattern(pre_tokenization, max_digits)
    for written, name in _CLASSES.items():
        pattern = pattern.replace(written, _characters()[name])
    find = re.compile(pattern).findall
    find_strange = re.compile(f"[^{''.join(_characters().values())}{'-'.join(_EMOJI)}]").search
    return lambda text: find(text) if text.isascii() or not find_strange(text) else None


def split_text(text: str, pre_tokenization: str = "code") -> Iterator[str]:
    """Yield `text` in pieces of about PIECE_CHARACTERS, cut where no token crosses.

    So the pieces' tokens are the text's. Where there is no such place in twice that length the cut
    falls between any two characters: the round trip is still exact, in slightly other tokens.
    """
    cut, start = _CUTS[pre_tokenization], 0
    while len(text) - start > PIECE_CHARACTERS:
        place = cut.search(text, start + PIECE_CHARACTERS, start + 2 * PIECE_CHARACTERS)
        end = place.start() if place else start + PIECE_CHARACTERS
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


@cache
def _characters() -> dict[str, str]:
    """Return the characters of each class as ranges for a regular expression: letters, numbers,
    blanks, and the rest; those that no class is sure of are in none.
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
