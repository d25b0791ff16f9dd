"""Split text and JSON files into records, in bounded memory whatever the bytes.

Text is cut at blank lines; `.jsonl` holds one record per line and `.json` one array of records (or
one record). A record that cannot be read is yielded as a `Skip` with reason, file and line. Record
boundaries depend on the file's bytes alone, not on the block size of the reads.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal, cast

from llm.artifact import Json
from llm.config import ReadingConfig
from llm.data.content import Content
from llm.data.raw.conversations import ToolTurns
from llm.data.raw.record_formats import AUTO, RecordFormat, formats_of, keys_read
from llm.errors import DataError

EXCERPT_CHARACTERS = 200
BLOCK_BYTES = 1 << 20
MAX_RECORD_BYTES = 12 << 20
"""Longer records are skipped: parsed, `{"":{}},` a million times takes 35 times its bytes."""
TOO_LONG = f"longer than {MAX_RECORD_BYTES >> 20} MiB"
BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")
OPEN_OR_CLOSE = re.compile(rb'["\[\]{}]')
OPEN_CLOSE_OR_COMMA = re.compile(rb'["\[\]{},]')
QUOTE_OR_BACKSLASH = re.compile(rb'["\\]')

RawRecord = tuple[int, int, bytes | None]
"""(line, offset, bytes) of a record; no bytes where it exceeds MAX_RECORD_BYTES."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOptions:
    """How the raw files of one source are read."""

    content: Content = "text"
    text_key: str = "text"
    """Key that holds the text of a record."""
    format: str = AUTO
    """Of chats and preference pairs: a name of RECORD_FORMATS, or `auto`."""
    tool_turns: ToolTurns = "drop"
    """What becomes of conversations with tools."""
    setting: str = "download.corpus"
    """Prefix of the source's settings, for error messages."""
    decode_errors: Literal["replace", "skip", "strict"] = "replace"
    text_document_bytes: int
    """Plain text is cut into documents of about this size."""
    limits: ReadingConfig = field(default_factory=ReadingConfig)
    scratch: Path
    """Folder for temporary files."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of a record that are read."""
        is_text = self.content == "text"
        return (self.text_key,) if is_text else keys_read(self.content, self.format)

    @property
    def formats(self) -> dict[str, RecordFormat]:
        """The formats that chats and preference pairs are compared with."""
        return formats_of(self.content, self.format)


@dataclass(frozen=True, kw_only=True, slots=True)
class Location:
    """Position in a raw file: line from 1, offset from 0."""

    file: str
    line: int
    offset_bytes: int
    read_bytes: int = field(default=0, compare=False)
    """Bytes of the raw file read so far, for progress reports."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """The lines of a plain `.jsonl` file that begin in a range of bytes."""

    start_bytes: int
    """Offset of the first line."""
    end_bytes: int
    line: int = 1
    """Number of the first line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A segment of a text file, or a JSON object."""

    location: Location
    value: str | dict[str, Json]
    num_decode_errors: int = 0
    """Number of U+FFFD inserted for invalid UTF-8."""
    other_keys: Sequence[str] = ()
    """Keys whose values were not read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Skip:
    """A record that is dropped, and why."""

    location: Location
    reason: str
    excerpt: str
    num_decode_errors: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """The bytes of one file, or of one member of an archive."""

    name: str
    file: IO[bytes]
    options: ReadOptions
    start_bytes: int = 0
    """Bytes already read: the byte order mark."""
    size_bytes: int = 0
    """Size of the raw file on disk."""
    tell: Callable[[], int]
    """Returns the offset in the raw file."""
    span: Span | None = None
    """The part to read; None for all."""

    def location(self, line: int, offset_bytes: int) -> Location:
        """Return a position in this file."""
        return Location(
            file=self.name, line=line, offset_bytes=offset_bytes, read_bytes=self.tell()
        )

    def decode(self, raw: bytes, location: Location) -> tuple[str, int]:
        """Return the text, and the number of U+FFFD inserted for invalid UTF-8.

        Raises:
            DataError: `decode_errors` is `strict` and the bytes are not UTF-8.
        """
        try:
            return raw.decode(), 0
        except UnicodeDecodeError as error:
            if self.options.decode_errors == "strict":
                line = location.line + raw.count(b"\n", 0, error.start)
                raise DataError(
                    f"{location.file}: byte {location.offset_bytes + error.start} (line {line}) is"
                    f" not UTF-8: {error.reason}; convert the file, or set clean.decode_errors to"
                    " replace or skip"
                ) from error
        text = raw.decode(errors="replace")
        return text, text.count("\ufffd") - raw.count(b"\xef\xbf\xbd")


