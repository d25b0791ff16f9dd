"""Documents that passed the steps that look at each alone, on disk until all are known.

A shard of them holds each side's documents as they will be written (`train.jsonl`, ...), `rows.bin`
with what later steps must know of every document, in the order they were read, and `names.jsonl`
with the names of the raw files.
"""

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm.artifact import ArtifactWriter
from llm.data.closing import Closing
from llm.data.documents import LINES, SPLITS, DocumentsWriter
from llm.data.open_files import OpenFiles
from llm.data.raw.records import EXCERPT_CHARACTERS, Place, Skip

ROW = np.dtype(
    [
        ("content", ">u8", 2), ("id", ">u8", 2),  # big endian: numbers in the order of the bytes
        ("offset_bytes", "<u8"), ("line_bytes", "<u4"), ("size_bytes", "<u4"), ("name", "<u4"),
        ("place_line", "<u8"), ("record", "<u8"), ("source", "<u4"), ("is_validation", "?"),
        ("is_tail", "?"),
    ]
)  # fmt: skip
PACKED_ROW = struct.Struct("<16s16sQIIIQQI??")
assert PACKED_ROW.size == ROW.itemsize
ROWS_AT_ONCE = 1 << 14
ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
"""Writes the line of a document."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StagedDocument:
    """A document that passed the steps that look at it alone."""

    id: bytes
    content: bytes
    """16 bytes, of which documents with the same content have the same."""
    line: bytes
    """As it is to be written, with the line's end."""
    size_bytes: int
    """Of its text in UTF-8; of a chat without what joins its messages."""
    is_validation: bool
    is_tail: bool = False
    """Whether it was cut from the document before it."""
    place: Place
    record: int
    """Which of its shard's records it is."""
    source: int = 0


class StagingWriter(Closing):
    """Write the documents of a shard."""

    def __init__(self, writer: ArtifactWriter, *, has_sources: bool) -> None:
        """Open the files."""
        self.num_documents = 0
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
        place, side = document.place, self._sides[document.is_validation]
        if place.file != self._name or not self._num_names:
            self._names.write(json.dumps(place.file).encode() + b"\n")
            self._name, self._num_names = place.file, self._num_names + 1
        self._rows.write(
            PACKED_ROW.pack(
                document.content, document.id, side.num_bytes, len(document.line),
                document.size_bytes, self._num_names - 1, place.line, document.record,
                document.source, document.is_validation, document.is_tail,
            )
        )  # fmt: skip
        side.add(document.line, document.source)
        self.num_documents += 1


class StagedShard:
    """The documents of one shard, by their number in it."""

    def __init__(self, folder: Path, lines_before: int = 0) -> None:
        """Find them. Their lines are `lines_before` further down in their file than staged."""
        self.folder = folder
        self.lines_before = lines_before
        self._rows = folder / "rows.bin"
        self._num_documents = self._rows.stat().st_size // ROW.itemsize
        self._paths = [folder / (side + LINES) for side in SPLITS]
        self._names: list[str] = []

    def __len__(self) -> int:
        return self._num_documents

    def rows(self) -> Iterator[npt.NDArray[np.void]]:
        """Yield the rows of all documents, a few at a time."""
        with self._rows.open("rb", buffering=0) as file:
            while data := file.read(ROWS_AT_ONCE * ROW.itemsize):
                yield np.frombuffer(data, dtype=ROW)

    def line(
        self, files: OpenFiles, is_validation: bool, offset_bytes: int, line_bytes: int
    ) -> bytes:
        """Return the line of a document, given what its row says of it."""
        path = self._paths[is_validation]
        return files.read(path, offset_bytes, line_bytes)

    def text(self, number: int, files: OpenFiles) -> str:
        """Return all that is written in a document."""
        row = self._row(number, files)
        place = (int(row["offset_bytes"]), int(row["line_bytes"]))
        return text_of(self.line(files, bool(row["is_validation"]), *place))

    def skip(self, number: int, reason: str) -> tuple[Skip, int]:
        """Return a document as one that is left out, and which of the shard's records it is."""
        if not self._names:
            names = (self.folder / "names.jsonl").read_bytes().splitlines()
            self._names = [json.loads(name) for name in names]
        with OpenFiles() as files:
            row, text = self._row(number, files), self.text(number, files)
        line = int(row["place_line"]) + self.lines_before
        place = Place(file=self._names[row["name"]], line=line, offset_bytes=0)
        excerpt = text[:EXCERPT_CHARACTERS]
        return Skip(place=place, reason=reason, excerpt=excerpt), int(row["record"])

    def _row(self, number: int, files: OpenFiles) -> np.void:
        data = files.read(self._rows, number * ROW.itemsize, ROW.itemsize)
        return np.frombuffer(data, dtype=ROW)[0]


class Staged:
    """The documents of all shards, by their number in all."""

    def __init__(self, shards: Sequence[StagedShard]) -> None:
        """Put the shards in a row."""
        self.shards = shards
        self.starts = np.array(list(accumulate(map(len, shards), initial=0)), dtype=np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def column(self, name: str) -> npt.NDArray[Any]:
        """Return one field of all documents."""
        parts = list(self.columns(name))
        return np.concatenate(parts) if parts else np.zeros(0, dtype=ROW[name])

    def columns(self, name: str) -> Iterator[npt.NDArray[Any]]:
        """Yield one field of all documents, a few at a time."""
        for shard in self.shards:
            for rows in shard.rows():
                yield rows[name].astype(rows[name].dtype.newbyteorder("="))

    def locate(self, number: int) -> tuple[int, int]:
        """Return which shard a document is in, and its number there."""
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        return shard, number - int(self.starts[shard])

    def text(self, number: int, files: OpenFiles) -> str:
        """Return all that is written in a document."""
        shard, number = self.locate(number)
        return self.shards[shard].text(number, files)


def text_of(line: bytes) -> str:
    """Return all that is written in a document, given its line."""
    return joined_text(json.loads(line))


def joined_text(record: Mapping[str, Any]) -> str:
    """Return all that is written in a document, given as the fields of its line."""
    if "text" in record:
        return record["text"]
    return "\n".join(message["content"] for message in record["messages"])
