"""Read raw files into documents, in bounded memory whatever the files hold.

Text files are cut at blank lines; `.jsonl` holds a record a line and `.json` one array of them (or
one record). What cannot be used comes as `Unusable`, with the reason, file and line.
"""

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Literal, cast

from llm.artifact import Json
from llm.data.formats import TEXT_SUFFIXES, Content
from llm.errors import DataError

BLOCK_BYTES = 1 << 20
MAX_RECORD_BYTES = 16 << 20
"""Longer records are skipped: parsed, one can take sixteen times its bytes."""
EXCERPT_CHARACTERS = 200
ROLES = frozenset(("system", "user", "assistant"))
BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)

OPEN_OR_CLOSE = re.compile(rb'["\[\]{}]')
OPEN_CLOSE_OR_COMMA = re.compile(rb'["\[\]{},]')
QUOTE_OR_BACKSLASH = re.compile(rb'["\\]')

DecodePolicy = Literal["replace", "skip", "strict"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where something begins in a raw file: line from 1, offset from 0."""

    file: str
    line: int
    offset_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A document as read: text, or the messages of a chat."""

    place: Place
    text: str = ""
    messages: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    kind: str = "chat"
    group: str | None = None
    """Chats with the same group stay on one side of the split."""
    num_decode_errors: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Unusable:
    """A document that cannot be used, and why."""

    place: Place
    reason: str
    excerpt: str
    num_decode_errors: int = 0


@dataclass(kw_only=True, slots=True)
class _Element:
    """An element of a JSON array while its bytes come in, with the blanks around it."""

    line: int
    offset_bytes: int
    data: bytearray = field(default_factory=bytearray)
    size_bytes: int = 0
    num_line_ends: int = 0

    def add(self, raw: bytes) -> None:
        """Take more of its bytes; those over the limit are counted only."""
        self.size_bytes += len(raw)
        self.num_line_ends += raw.count(b"\n")
        if self.size_bytes <= MAX_RECORD_BYTES:
            self.data += raw

    def finish(self) -> tuple[int, int, bytes | None]:
        """Return line, offset and bytes without the blanks before it; None for too many bytes."""
        blanks = self.data[: len(self.data) - len(self.data.lstrip())]
        raw = None if self.size_bytes > MAX_RECORD_BYTES else bytes(self.data.strip())
        return self.line + blanks.count(b"\n"), self.offset_bytes + len(blanks), raw

    def next(self) -> "_Element":
        """Return the empty element that begins behind this one and its comma."""
        return _Element(
            line=self.line + self.num_line_ends,
            offset_bytes=self.offset_bytes + self.size_bytes + 1,
        )


class _Problem(Exception):
    """Why a record is unusable; caught in this file."""


def read_documents(
    path: Path,
    name: str,
    *,
    content: Content,
    text_key: str,
    policy: DecodePolicy,
    text_document_bytes: int,
) -> Iterator[Document | Unusable]:
    """Yield every document of the file at `path`, called `name` in messages, in its order.

    Raises:
        DataError: UTF-16 or UTF-32; an unclosed JSON array; with the policy `strict`, bytes that
        are no UTF-8.
    """
    with path.open("rb") as file:
        start = _skip_byte_order_mark(file, name)
        if name.endswith(TEXT_SUFFIXES):
            yield from _read_text(
                file, Place(file=name, line=1, offset_bytes=start), policy, text_document_bytes
            )
            return
        split = split_lines if name.endswith(".jsonl") else split_array
        for line, offset_bytes, raw in split(file, name):
            place = Place(file=name, line=line, offset_bytes=offset_bytes)
            if raw is None:
                reason = f"longer than {MAX_RECORD_BYTES >> 20} MiB"
                yield Unusable(place=place, reason=reason, excerpt="")
            else:
                yield _read_record(raw, place, content, text_key, policy)


def cut_text(file: IO[bytes], target_bytes: int) -> Iterator[bytes]:
    """Cut a file into pieces of about `target_bytes`, at most twice that; joined they give it back.

    A piece ends after the first blank lines past `target_bytes`, else at a line's end, else between
    two characters. Where it ends depends on the bytes alone, not on how they are read.
    """
    buffer, start, is_at_end = b"", 0, False
    while True:
        if len(buffer) - start < 2 * target_bytes and not is_at_end:
            block = file.read(max(BLOCK_BYTES, 2 * target_bytes))
            buffer, start, is_at_end = buffer[start:] + block, 0, not block
        elif start == len(buffer):
            return
        else:
            end = _find_cut(buffer, start, target_bytes)
            yield buffer[start:end]
            start = end


def split_lines(file: IO[bytes], name: str) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield (line, offset, bytes) of each line, None where it is over the limit."""
    line, offset = 1, file.tell()
    while raw := file.readline(MAX_RECORD_BYTES + 1):
        is_too_long = len(raw) > MAX_RECORD_BYTES
        size_bytes = len(raw)
        while not raw.endswith(b"\n") and (more := file.readline(BLOCK_BYTES)):
            raw = more
            size_bytes += len(more)
        yield line, offset, None if is_too_long else raw
        line, offset = line + 1, offset + size_bytes


def split_array(file: IO[bytes], name: str) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield (line, offset, bytes) of each element of a JSON array, by brackets and strings.

    A file that holds no array is one element. None stands for an element over the limit.

    Raises:
        DataError: the array is not closed, as in a file that was cut off.
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
    file: IO[bytes], place: Place, policy: DecodePolicy, target_bytes: int
) -> Iterator[Document | Unusable]:
    for raw in cut_text(file, target_bytes):
        text, num_errors = decode(raw, place, policy)
        if num_errors and policy == "skip":
            yield Unusable(
                place=place,
                reason="invalid UTF-8",
                excerpt=text[:EXCERPT_CHARACTERS],
                num_decode_errors=num_errors,
            )
        else:
            yield Document(place=place, text=text, num_decode_errors=num_errors)
        place = Place(
            file=place.file,
            line=place.line + raw.count(b"\n"),
            offset_bytes=place.offset_bytes + len(raw),
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
) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield the elements of the array that `block` and the rest of `file` are the inside of."""
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
        f" line {element.finish()[0]}; the file may have been cut off, get it again"
    )


