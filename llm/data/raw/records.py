"""Read text and JSON into records, in bounded memory whatever they hold.

Text is cut at blank lines; `.jsonl` holds a record a line and `.json` one array of them (or one
record). What cannot be read comes as a `Skip` with its reason, file and line. What a record must
hold is for the caller to say.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Literal, cast

from llm.artifact import Json
from llm.data.raw.splitting import MAX_RECORD_BYTES, cut_text, split_array, split_lines
from llm.errors import DataError

EXCERPT_CHARACTERS = 200
TOO_LONG = f"longer than {MAX_RECORD_BYTES >> 20} MiB"

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
class Span:
    """A part of a plain `.jsonl` file: the lines that begin in these bytes."""

    start_bytes: int
    """Where a line begins."""
    end_bytes: int
    line: int = 1
    """Number of the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A piece of a text file, or the JSON object of a record."""

    place: Place
    value: str | dict[str, Json]
    num_decode_errors: int = 0
    """How often U+FFFD stands for bytes that are no UTF-8."""
    other_keys: Sequence[str] = ()
    """Keys whose values were not read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Skip:
    """What cannot be used, and why."""

    place: Place
    reason: str
    excerpt: str
    num_decode_errors: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """The bytes of one file, or of one member of an archive, as they come."""

    name: str
    file: IO[bytes]
    start_bytes: int = 0
    """What was read before: the byte order mark."""
    size_bytes: int = 0
    """Of the raw file, as it lies on the disk."""
    tell: Callable[[], int]
    """How much of the raw file was read."""
    span: Span | None = None
    """What of it to read; None for all."""

    def place(self, line: int, offset_bytes: int) -> Place:
        """Say where something begins."""
        return Place(file=self.name, line=line, offset_bytes=offset_bytes, read_bytes=self.tell())


def read_text(stream: Stream, policy: DecodePolicy, target_bytes: int) -> Iterator[Record | Skip]:
    """Cut text at blank lines into pieces of about `target_bytes`."""
    line, offset_bytes = 1, stream.start_bytes
    for raw in cut_text(stream.file, target_bytes):
        place = stream.place(line, offset_bytes)
        text, num_errors = decode(raw, place, policy)
        if num_errors and policy == "skip":
            yield _invalid(text, place, num_errors)
        else:
            yield Record(place=place, value=text, num_decode_errors=num_errors)
        line, offset_bytes = line + raw.count(b"\n"), offset_bytes + len(raw)


def read_json(stream: Stream, policy: DecodePolicy, *, is_array: bool) -> Iterator[Record | Skip]:
    """Read objects, one a line or the elements of an array."""
    if is_array:
        found = split_array(stream.file, stream.name)
    elif stream.span is None:
        found = split_lines(stream.file, stream.name)
    else:
        found = split_lines(stream.file, stream.name, stream.span.line, stream.span.end_bytes)
    for line, offset_bytes, raw in found:
        place = stream.place(line, offset_bytes)
        if raw is None:
            yield Skip(place=place, reason=TOO_LONG, excerpt="")
        else:
            yield _parse(raw, place, policy)


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


def _parse(raw: bytes, place: Place, policy: DecodePolicy) -> Record | Skip:
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
