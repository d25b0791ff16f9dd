"""Read raw files into records and documents, whatever their format, compression or archive.

Records that cannot be used are yielded as a `Skip` with reason, file and line. A damaged or
truncated file, or a decompression bomb, raises an error. Memory is bounded; only compressed or
archived Parquet, which needs seeks, is copied to a temporary file.
"""

import codecs
import functools
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from llm.artifact import Json
from llm.data.content import LONE_SURROGATE, Message
from llm.data.raw.archives import members
from llm.data.raw.compression import Budget, decompress
from llm.data.raw.conversations import UnusableError
from llm.data.raw.first_records import FirstRecords, shown_keys
from llm.data.raw.formats import TEXT_SUFFIXES, Format, format_of
from llm.data.raw.record_formats import (
    MISSING_KEY,
    WRONG_TYPE,
    optional_text,
    read_conversation,
)
from llm.data.raw.records import (
    BLOCK_BYTES,
    EXCERPT_CHARACTERS,
    Location,
    ReadOptions,
    Record,
    Skip,
    Span,
    Stream,
    read_json_records,
    read_text_records,
)
from llm.data.raw.tables import read_csv_records, read_parquet_records
from llm.errors import DataError

WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)


@dataclass(kw_only=True, slots=True)
class RawDocument:
    """A document as read: text, the messages of a chat, or a prompt with two answers."""

    location: Location
    text: str = ""
    messages: list[Message] = field(default_factory=list[Message])
    chosen: str = ""
    rejected: str = ""
    kind: str = ""
    group: str = ""
    """Chats and pairs with the same group stay on one side of the split."""
    edits: tuple[str, ...] = ()
    """What was done to the turns of the conversation."""
    source: int = 0
    """Index of the source, where there are several."""
    num_decode_errors: int = 0


def read_documents(
    path: Path, name: str, options: ReadOptions, span: Span | None = None
) -> Iterator[RawDocument | Skip]:
    """Yield the documents of the file at `path`, named `name` in messages, or of a `span` of it.

    Raises:
        DataError: as `read_stream`; or none of the first records has a known format.
    """
    try:
        yield from _read_documents(path, name, options, span)
    except DataError:
        if span is not None:  # lines of a span count from 1: read again with the line of the file
            line = 1 + _count_lines(path, span.start_bytes)
            for _ in _read_documents(path, name, options, replace(span, line=line)):
                pass
        raise


def read_records(
    path: Path, name: str, options: ReadOptions, span: Span | None = None
) -> Iterator[Record | Skip]:
    """Yield the records of the file at `path`, named `name` in messages; see `read_stream`."""
    with path.open("rb") as file:
        yield from read_stream(file, path.stat().st_size, name, options, span)


def read_stream(
    file: IO[bytes], size_bytes: int, name: str, options: ReadOptions, span: Span | None = None
) -> Iterator[Record | Skip]:
    """Yield the records of an open file of `size_bytes`, local or remote.

    Of Parquet only the columns among `options.keys` are read. NUL is an ordinary character. Lone
    surrogates, which JSON can hold, are left in.

    Raises:
        DataError: a damaged file; UTF-16 or UTF-32; an unclosed JSON array; invalid UTF-8 if
        `decode_errors` is `strict`; more than `limits` allow; a missing package.
    """
    budget = Budget(name, size_bytes, options.limits)
    make = functools.partial(Stream, options=options, size_bytes=size_bytes, tell=file.tell)

    def read(inner: IO[bytes], found: Format, shown: str) -> Iterator[Record | Skip]:
        if found.suffix == ".parquet":
            with tempfile.TemporaryFile(dir=options.scratch) as seekable:
                while inner is not file and (block := inner.read(BLOCK_BYTES)):
                    seekable.write(block)
                stream = (
                    make(name=shown, file=file)
                    if inner is file
                    else make(name=shown, file=seekable, start_bytes=file.tell(), size_bytes=0)
                )
                yield from read_parquet_records(stream, budget)
            return
        if span is not None and span.start_bytes:
            start_bytes = inner.seek(span.start_bytes)
        else:
            start_bytes = _skip_byte_order_mark(inner, shown)
        stream = make(name=shown, file=inner, start_bytes=start_bytes, span=span)
        if found.suffix in TEXT_SUFFIXES:
            yield from read_text_records(stream)
        elif found.suffix == ".csv":
            yield from read_csv_records(stream)
        else:
            yield from read_json_records(stream, is_array=found.suffix == ".json")

    def unpacked(inner: IO[bytes], found: Format, shown: str) -> IO[bytes]:
        return decompress(inner, found.compression, shown, budget) if found.compression else inner

    if (outer := format_of(name)) is None:
        raise DataError(f"{name}: unknown file format; download it again")
    plain = unpacked(file, outer, name)
    if not outer.is_archive:
        yield from read(plain, outer, name)
        return
    for member in members(plain, outer.suffix, name, budget, options.limits):
        found = format_of(member.name)
        if member.file is None or found is None:
            location = Location(file=member.name, line=1, offset_bytes=0, read_bytes=file.tell())
            yield Skip(location=location, reason=f"archive: {member.refusal}", excerpt="")
        else:
            yield from read(unpacked(member.file, found, member.name), found, member.name)


