"""Read raw files into documents, in bounded memory whatever the files hold.

Text files are cut at blank lines; `.jsonl` holds a record a line and `.json` one array of them (or
one record). What cannot be used comes as `Unusable`, with the reason, file and line.
"""

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal, cast

from llm.artifact import Json
from llm.data.formats import TEXT_SUFFIXES, Content
from llm.data.splitting import MAX_RECORD_BYTES, cut_text, split_array, split_lines
from llm.errors import DataError

EXCERPT_CHARACTERS = 200
ROLES = frozenset(("system", "user", "assistant"))
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)

DecodePolicy = Literal["replace", "skip", "strict"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where something begins in a raw file: line from 1, offset from 0."""

    file: str
    line: int
    offset_bytes: int


@dataclass(kw_only=True, slots=True)
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


def _read_record(
    raw: bytes, place: Place, content: Content, text_key: str, policy: DecodePolicy
) -> Document | Unusable:
    decoded, num_errors = decode(raw, place, policy)
    try:
        document = _parse(decoded, place, content, text_key)
        document.num_decode_errors += num_errors
        num_errors = document.num_decode_errors
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
    return document


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