def read_text_records(stream: Stream) -> Iterator[Record | Skip]:
    """Cut text at blank lines into records of about `text_document_bytes`."""
    line, offset_bytes = 1, stream.start_bytes
    for raw in cut_text(stream.file, stream.options.text_document_bytes):
        location = stream.location(line, offset_bytes)
        text, num_errors = stream.decode(raw, location)
        if num_errors and stream.options.decode_errors == "skip":
            yield _invalid(text, location, num_errors)
        else:
            yield Record(location=location, value=text, num_decode_errors=num_errors)
        line, offset_bytes = line + raw.count(b"\n"), offset_bytes + len(raw)


def read_json_records(stream: Stream, *, is_array: bool) -> Iterator[Record | Skip]:
    """Read JSON objects, one per line or the elements of an array."""
    if is_array:
        found = split_array(stream.file, stream.name)
    elif stream.span is None:
        found = split_lines(stream.file)
    else:
        found = split_lines(stream.file, stream.span.line, stream.span.end_bytes)
    for line, offset_bytes, raw in found:
        location = stream.location(line, offset_bytes)
        if raw is None:
            yield Skip(location=location, reason=TOO_LONG, excerpt="")
        else:
            yield _parse(raw, location, stream)


def cut_text(file: IO[bytes], target_bytes: int) -> Iterator[bytes]:
    """Cut a file into segments of about `target_bytes`, at most twice that.

    A segment ends after the first blank lines past `target_bytes`, else at a line end, else between
    two characters.
    """
    buffer, start, is_at_end = b"", 0, False
    while True:
        if len(buffer) - start <= 2 * target_bytes and not is_at_end:
            block = file.read(max(BLOCK_BYTES, 2 * target_bytes))
            buffer, start, is_at_end = buffer[start:] + block, 0, not block
        elif start == len(buffer):
            return
        else:
            end = _find_cut(buffer, start, target_bytes)
            yield buffer[start:end]
            start = end


def split_lines(
    file: IO[bytes], line: int = 1, end_bytes: int | None = None
) -> Iterator[RawRecord]:
    """Yield the lines from number `line` on that begin before `end_bytes`."""
    offset = file.tell()
    while end_bytes is None or offset < end_bytes:
        if not (raw := file.readline(MAX_RECORD_BYTES + 1)):
            return
        is_too_long = len(raw) > MAX_RECORD_BYTES
        size_bytes = len(raw)
        while not raw.endswith(b"\n") and (more := file.readline(BLOCK_BYTES)):
            raw = more
            size_bytes += len(more)
        yield line, offset, None if is_too_long else raw
        line, offset = line + 1, offset + size_bytes


def split_array(file: IO[bytes], name: str) -> Iterator[RawRecord]:
    """Yield the elements of a JSON array, found by brackets and quotes.

    A file that is not an array is one element.

    Raises:
        DataError: the array is not closed, as in a truncated file.
    """
    head = file.read(BLOCK_BYTES)
    body = head.lstrip()
    offset = file.tell() - len(body)
    line = 1 + head[: len(head) - len(body)].count(b"\n")
    if not body.startswith(b"["):
        raw = body + file.read(MAX_RECORD_BYTES + 1 - len(body))
        if raw:
            yield line, offset, None if len(raw) > MAX_RECORD_BYTES else raw
        return
    yield from _split_elements(
        file, name, body[1:] or file.read(BLOCK_BYTES), _Element(line=line, offset_bytes=offset + 1)
    )


