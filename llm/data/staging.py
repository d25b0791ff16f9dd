"""Documents on disk between the first look at each and the last: memory stays bounded.

What later steps must know of every document stands in rows of equal length beside their lines.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from llm.data.records import Place

ROW = np.dtype(
    [
        ("id", ">u8", 2),  # big endian, so that numbers stand in the order of the bytes
        ("offset_bytes", "<u8"), ("line_bytes", "<u4"), ("size_bytes", "<u4"),
        ("file", "<u4"), ("place_line", "<u8"), ("is_validation", "?"),
    ]
)  # fmt: skip
ROWS_AT_ONCE = 1 << 14
ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
"""Writes the line of a document."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StagedDocument:
    """A document that passed the steps that look at it alone."""

    id: bytes
    line: bytes
    """As it is to be written, with the line's end."""
    text: str
    """All that is written in it."""
    size_bytes: int
    """Of that, in UTF-8; of a chat without what joins its messages."""
    is_validation: bool
    place: Place


class Staging:
    """Documents in the order they were added, in `folder`, which is removed at the end."""

    def __init__(self, folder: Path) -> None:
        """Begin anew: what a killed attempt left is removed."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder = folder
        self._lines = (folder / "documents.jsonl").open("w+b")
        self._rows = (folder / "rows.bin").open("w+b")
        self._files: dict[str, int] = {}
        self._names: list[str] = []
        self._num_documents = self._num_bytes = 0

    def __enter__(self) -> "Staging":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lines.close()
        self._rows.close()
        shutil.rmtree(self.folder)

    def __len__(self) -> int:
        return self._num_documents

    @property
    def num_bytes(self) -> int:
        """Length of all lines."""
        return self._num_bytes

    def add(self, document: StagedDocument) -> None:
        """Append a document."""
        name = document.place.file
        if (file := self._files.setdefault(name, len(self._names))) == len(self._names):
            self._names.append(name)
        number = int.from_bytes(document.id, "big")
        row = (
            (number >> 64, number & (1 << 64) - 1), self._num_bytes, len(document.line),
            document.size_bytes, file, document.place.line, document.is_validation,
        )  # fmt: skip
        self._rows.write(np.array(row, dtype=ROW).tobytes())
        self._lines.write(document.line)
        self._num_documents += 1
        self._num_bytes += len(document.line)

    def column(self, name: str) -> npt.NDArray[Any]:
        """Return one field of all documents."""
        parts = [rows[name].astype(rows[name].dtype.newbyteorder("=")) for rows in self._all_rows()]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=ROW[name])

    def read(self, ordinal: int) -> StagedDocument:
        """Return one document."""
        (row,) = self._read_rows(ordinal, 1)
        return self._document(row)

    def __iter__(self) -> Iterator[StagedDocument]:
        for rows in self._all_rows():
            yield from map(self._document, rows)

    def _document(self, row: np.void) -> StagedDocument:
        self._lines.seek(int(row["offset_bytes"]))
        line = self._lines.read(int(row["line_bytes"]))
        file = self._names[row["file"]]
        return StagedDocument(
            id=row["id"].tobytes(),
            line=line,
            text=joined_text(json.loads(line)),
            size_bytes=int(row["size_bytes"]),
            is_validation=bool(row["is_validation"]),
            place=Place(file=file, line=int(row["place_line"]), offset_bytes=0),
        )

    def _read_rows(self, start: int, count: int) -> npt.NDArray[np.void]:
        self._rows.seek(start * ROW.itemsize)
        return np.frombuffer(self._rows.read(count * ROW.itemsize), dtype=ROW)

    def _all_rows(self) -> Iterator[npt.NDArray[np.void]]:
        for start in range(0, self._num_documents, ROWS_AT_ONCE):
            yield self._read_rows(start, min(ROWS_AT_ONCE, self._num_documents - start))


def joined_text(record: Mapping[str, Any]) -> str:
    """Return all that is written in a document, given as the fields of its line."""
    if "text" in record:
        return record["text"]
    return "\n".join(message["content"] for message in record["messages"])
