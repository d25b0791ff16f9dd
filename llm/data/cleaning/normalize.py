"""Normalize line ends and Unicode composition."""

import unicodedata
from typing import Literal

LINE_ENDS = ("\r\n", "\r", "\x0b", "\x0c", "\x85", "\u2028", "\u2029")

LineEnds = Literal["as_is", "lf"]
UnicodeForm = Literal["as_is", "nfc"]


def normalize(text: str, line_ends: LineEnds, unicode_form: UnicodeForm) -> str:
    """Return `text` with the given line ends and Unicode form. Idempotent.

    Source: Unicode Standard Annex 15. Existing compositions are stable; characters of a later
    Unicode version are left alone by an older Python.
    """
    if line_ends == "lf":
        for line_end in LINE_ENDS:
            text = text.replace(line_end, "\n")
    if unicode_form == "nfc":
        text = unicodedata.normalize("NFC", text)
    return text