def _parse(raw: bytes, location: Location, stream: Stream) -> Record | Skip:
    text, num_errors = stream.decode(raw, location)
    excerpt, value = text.strip()[:EXCERPT_CHARACTERS], None
    try:
        value = json.loads(text) if excerpt else None
        reason = "not an object" if excerpt else "empty"
    except (ValueError, RecursionError):  # ValueError: also an integer of 5,000 digits
        reason = "malformed JSON"
    if not isinstance(value, dict):
        return Skip(location=location, reason=reason, excerpt=excerpt, num_decode_errors=num_errors)
    if num_errors and stream.options.decode_errors == "skip":
        return _invalid(text, location, num_errors)
    return Record(
        location=location, value=cast(dict[str, Json], value), num_decode_errors=num_errors
    )


def _invalid(text: str, location: Location, num_errors: int) -> Skip:
    excerpt = text.strip()[:EXCERPT_CHARACTERS]
    return Skip(
        location=location, reason="invalid UTF-8", excerpt=excerpt, num_decode_errors=num_errors
    )


@dataclass(kw_only=True, slots=True)
class _Element:
    """An element of a JSON array while it is read, with the whitespace around it."""

    line: int
    offset_bytes: int
    data: bytearray = field(default_factory=bytearray)
    size_bytes: int = 0
    num_line_ends: int = 0

    def add(self, raw: bytes) -> None:
        """Append bytes; beyond the limit only count them."""
        self.size_bytes += len(raw)
        self.num_line_ends += raw.count(b"\n")
        if self.size_bytes <= MAX_RECORD_BYTES:
            self.data += raw

    def finish(self) -> RawRecord:
        """Return the element without the whitespace around it."""
        blanks = self.data[: len(self.data) - len(self.data.lstrip())]
        raw = None if self.size_bytes > MAX_RECORD_BYTES else bytes(self.data.strip())
        return self.line + blanks.count(b"\n"), self.offset_bytes + len(blanks), raw

    def next(self) -> "_Element":
        """Return the empty element after this one and its comma."""
        return _Element(
            line=self.line + self.num_line_ends,
            offset_bytes=self.offset_bytes + self.size_bytes + 1,
        )


def _find_cut(buffer: bytes, start: int, target_bytes: int) -> int:
    limit = min(start + 2 * target_bytes, len(buffer))
    if limit - start <= target_bytes:
        return limit
    if blank := BLANK_LINES.search(buffer, start + target_bytes - 1, limit):
        return blank.end()
    if limit - start < 2 * target_bytes:
        return limit  # the end of the file
    if line_end := buffer.find(b"\n", start + target_bytes - 1, limit) + 1:
        return line_end
    cut = limit
    while limit - cut < 4 and cut < len(buffer) and buffer[cut] & 0xC0 == 0x80:
        cut -= 1  # a continuation byte belongs to the character before
    return cut if cut > start else limit


def _split_elements(
    file: IO[bytes], name: str, block: bytes, element: _Element
) -> Iterator[RawRecord]:
    """Yield the elements of the array whose inside starts with `block` and goes on in `file`."""
    depth, is_in_string, is_escaped, is_first = 0, False, False, True
    while block:
        start, position = 0, int(is_escaped)
        is_escaped = False
        while position < len(block):
            if is_in_string:
                pattern = QUOTE_OR_BACKSLASH
            else:
                pattern = OPEN_OR_CLOSE if depth else OPEN_CLOSE_OR_COMMA
            if (match := pattern.search(block, position)) is None:
                break
            mark, position = match.group(), match.end()
            if mark == b"\\":
                is_escaped = position == len(block)  # then the escaped byte begins the next block
                position += 1
            elif mark == b'"':
                is_in_string = not is_in_string
            elif mark in b"[{":
                depth += 1
            elif depth:
                depth -= 1
            elif mark in b",]":
                element.add(block[start : position - 1])
                if mark == b"," or not is_first or element.data.strip():
                    yield element.finish()
                if mark == b"]":
                    _refuse_more(file, name, block[position:])
                    return
                element, start, is_first = element.next(), position, False
        element.add(block[start:])
        block = file.read(BLOCK_BYTES)
    raise DataError(
        f"{name}: the JSON array is not closed: the file ends inside the element that begins in"
        f" line {element.finish()[0]}; the file may be truncated, download it again"
    )


def _refuse_more(file: IO[bytes], name: str, block: bytes) -> None:
    while block:
        if block.strip():
            raise DataError(
                f"{name}: data after the end of the JSON array; a .json file is one value, a file"
                " of one record per line is called .jsonl"
            )
        block = file.read(BLOCK_BYTES)
