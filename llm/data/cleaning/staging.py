"""Staged documents: written by the map pass, dropped or kept by the global decision.

A shard of them holds the documents of each side as they will be written (`train.jsonl`, ...),
`rows.bin` with the index of all documents in reading order, and `names.jsonl` with the names of
the raw files. The global decision reads the index alone: hashes, side, number of n-grams.
"""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import numpy.typing as npt

from llm.artifact import ArtifactWriter
from llm.data.closing import Closing
from llm.data.documents import LINES, SPLITS, DocumentsWriter
from llm.data.open_files import OpenFiles
from llm.data.raw.records import EXCERPT_CHARACTERS, Location, Skip

DROP_REASONS = ("", "duplicate", "near duplicate")
"""Of the global decision; "" keeps the document."""
Drops = npt.NDArray[np.uint8]
"""Index into DROP_REASONS for each document, (documents,)."""

ROW = np.dtype(
    [
        ("content", ">u8", 2), ("id", ">u8", 2),  # big endian: numbers in the order of the bytes
        ("offset_bytes", "<u8"), ("line_bytes", "<u4"), ("size_bytes", "<u4"), ("name", "<u4"),
        ("line", "<u8"), ("record", "<u8"), ("source", "<u4"), ("num_ngrams", "<u4"),
        ("is_validation", "?"), ("is_tail", "?"), ("is_signed", "?"),
    ]
)  # fmt: skip
PACKED_ROW = struct.Struct("<16s16sQIIIQQII???")
assert PACKED_ROW.size == ROW.itemsize
ROWS_AT_ONCE = 1 << 14
HASHES_PER_FILE = 1 << 20
"""Sorting them takes 80 MB at most; one more file costs less than a sort that does not fit."""
MAX_FILES = 512
ENTRY = np.dtype([("hash", "<u8", 2), ("ordinal", "<u8")])


@dataclass(frozen=True, kw_only=True, slots=True)
class StagedDocument:
    """A document that passed the map pass."""

    id: bytes
    content: bytes
    """16 bytes, equal for documents with equal content."""
    line: bytes
    """Its line in the output file, with the line end."""
    size_bytes: int
    """Of its text in UTF-8; of a chat without the separators of its messages."""
    is_validation: bool
    is_tail: bool = False
    """Whether it was cut from the document before it."""
    is_signed: bool = False
    """Whether it has a MinHash signature."""
    num_ngrams: int = 0
    """Number of its n-grams in the shard's file of n-grams to protect."""
    location: Location
    record: int
    """Ordinal among the records of its shard."""
    source: int = 0

    @property
    def side(self) -> str:
        """`train` or `validation`."""
        return SPLITS[self.is_validation]

    @property
    def text(self) -> str:
        """Its text, or the messages of a chat or pair joined by line feeds."""
        return joined_text(json.loads(self.line))

    def skip(self, reason: str) -> Skip:
        """Return it as a dropped record."""
        return Skip(location=self.location, reason=reason, excerpt=self.text[:EXCERPT_CHARACTERS])


class StagingWriter(Closing):
    """Write the documents of a shard."""

    def __init__(self, writer: ArtifactWriter, *, has_sources: bool) -> None:
        """Open the files."""
        super().__init__()
        self._sides = [
            self._stack.enter_context(DocumentsWriter(writer, side, has_sources=has_sources))
            for side in SPLITS
        ]
        self._rows = self._stack.enter_context(writer.open("rows.bin"))
        self._names = self._stack.enter_context(writer.open("names.jsonl"))
        self._name, self._num_names = "", 0

    def add(self, document: StagedDocument) -> None:
        """Append a document."""
        location, side = document.location, self._sides[document.is_validation]
        if location.file != self._name or not self._num_names:
            self._names.write(json.dumps(location.file).encode() + b"\n")
            self._name, self._num_names = location.file, self._num_names + 1
        self._rows.write(
            PACKED_ROW.pack(
                document.content, document.id, side.num_bytes, len(document.line),
                document.size_bytes, self._num_names - 1, location.line, document.record,
                document.source, document.num_ngrams, document.is_validation, document.is_tail,
                document.is_signed,
            )
        )  # fmt: skip
        side.add(document.line, document.source)


