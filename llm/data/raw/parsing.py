"""Turn the records of raw files into documents: texts, or chats.

What cannot be used comes as a `Skip`, with the reason, file and line.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llm.artifact import Json
from llm.config import ReadingConfig
from llm.data.content import LONE_SURROGATE, ROLES, Content
from llm.data.raw.formats import keys_of
from llm.data.raw.reading import read_records
from llm.data.raw.record_layouts import FirstRecords, shown_keys
from llm.data.raw.records import EXCERPT_CHARACTERS, DecodePolicy, Place, Record, Skip, Span
from llm.errors import DataError

MISSING_KEY = "missing key"


@dataclass(kw_only=True, slots=True)
class RawDocument:
    """A document as read: text, or the messages of a chat."""

    place: Place
    text: str = ""
    messages: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    kind: str = "chat"
    group: str | None = None
    """Chats with the same group stay on one side of the split."""
    source: int = 0
    """Which of several sources it is from."""
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
    limits: ReadingConfig,
    scratch: Path,
    setting: str,
    span: Span | None = None,
) -> Iterator[RawDocument | Skip]:
    """Yield every document of the file at `path`, called `name` in messages, in its order; with a
    `span` those of that part of it. Its source is that of `setting`.

    Raises:
        DataError: the file cannot be read as what its name says; none of its first records has a
        known layout; with the policy `strict`, text that is no UTF-8.
    """
    first = FirstRecords(content=content, text_key=text_key, setting=setting)
    is_beginning = span is None or span.start_bytes == 0
    for record in read_records(
        path,
        name,
        keys=keys_of(content, text_key),
        policy=policy,
        text_document_bytes=text_document_bytes,
        limits=limits,
        scratch=scratch,
        span=span,
    ):
        if isinstance(record, Skip):
            yield record
        elif isinstance(record.value, str):
            yield RawDocument(
                place=record.place, text=record.value, num_decode_errors=record.num_decode_errors
            )
        else:
            if is_beginning:
                first.see(record)
            yield _make_document(record, record.value, content, text_key, policy)


def _make_document(
    record: Record, value: dict[str, Json], content: Content, text_key: str, policy: DecodePolicy
) -> RawDocument | Skip:
    place, num_errors = record.place, record.num_decode_errors
    try:
        document = _parse(value, place, content, text_key)
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
        excerpt = json.dumps(value, ensure_ascii=False, default=str)
        if str(problem) == MISSING_KEY:
            excerpt = f"{shown_keys(record)}: {excerpt}"
        excerpt = excerpt[:EXCERPT_CHARACTERS]
        return Skip(place=place, reason=str(problem), excerpt=excerpt, num_decode_errors=num_errors)
    return document


def _parse(record: dict[str, Json], place: Place, content: Content, text_key: str) -> RawDocument:
    if content == "text":
        text, num_errors = _whole_characters(_string(record, text_key))
        return RawDocument(place=place, text=text, num_decode_errors=num_errors)
    messages, num_errors = _messages(record), 0
    for message in messages:
        message["content"], num_replaced = _whole_characters(message["content"])
        num_errors += num_replaced
    return RawDocument(
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
        raise _Problem(MISSING_KEY)
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
