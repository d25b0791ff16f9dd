"""Read one raw file into records: whatever its format, compressed or in an archive.

What cannot be read comes as a `Skip` with its reason, file and line; a member of an archive that is
refused is one too. A file that is damaged, cut off or a bomb is an error, so that no part of it is
left out in silence. Memory is bounded, and nothing is written but Parquet that lies compressed or
in an archive, which is read from an unnamed scratch file.
"""

import codecs
import functools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from llm.config import ReadingConfig
from llm.data.raw.archives import members
from llm.data.raw.compression import Budget, decompress
from llm.data.raw.formats import TEXT_SUFFIXES, Format, format_of
from llm.data.raw.records import (
    DecodePolicy,
    Place,
    Record,
    Skip,
    Span,
    Stream,
    read_json,
    read_text,
)
from llm.data.raw.tables import read_csv, read_parquet
from llm.errors import DataError

COPY_BLOCK_BYTES = 1 << 20
WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)


def read_records(
    path: Path,
    name: str,
    *,
    keys: Sequence[str],
    policy: DecodePolicy,
    text_document_bytes: int,
    limits: ReadingConfig,
    scratch: Path,
    span: Span | None = None,
) -> Iterator[Record | Skip]:
    """Yield all that the file at `path`, called `name` in messages, or a `span` of it holds.

    Of Parquet only the columns among `keys` are read. NUL is a character like any other; half a
    surrogate pair, which JSON can say, is left for the reader of the key that holds it.

    Raises:
        DataError: a damaged file; UTF-16 or UTF-32; an unclosed JSON array; with the policy
        `strict`, bytes that are no UTF-8; more than `limits` allow; a package that is missing.
    """
    with path.open("rb") as file:
        yield from read_stream(
            file,
            path.stat().st_size,
            name,
            keys=keys,
            policy=policy,
            text_document_bytes=text_document_bytes,
            limits=limits,
            scratch=scratch,
            span=span,
        )


def read_stream(
    file: IO[bytes],
    size_bytes: int,
    name: str,
    *,
    keys: Sequence[str],
    policy: DecodePolicy,
    text_document_bytes: int,
    limits: ReadingConfig,
    scratch: Path,
    span: Span | None = None,
) -> Iterator[Record | Skip]:
    """Do what `read_records` does for a file of `size_bytes` that is open, here or far away."""
    budget = Budget(name, size_bytes, limits)
    make = functools.partial(Stream, size_bytes=size_bytes, tell=file.tell)

    def read(inner: IO[bytes], found: Format, shown: str) -> Iterator[Record | Skip]:
        if found.suffix == ".parquet":
            with tempfile.TemporaryFile(dir=scratch) as seekable:
                while inner is not file and (block := inner.read(COPY_BLOCK_BYTES)):
                    seekable.write(block)
                stream = (
                    make(name=shown, file=file)
                    if inner is file
                    else make(name=shown, file=seekable, start_bytes=file.tell(), size_bytes=0)
                )
                yield from read_parquet(stream, keys, policy, budget)
            return
        if span is not None and span.start_bytes:
            start_bytes = inner.seek(span.start_bytes)
        else:
            start_bytes = _skip_byte_order_mark(inner, shown)
        stream = make(name=shown, file=inner, start_bytes=start_bytes, span=span)
        if found.suffix in TEXT_SUFFIXES:
            yield from read_text(stream, policy, text_document_bytes)
        elif found.suffix == ".csv":
            yield from read_csv(stream, policy)
        else:
            yield from read_json(stream, policy, is_array=found.suffix == ".json")

    def unpacked(inner: IO[bytes], found: Format, shown: str) -> IO[bytes]:
        return decompress(inner, found.compression, shown, budget) if found.compression else inner

    if (outer := format_of(name)) is None:
        raise DataError(f"{name}: its name does not say how to read it; download it again")
    plain = unpacked(file, outer, name)
    if not outer.is_archive:
        yield from read(plain, outer, name)
        return
    for member in members(plain, outer.suffix, name, budget, limits):
        found = format_of(member.name)
        if member.file is None or found is None:
            place = Place(file=member.name, line=1, offset_bytes=0, read_bytes=file.tell())
            yield Skip(place=place, reason=f"archive: {member.refusal}", excerpt="")
        else:
            yield from read(unpacked(member.file, found, member.name), found, member.name)


def _skip_byte_order_mark(file: IO[bytes], name: str) -> int:
    """Leave `file` after its mark, if there is one, and return the offset."""
    head: bytes = file.peek(4)[:4]  # type: ignore[attr-defined]
    if head.startswith(WIDE_MARKS):
        raise DataError(f"{name}: this is UTF-16 or UTF-32; convert the file to UTF-8")
    return len(file.read(len(codecs.BOM_UTF8))) if head.startswith(codecs.BOM_UTF8) else 0
