"""Read tables into records: CSV by lines and quotes, Parquet by row groups and batches.

A table's first line, or its schema, names its columns; a record is a mapping from these.
"""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from llm.artifact import Json
from llm.data.raw.compression import Budget
from llm.data.raw.records import (
    EXCERPT_CHARACTERS,
    TOO_LONG,
    DecodePolicy,
    Place,
    Record,
    Skip,
    Stream,
    decode,
)
from llm.data.raw.splitting import MAX_RECORD_BYTES
from llm.errors import DataError

BLOCK_BYTES = 1 << 20
BATCH_BYTES = 8 << 20
MAX_BATCH_ROWS = 32
"""A page may say a value of megabytes for each of its rows in a few bytes."""
FIELD_END = re.compile(rb"[,\n]")


def read_csv(stream: Stream, policy: DecodePolicy) -> Iterator[Record | Skip]:
    """Yield the records of a CSV file as RFC 4180 has it: commas, and quotes that may hold lines.

    Raises:
        DataError: the first line does not name each column once.
    """
    csv.field_size_limit(MAX_RECORD_BYTES)
    names: list[str] | None = None
    for line, offset_bytes, raw in _split_rows(stream.file, stream.start_bytes):
        place = stream.place(line, offset_bytes)
        if raw is None:
            yield Skip(place=place, reason=TOO_LONG, excerpt="")
            continue
        text, num_errors = decode(raw, place, policy)
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
            if num_errors and policy == "skip"
            else "wrong number of columns"
            if len(fields) != len(names)
            else ""
        )
        if reason or fields is None:
            excerpt = text.strip()[:EXCERPT_CHARACTERS]
            yield Skip(place=place, reason=reason, excerpt=excerpt, num_decode_errors=num_errors)
        else:
            value: dict[str, Json] = dict(zip(names, fields, strict=True))
            yield Record(place=place, value=value, num_decode_errors=num_errors)


def read_parquet(
    stream: Stream, keys: Sequence[str], policy: DecodePolicy, budget: Budget
) -> Iterator[Record | Skip]:
    """Yield the rows of a Parquet file, with those of `keys` that are its columns.

    Memory is that of a page of each column and of a few rows; pyarrow's `read_dictionary`, which
    would keep repeated values apart, holds a row group (539 MB for one of 180 MB, against 12 MB).

    Raises:
        DataError: pyarrow is missing; the file is damaged, or unfolds to more than the budget.
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
        columns = [name for name in keys if name in names]
        others = tuple(name for name in names if name not in columns)
        for index in range(table.num_row_groups):
            group = metadata.row_group(index)
            row_bytes = max(1, group.total_byte_size // max(1, group.num_rows))
            batches = table.iter_batches(
                batch_size=min(MAX_BATCH_ROWS, max(1, BATCH_BYTES // row_bytes)),
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
                    place = Place(
                        file=stream.name,
                        line=number,
                        offset_bytes=0,
                        read_bytes=stream.start_bytes + int(stream.size_bytes * share),
                    )
                    scalars = {name: array[row] for name, array in arrays.items()}
                    yield _read_row(scalars, place, policy, others)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise DataError(
            f"{stream.name}: the Parquet file is damaged or cut off, at row {number + 1}"
            f" ({error}); get it again"
        ) from error


def _split_rows(file: IO[bytes], start_bytes: int) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield (line, offset, bytes) of each row of a CSV file, None where it is over the limit."""
    line, offset_bytes, state = 1, start_bytes, "field"
    data, size_bytes, num_lines = bytearray(), 0, 0
    while piece := file.readline(BLOCK_BYTES):
        size_bytes += len(piece)
        num_lines += piece.endswith(b"\n")
        if size_bytes <= MAX_RECORD_BYTES:
            data += piece
        state = _state_after(piece, state)
        if state == "end":
            yield line, offset_bytes, bytes(data) if size_bytes <= MAX_RECORD_BYTES else None
            line, offset_bytes, state = line + num_lines, offset_bytes + size_bytes, "field"
            data, size_bytes, num_lines = bytearray(), 0, 0
    if size_bytes:
        yield line, offset_bytes, bytes(data) if size_bytes <= MAX_RECORD_BYTES else None


def _state_after(piece: bytes, state: str) -> str:
    """Return where a row is after `piece`, which holds no line end but at its end.

    field: before a field; plain: in one without quotes; quoted: in quotes; quote: after a quote in
    quotes, which ends them or stands for itself; end: after the row.
    """
    if state == "field" and b'"' not in piece:
        return "end" if piece.endswith(b"\n") else "field" if piece.endswith(b",") else "plain"
    position = 0
    while position < len(piece):
        if state == "field" or state == "quote":
            is_quote = piece[position : position + 1] == b'"'
            state, position = ("quoted", position + 1) if is_quote else ("plain", position)
        elif state == "quoted":
            if (found := piece.find(b'"', position)) < 0:
                return state
            state, position = "quote", found + 1
        elif (match := FIELD_END.search(piece, position)) is None:
            return state
        else:
            state, position = "field" if match.group() == b"," else "end", match.end()
    return state


def _column_names(name: str, fields: Sequence[str] | None) -> list[str]:
    if not fields or len(set(fields)) < len(fields):
        raise DataError(
            f"{name}: the first line is to name each column once, found {(fields or [])[:20]}; add"
            " a line of names, or convert the file"
        )
    return list(fields)


def _read_row(
    scalars: Mapping[str, Any], place: Place, policy: DecodePolicy, other_keys: Sequence[str]
) -> Record | Skip:
    """Make Python values of a row's Arrow scalars."""
    value: dict[str, Json] = {}
    num_errors = 0
    for name, scalar in scalars.items():
        try:
            found = scalar.as_py()
        except UnicodeDecodeError:
            if not hasattr(scalar, "as_buffer") or policy == "skip":
                return Skip(place=place, reason="invalid UTF-8", excerpt="", num_decode_errors=1)
            found, num_errors = decode(scalar.as_buffer().to_pybytes(), place, policy)
        if isinstance(found, str) and len(found) > MAX_RECORD_BYTES:
            return Skip(place=place, reason=TOO_LONG, excerpt=found[:EXCERPT_CHARACTERS])
        value[name] = found
    return Record(place=place, value=value, num_decode_errors=num_errors, other_keys=other_keys)
