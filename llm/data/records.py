"""Read one raw file into records, in bounded memory whatever it holds.

Text files are cut at blank lines into texts; `.jsonl` holds a record a line and `.json` one array
of them (or one record). What cannot be read comes as a `Skip` with its reason, file and line:
nothing is left out in silence. What a record must hold is for the caller to say.
"""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal, cast

from llm.artifact import Json
from llm.data.formats import TEXT_SUFFIXES
from llm.data.splitting import MAX_RECORD_BYTES, cut_text, split_array, split_lines
from llm.errors import DataError

EXCERPT_CHARACTERS = 200
WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)

DecodePolicy = Literal["replace", "skip", "strict"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where something begins in a raw file: line from 1, offset from 0."""

    file: str
    line: int
    offset_bytes: int
    read_bytes: int = field(default=0, compare=False)
    """How much of the raw file was read by then: how far the reading is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A piece of a text file, or the JSON object of a record."""

    place: Place
    value: str | dict[str, Json]
    num_decode_errors: int = 0
    """How often U+FFFD stands for bytes that are no UTF-8."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Skip:
    """What cannot be used, and why."""

    place: Place
    reason: str
    excerpt: str
    num_decode_errors: int = 0


def read_records(
    path: Path, name: str, *, policy: DecodePolicy, text_document_bytes: int
) -> Iterator[Record | Skip]:
    """Yield all that the file at `path`, called `name` in messages, holds, in its order.

    Raises:
        DataError: UTF-16 or UTF-32; an unclosed JSON array; with the policy `strict`, bytes that
        are no UTF-8.
    """
    with path.open("rb") as file:
        start = _skip_byte_order_mark(file, name)
        if name.lower().endswith(TEXT_SUFFIXES):
            yield from _read_text(file, name, start, policy, text_document_bytes)
            return
        split = split_lines if name.lower().endswith(".jsonl") else split_array
        for line, offset_bytes, raw in split(file, name):
            place = Place(file=name, line=line, offset_bytes=offset_bytes, read_bytes=offset_bytes)
            if raw is None:
                reason = f"longer than {MAX_RECORD_BYTES >> 20} MiB"
                yield Skip(place=place, reason=reason, excerpt="")
            else:
                yield _read_json(raw, place, policy)


def decode(raw: bytes, place: Place, policy: DecodePolicy) -> tuple[str, int]:
    """Return the text, with U+FFFD for what is no UTF-8, and how many times that was put in.

    Raises:
        DataError: the policy is `strict` and something is no UTF-8.
    """
    try:
        return raw.decode(), 0
    except UnicodeDecodeError as error:
        if policy == "strict":
            raise DataError(
                f"{place.file}: byte {place.offset_bytes + error.start} (line"
                f" {place.line + raw.count(bytes([10]), 0, error.start)}) is no UTF-8:"
                f" {error.reason}; convert the file, or set clean.decode_errors to replace or skip"
            ) from error
    text = raw.decode(errors="replace")
    return text, text.count("\ufffd") - raw.count(b"\xef\xbf\xbd")


def _skip_byte_order_mark(file: IO[bytes], name: str) -> int:
    """Leave `file` after its mark, if there is one, and return the offset."""
    head = file.read(4)
    if head.startswith(WIDE_MARKS):
        raise DataError(f"{name}: this is UTF-16 or UTF-32; convert the file to UTF-8")
    start = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
    file.seek(start)
    return start


def _read_text(
    file: IO[bytes], name: str, start: int, policy: DecodePolicy, target_bytes: int
) -> Iterator[Record | Skip]:
    line, offset_bytes = 1, start
    for raw in cut_text(file, target_bytes):
        place = Place(file=name, line=line, offset_bytes=offset_bytes, read_bytes=offset_bytes)
        text, num_errors = decode(raw, place, policy)
        if num_errors and policy == "skip":
            yield _invalid(text, place, num_errors)
        else:
            yield Record(place=place, value=text, num_decode_errors=num_errors)
        line, offset_bytes = line + raw.count(b"\n"), offset_bytes + len(raw)


def _read_json(raw: bytes, place: Place, policy: DecodePolicy) -> Record | Skip:
    text, num_errors = decode(raw, place, policy)
    excerpt, value = text.strip()[:EXCERPT_CHARACTERS], None
    try:
        value = json.loads(text) if excerpt else None
        reason = "not an object" if excerpt else "empty"
    except (ValueError, RecursionError):  # ValueError: also a number of 5,000 digits
        reason = "malformed JSON"
    if not isinstance(value, dict):
        return Skip(place=place, reason=reason, excerpt=excerpt, num_decode_errors=num_errors)
    if num_errors and policy == "skip":
        return _invalid(text, place, num_errors)
    return Record(place=place, value=cast(dict[str, Json], value), num_decode_errors=num_errors)


def _invalid(text: str, place: Place, num_errors: int) -> Skip:
    excerpt = text.strip()[:EXCERPT_CHARACTERS]
    return Skip(place=place, reason="invalid UTF-8", excerpt=excerpt, num_decode_errors=num_errors)
