"""Split raw files into the bytes of their documents, in bounded memory whatever they hold.

Where a document begins and ends depends on the file's bytes alone, never on how they are read.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

from llm.errors import DataError

BLOCK_BYTES = 1 << 20
MAX_RECORD_BYTES = 12 << 20
"""Longer records are skipped: parsed, `{"":{}},` a million times takes 35 times its bytes."""
BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")
OPEN_OR_CLOSE = re.compile(rb'["\[\]{}]')
OPEN_CLOSE_OR_COMMA = re.compile(rb'["\[\]{},]')
QUOTE_OR_BACKSLASH = re.compile(rb'["\\]')


def cut_text(file: IO[bytes], target_bytes: int) -> Iterator[bytes]:
    """Cut a file into pieces of about `target_bytes`, at most twice that; joined they give it back.

    A piece ends after the first blank lines past `target_bytes`, else at a line's end, else between
    two characters. Where it ends depends on the bytes alone, not on how they are read.
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
    file: IO[bytes], name: str, line: int = 1, end_bytes: int | None = None
) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield (line, offset, bytes) of each line, None where it is over the limit.

    The first has the number `line`; the last one begins before `end_bytes`.
    """
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