class StagedShard:
    """The documents of one shard, by their number in it."""

    def __init__(self, folder: Path, lines_before: int = 0) -> None:
        """Open a shard whose first record is `lines_before` lines after the start of its file."""
        self.folder = folder
        self.lines_before = lines_before
        self._rows = folder / "rows.bin"
        self._num_documents = self._rows.stat().st_size // ROW.itemsize
        self._paths = [folder / (side + LINES) for side in SPLITS]
        self._names: list[str] = []

    def __len__(self) -> int:
        return self._num_documents

    def rows(self) -> Iterator[npt.NDArray[np.void]]:
        """Yield the index in blocks."""
        with self._rows.open("rb", buffering=0) as file:
            while data := file.read(ROWS_AT_ONCE * ROW.itemsize):
                yield np.frombuffer(data, dtype=ROW)

    def changed_sides(self, drops: Drops) -> set[str]:
        """Return the sides on which a document is dropped."""
        sides, start = set[str](), 0
        for rows in self.rows():
            is_validation = rows["is_validation"][drops[start : start + len(rows)] != 0]
            sides |= {SPLITS[int(side)] for side in np.unique(is_validation)}
            start += len(rows)
        return sides

    def kept(self, drops: Drops, sides: Sequence[str]) -> Iterator[tuple[int, StagedDocument]]:
        """Yield number and content of the documents on `sides` that are not dropped."""
        is_wanted, start = np.array([side in sides for side in SPLITS]), 0  # (2,)
        with OpenFiles() as files:
            for rows in self.rows():
                is_kept = is_wanted[rows["is_validation"].astype(np.intp)]
                is_kept &= drops[start : start + len(rows)] == 0
                fields = PACKED_ROW.iter_unpack(rows[is_kept].tobytes())
                for number, row in zip(np.flatnonzero(is_kept).tolist(), fields, strict=True):
                    yield start + number, self._document(row, files)
                start += len(rows)

    def document(self, number: int, files: OpenFiles) -> StagedDocument:
        """Return one document."""
        data = files.read(self._rows, number * ROW.itemsize, ROW.itemsize)
        return self._document(PACKED_ROW.unpack(data), files)

    def text(self, number: int, files: OpenFiles) -> str:
        """Return the text of one document, without loading the names of raw files."""
        data = files.read(self._rows, number * ROW.itemsize, ROW.itemsize)
        row = np.frombuffer(data, dtype=ROW)[0]
        path = self._paths[int(row["is_validation"])]
        line = files.read(path, int(row["offset_bytes"]), int(row["line_bytes"]))
        return joined_text(json.loads(line))

    def _document(self, row: Sequence[Any], files: OpenFiles) -> StagedDocument:
        (
            content, identifier, offset_bytes, line_bytes, size_bytes, name, line, record, source,
            num_ngrams, is_validation, is_tail, is_signed,
        ) = row  # fmt: skip
        if not self._names:
            names = (self.folder / "names.jsonl").read_bytes().splitlines()
            self._names = [json.loads(name) for name in names]
        return StagedDocument(
            id=identifier,
            content=content,
            line=files.read(self._paths[is_validation], offset_bytes, line_bytes),
            size_bytes=size_bytes,
            is_validation=is_validation,
            is_tail=is_tail,
            is_signed=is_signed,
            num_ngrams=num_ngrams,
            location=Location(
                file=self._names[name], line=line + self.lines_before, offset_bytes=0
            ),
            record=record,
            source=source,
        )