def _refuse_more(file: IO[bytes], name: str, block: bytes) -> None:
    while block:
        if block.strip():
            raise DataError(
                f"{name}: more follows the end of the JSON array; a .json file is one value, a file"
                " of one record a line is called .jsonl"
            )
        block = file.read(BLOCK_BYTES)


def _read_record(
    raw: bytes, place: Place, content: Content, text_key: str, policy: DecodePolicy
) -> Document | Unusable:
    decoded, num_errors = decode(raw, place, policy)
    try:
        document = _parse(decoded, place, content, text_key)
        num_errors += document.num_decode_errors
        if num_errors and policy == "strict":
            raise DataError(
                f"{place.file}: line {place.line} holds half a surrogate pair (\\ud800 to \\udfff),"
                " which is no text; correct it, or set clean.decode_errors to replace or skip"
            )
        if num_errors and policy == "skip":
            raise _Problem("invalid UTF-8")
    except _Problem as problem:
        return Unusable(
            place=place,
            reason=str(problem),
            excerpt=decoded.strip()[:EXCERPT_CHARACTERS],
            num_decode_errors=num_errors,
        )
    return replace(document, num_decode_errors=num_errors)


def _parse(decoded: str, place: Place, content: Content, text_key: str) -> Document:
    if not decoded.strip():
        raise _Problem("empty")
    try:
        value = json.loads(decoded)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of 5,000 digits
        raise _Problem("malformed JSON") from error
    if not isinstance(value, dict):
        raise _Problem("not an object")
    record = cast(dict[str, Json], value)
    if content == "text":
        text, num_errors = _whole_characters(_string(record, text_key))
        return Document(place=place, text=text, num_decode_errors=num_errors)
    messages, num_errors = _messages(record), 0
    for message in messages:
        message["content"], num_replaced = _whole_characters(message["content"])
        num_errors += num_replaced
    return Document(
        place=place,
        messages=messages,
        kind=_whole_characters(_string(record, "kind", "chat"))[0],
        group=_whole_characters(_string(record, "group"))[0] if "group" in record else None,
        num_decode_errors=num_errors,
    )


def _messages(record: Mapping[str, Json]) -> list[dict[str, str]]:
    """Return role and content of each message, from `messages` or from an instruction."""
    if "messages" in record:
        found = record["messages"]
        if not isinstance(found, list):
            raise _Problem("wrong type")
        messages: list[dict[str, str]] = []
        for message in found:
            if not isinstance(message, dict):
                raise _Problem("wrong type")
            role, content = _string(message, "role"), _string(message, "content")
            messages.append({"role": role, "content": content})
    else:
        question, more = _string(record, "instruction"), _string(record, "input", "")
        messages = [
            {"role": "user", "content": f"{question}\n\n{more}" if more else question},
            {"role": "assistant", "content": _string(record, "output")},
        ]
    if any(message["role"] not in ROLES for message in messages):
        raise _Problem("unknown role")
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not answers:
        raise _Problem("no assistant message")
    if not all(answer.strip() for answer in answers):
        raise _Problem("empty answer")
    return messages


def _string(record: Mapping[str, Json], key: str, default: str | None = None) -> str:
    value = record.get(key, default)
    if value is None and key not in record:
        raise _Problem("missing key")
    if not isinstance(value, str):
        raise _Problem("wrong type")
    return value


def _whole_characters(text: str) -> tuple[str, int]:
    """Return `text` with U+FFFD for each half of a surrogate pair, and how many there were."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return LONE_SURROGATE.subn("\ufffd", text)
    return text, 0