def _skip_byte_order_mark(file: IO[bytes], name: str) -> int:
    """Move `file` past its byte order mark, if it has one, and return the offset."""
    head: bytes = file.peek(4)[:4]  # type: ignore[attr-defined]
    if head.startswith(WIDE_MARKS):
        raise DataError(f"{name}: this is UTF-16 or UTF-32; convert the file to UTF-8")
    return len(file.read(len(codecs.BOM_UTF8))) if head.startswith(codecs.BOM_UTF8) else 0


def _count_lines(path: Path, end_bytes: int) -> int:
    num_lines = 0
    with path.open("rb", buffering=0) as file:
        while end_bytes > 0 and (block := file.read(min(BLOCK_BYTES, end_bytes))):
            num_lines += block.count(b"\n")
            end_bytes -= len(block)
    return num_lines


def _read_documents(
    path: Path, name: str, options: ReadOptions, span: Span | None
) -> Iterator[RawDocument | Skip]:
    first = FirstRecords(options)
    is_file_start = span is None or span.start_bytes == 0
    for record in read_records(path, name, options, span):
        if isinstance(record, Skip):
            yield record
        elif isinstance(record.value, str):
            yield RawDocument(
                location=record.location,
                text=record.value,
                num_decode_errors=record.num_decode_errors,
            )
        else:
            if is_file_start:
                first.check(record)
            yield _make_document(record, record.value, options)


def _make_document(
    record: Record, value: dict[str, Json], options: ReadOptions
) -> RawDocument | Skip:
    location, num_errors = record.location, record.num_decode_errors
    try:
        document = _parse(value, location, options)
        document.num_decode_errors += num_errors
        num_errors = document.num_decode_errors
        if num_errors and options.decode_errors == "strict":
            raise DataError(
                f"{location.file}: line {location.line} holds half a surrogate pair (\\ud800 to"
                " \\udfff), which is not text; correct it, or set clean.decode_errors to replace or"
                " skip"
            )
        if num_errors and options.decode_errors == "skip":
            raise UnusableError("invalid UTF-8")
    except UnusableError as error:
        reason, excerpt = str(error), _shown(value)
        if reason == MISSING_KEY:
            excerpt = f"{shown_keys(record)}: {excerpt}"
        return Skip(
            location=location,
            reason=reason,
            excerpt=excerpt[:EXCERPT_CHARACTERS],
            num_decode_errors=num_errors,
        )
    return document


def _parse(record: dict[str, Json], location: Location, options: ReadOptions) -> RawDocument:
    document, num_errors = RawDocument(location=location), 0

    def valid(text: str) -> str:
        nonlocal num_errors
        text, num_replaced = _replace_surrogates(text)
        num_errors += num_replaced
        return text

    if options.content == "text":
        if options.text_key not in record:
            raise UnusableError(MISSING_KEY)
        if not isinstance(text := record[options.text_key], str):
            raise UnusableError(WRONG_TYPE)
        document.text = valid(text)
    else:
        found = read_conversation(record, options.formats, options.tool_turns)
        document.messages = [
            Message(role=message["role"], content=valid(message["content"]))
            for message in found.messages
        ]
        document.chosen, document.rejected = valid(found.chosen), valid(found.rejected)
        document.kind = valid(optional_text(record, "kind"))
        document.group = valid(optional_text(record, "group"))
        document.edits = found.edits
    document.num_decode_errors = num_errors
    return document


def _shown(value: dict[str, Json]) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:  # nested as deep as reading allows, and here the stack is deeper
        return ""


def _replace_surrogates(text: str) -> tuple[str, int]:
    """Return `text` with U+FFFD for each lone surrogate, and how many there were."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return LONE_SURROGATE.subn("\ufffd", text)
    return text, 0