class Staged:
    """The documents of all shards, by their number in all."""

    def __init__(self, shards: Sequence[StagedShard]) -> None:
        """Concatenate shards."""
        self.shards = shards
        self.starts = np.array(list(accumulate(map(len, shards), initial=0)), dtype=np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def part(self, values: npt.NDArray[Any], shard: int) -> npt.NDArray[Any]:
        """Return the values of one shard's documents."""
        return values[self.starts[shard] : self.starts[shard + 1]]

    def column(self, name: str) -> npt.NDArray[Any]:
        """Return one field of the index, (documents,)."""
        parts = list(self.columns(name))
        return np.concatenate(parts) if parts else np.zeros(0, dtype=ROW[name])

    def columns(self, name: str) -> Iterator[npt.NDArray[Any]]:
        """Yield one field of the index in blocks."""
        for shard in self.shards:
            for rows in shard.rows():
                yield rows[name].astype(rows[name].dtype.newbyteorder("="))

    def locate(self, number: int) -> tuple[int, int]:
        """Return the shard of a document, and its number there."""
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        return shard, number - int(self.starts[shard])

    def document(self, number: int, files: OpenFiles) -> StagedDocument:
        """Return one document."""
        shard, number = self.locate(number)
        return self.shards[shard].document(number, files)

    def text(self, number: int, files: OpenFiles) -> str:
        """Return the text of one document."""
        shard, number = self.locate(number)
        return self.shards[shard].text(number, files)

    def find_duplicates(self, scratch: Path) -> npt.NDArray[np.bool_]:
        """Return whether the content of each document occurred before, (documents,).

        A tail counts as the document it was cut from.
        """
        is_whole = ~self.column("is_tail")

        def contents() -> Iterator[npt.NDArray[np.uint64]]:
            start = 0
            for block in self.columns("content"):
                yield block[is_whole[start : start + len(block)]]
                start += len(block)

        is_repeated = find_repeated(contents(), int(is_whole.sum()), scratch)
        return is_repeated[np.cumsum(is_whole) - 1]

    def ranks(self) -> npt.NDArray[np.int64]:
        """Return the rank of each document in the order of precedence, (documents,).

        Of near duplicates the first is kept: validation before training, then by content hash. The
        order does not depend on where a document came from.
        """
        ids, is_validation = self.column("id"), self.column("is_validation")
        ranks = np.empty(len(ids), dtype=np.int64)
        ranks[np.lexsort((ids[:, 1], ids[:, 0], ~is_validation))] = np.arange(len(ids))
        return ranks


def joined_text(record: Mapping[str, Any]) -> str:
    """Return the texts of a document joined by line feeds."""
    return "\n".join(texts_of(record))


def texts_of(record: Mapping[str, Any]) -> list[str]:
    """Return the text of a document; those of its messages; of a pair, of its answers too."""
    if "text" in record:
        return [record["text"]]
    answers = [record[key] for key in ("chosen", "rejected") if key in record]
    return [message["content"] for message in record["messages"]] + answers


def find_repeated(
    blocks: Iterable[npt.NDArray[np.uint64]], num_hashes: int, scratch: Path
) -> npt.NDArray[np.bool_]:
    """Return for each hash whether it occurred before, (num_hashes,).

    Hashes come in blocks of any length, each in two halves, (length, 2). They are partitioned by
    their first bits into unnamed files in `scratch`, each of which is sorted in memory, so memory
    is bounded but for one byte per hash.
    """
    num_files = min(max(num_hashes // HASHES_PER_FILE, 1), MAX_FILES)
    is_repeated = np.zeros(num_hashes, dtype=np.bool_)
    with ExitStack() as stack:
        files = [stack.enter_context(TemporaryFile(dir=scratch)) for _ in range(num_files)]
        start = 0
        for hashes in blocks:
            entries = np.empty(len(hashes), dtype=ENTRY)
            entries["hash"], entries["ordinal"] = hashes, np.arange(start, start + len(hashes))
            partition = (hashes[:, 0] >> np.uint64(32)) * np.uint64(num_files) >> np.uint64(32)
            for number in range(num_files):
                files[number].write(entries[partition == number].tobytes())
            start += len(hashes)
        assert start == num_hashes
        for file in files:
            file.seek(0)
            entries = np.frombuffer(file.read(), dtype=ENTRY)
            order = np.lexsort((entries["hash"][:, 1], entries["hash"][:, 0]))  # stable
            hashes = entries["hash"][order]
            is_same = (hashes[1:] == hashes[:-1]).all(axis=1)
            is_repeated[entries["ordinal"][order[1:][is_same]]] = True
    return is_repeated
