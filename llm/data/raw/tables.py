"""Read CSV and Parquet files into records that map column names to values."""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from llm.artifact import Json
from llm.data.raw.compression import Budget
from llm.data.raw.records import (
    BLOCK_BYTES,
    EXCERPT_CHARACTERS,
    MAX_RECORD_BYTES,
    TOO_LONG,
    Location,
    RawRecord,
    Record,
    Skip,
    Stream,
)
from llm.errors import DataError

PARQUET_BATCH_BYTES = 8 << 20
MAX_BATCH_ROWS = 32
"""A dictionary-encoded page can expand a few bytes to megabytes in each of its rows."""
FIELD_END = re.compile(rb"[,\n]")


def read_csv_records(stream: Stream) -> Iterator[Record | Skip]:
    """Yield the records of a CSV file (RFC 4180: commas, and quotes that may span lines).

    Raises:
        DataError: the first line does not name each column once.
    """
    csv.field_size_limit(MAX_RECORD_BYTES)
    names: list[str] | None = None
    for line, offset_bytes, raw in _split_rows(stream.file, stream.start_bytes):
        location = stream.location(line, offset_bytes)
        if raw is None:
            yield Skip(location=location, reason=TOO_LONG, excerpt="")
            continue
        text, num_errors = stream.decode(raw, location)
        try:
            fields = next(csv.reader([text], strict=True), [])
        except csv.Error:
            fields = None
        if names is None:
            names = _column_names(stream.name, fields)
            continue
        reason = (
            "malformed CSV"
            if fields is None
            else "empty"
            if not fields
            else "invalid UTF-8"
            if num_errors and stream.options.decode_errors == "skip"
            else "wrong number of columns"
            if len(fields) != len(names)
            else ""
        )
        if reason or fields is None:
            excerpt = text.strip()[:EXCERPT_CHARACTERS]
            yield Skip(
                location=location, reason=reason, excerpt=excerpt, num_decode_errors=num_errors
            )
        else:
            value: dict[str, Json] = dict(zip(names, fields, strict=True))
            yield Record(location=location, value=value, num_decode_errors=num_errors)


def read_parquet_records(stream: Stream, budget: Budget) -> Iterator[Record | Skip]:
    """Yield the rows of a Parquet file; only the columns among `stream.options.keys` are read.

    Memory holds one page of each column and a few rows. pyarrow's `read_dictionary` would hold a
    whole row group (539 MB for one of 180 MB, against 12 MB).

    Raises:
        DataError: pyarrow is missing; the file is damaged, or decompresses beyond the budget.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"{stream.name}: to read .parquet the package `pyarrow` is needed; pip install pyarrow"
        ) from error
    number = 0
    try:
        table = parquet.ParquetFile(
            stream.file, pre_buffer=False, buffer_size=BLOCK_BYTES, page_checksum_verification=True
        )
        metadata = table.metadata
        names: list[str] = table.schema_arrow.names
        columns = [name for name in stream.options.keys if name in names]
        others = tuple(name for name in names if name not in columns)
        for index in range(table.num_row_groups):
            group = metadata.row_group(index)
            row_bytes = max(1, group.total_byte_size // max(1, group.num_rows))
            batches = table.iter_batches(
                batch_size=min(MAX_BATCH_ROWS, max(1, PARQUET_BATCH_BYTES // row_bytes)),
                row_groups=[index],
                columns=columns,
                use_threads=False,
            )
            for batch in batches:
                arrays: dict[str, Any] = {name: batch.column(name) for name in columns}
                for name, array in arrays.items():
                    if pyarrow.types.is_dictionary(array.type):
                        arrays[name] = array.dictionary_decode()
                budget.take(sum(array.nbytes for array in arrays.values()))
                for row in range(batch.num_rows):
                    number += 1
                    share = number / max(1, metadata.num_rows)
                    location = Location(
                        file=stream.name,
                        line=number,
                        offset_bytes=0,
                        read_bytes=stream.start_bytes + int(stream.size_bytes * share),
                    )
                    scalars = {name: array[row] for name, array in arrays.items()}
                    yield _read_row(scalars, location, stream, others)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise DataError(
            f"{stream.name}: the Parquet file is damaged or truncated, at row {number + 1}"
            f" ({error}); download it again"
        ) from error


def _split_rows(file: IO[bytes], start_bytes: int) -> Iterator[RawRecord]:
    """Yield the rows of a CSV file."""
    line, offset_bytes, state = 1, start_bytes, "field"
    data, size_bytes, num_lines = bytearray(), 0, 0
    while part := file.readline(BLOCK_BYTES):
        size_bytes += len(part)
        num_lines += part.endswith(b"\n")
        if size_bytes <= MAX_RECORD_BYTES:
            data += part
        state = _state_after(part, state)
        if state == "end":
            yield line, offset_bytes, bytes(data) if size_bytes <= MAX_RECORD_BYTES else None
            line, offset_bytes, state = line + num_lines, offset_bytes + size_bytes, "field"
            data, size_bytes, num_lines = bytearray(), 0, 0
    if size_bytes:
        yield line, offset_bytes, bytes(data) if size_bytes <= MAX_RECORD_BYTES else None


def _state_after(part: bytes, state: str) -> str:
    """Return the state of the CSV parser after `part`, which has a line end at most at its end.

    field: before a field; plain: in an unquoted field; quoted: inside quotes; quote: after a quote
    inside quotes, which closes them or escapes the next quote; end: after the row.
    """
    if state == "field" and b'"' not in part:
        return "end" if part.endswith(b"\n") else "field" if part.endswith(b",") else "plain"
    position = 0
    while position < len(part):
        if state == "field" or state == "quote":
            is_quote = part[position : position + 1] == b'"'
            state, position = ("quoted", position + 1) if is_quote else ("plain", position)
        elif state == "quoted":
            if (found := part.find(b'"', position)) < 0:
                return state
            state, position = "quote", found + 1
        elif (match := FIELD_END.search(part, position)) is None:
            return state
        else:
            state, position = "field" if match.group() == b"," else "end", match.end()
    return state


def _column_names(name: str, fields: Sequence[str] | None) -> list[str]:
    if not fields or len(set(fields)) < len(fields):
        raise DataError(
            f"{name}: the first line must name each column once, found {(fields or [])[:20]}; add"
            " a header line, or convert the file"
        )
    return list(fields)


def _read_row(
    scalars: Mapping[str, Any], location: Location, stream: Stream, other_keys: Sequence[str]
) -> Record | Skip:
    """Convert a row's Arrow scalars to Python values."""
    value: dict[str, Json] = {}
    num_errors = 0
    for name, scalar in scalars.items():
        try:
            found = scalar.as_py()
        except UnicodeDecodeError:
            if not hasattr(scalar, "as_buffer") or stream.options.decode_errors == "skip":
                return Skip(
                    location=location, reason="invalid UTF-8", excerpt="", num_decode_errors=1
                )
            found, num_errors = stream.decode(scalar.as_buffer().to_pybytes(), location)
        if isinstance(found, str) and len(found) > MAX_RECORD_BYTES:
            return Skip(location=location, reason=TOO_LONG, excerpt=found[:EXCERPT_CHARACTERS])
        value[name] = found
    return Record(
        location=location, value=value, num_decode_errors=num_errors, other_keys=other_keys
    )
