"""What becomes of staged documents: decided on all together, told to each shard by two small files.

`fates-00000.bin` holds a byte for each document of the shard; `cuts-00000.bin` the paragraphs that
go from those that stay.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llm.artifact import write_bytes_atomically
from llm.data.cleaning.staging import ENCODER, Staged, StagedShard, text_of
from llm.data.documents import SPLITS
from llm.data.open_files import OpenFiles

FATES = ("", "duplicate", "near duplicate", "duplicate when cut")
"""Why a document is left out; the first stays."""
CUT = np.dtype([("document", "<i8"), ("start", "<u4"), ("end", "<u4")])
"""Characters `start` to `end` of the text of a document."""

COLUMNS = ("is_validation", "offset_bytes", "line_bytes", "size_bytes", "source")
Cuts = npt.NDArray[np.void]


@dataclass(kw_only=True, slots=True)
class LeftDocument:
    """What is left of a staged document."""

    number: int
    """In its shard."""
    side: str
    line: bytes
    size_bytes: int
    source: int

    @property
    def text(self) -> str:
        """All that is written in it."""
        return text_of(self.line)


@dataclass(kw_only=True, slots=True)
class Decisions:
    """Fates and cuts of the documents of one shard, or of all."""

    fates: npt.NDArray[np.uint8]
    """Which of FATES, (documents,)."""
    cuts: Cuts
    """By document and start."""

    @classmethod
    def none(cls, num_documents: int) -> "Decisions":
        """Let all stay."""
        return cls(fates=np.zeros(num_documents, dtype=np.uint8), cuts=np.zeros(0, dtype=CUT))

    @classmethod
    def read(cls, folder: Path, number: int) -> "Decisions":
        """Return those of one shard."""
        fates = np.fromfile(folder / f"fates-{number:05}.bin", dtype=np.uint8)
        return cls(fates=fates, cuts=np.fromfile(folder / f"cuts-{number:05}.bin", dtype=CUT))

    def write(self, folder: Path, staged: Staged) -> None:
        """Write those of each shard to files of its own."""
        folder.mkdir(exist_ok=True)
        for number in range(len(staged.shards)):
            part = self.part(staged, number)
            for name, values in (("fates", part.fates), ("cuts", part.cuts)):
                path = folder / f"{name}-{number:05}.bin"
                write_bytes_atomically(path, values.tobytes(), is_durable=False)

    def part(self, staged: Staged, number: int) -> "Decisions":
        """Return those of one shard, of those of all."""
        start, end = staged.starts[number : number + 2].tolist()
        first, last = np.searchsorted(self.cuts["document"], [start, end])
        cuts = self.cuts[first:last].copy()
        cuts["document"] -= start
        return Decisions(fates=self.fates[start:end], cuts=cuts)

    def changed_sides(self, shard: StagedShard) -> set[str]:
        """Return the sides of a shard that do not stay as they are."""
        is_changed = self.fates != 0
        is_changed[self.cuts["document"]] = True
        changed, start = set[str](), 0
        for rows in shard.rows():
            is_validation = rows["is_validation"][is_changed[start : start + len(rows)]]
            changed |= {SPLITS[int(side)] for side in np.unique(is_validation)}
            start += len(rows)
        return changed

    def left(
        self, shard: StagedShard, sides: Sequence[str] = SPLITS, *, is_cut: bool = False
    ) -> Iterator[LeftDocument]:
        """Yield what is left of a shard's documents on these sides, or only of those cut."""
        chosen = self.fates == 0  # (documents,)
        if is_cut:
            chosen &= np.isin(np.arange(len(chosen)), self.cuts["document"])
        is_wanted, start = np.array([side in sides for side in SPLITS]), 0  # (2,)
        documents = np.ascontiguousarray(self.cuts["document"])
        ends = np.searchsorted(documents, np.arange(len(chosen) + 1))  # its cuts are between two
        with OpenFiles() as files:
            for rows in shard.rows():
                is_left = is_wanted[rows["is_validation"].astype(np.intp)]
                places = np.flatnonzero(is_left & chosen[start : start + len(rows)])
                columns = (rows[name][places].tolist() for name in COLUMNS)
                for place, (is_validation, offset_bytes, line_bytes, size_bytes, source) in zip(
                    places.tolist(), zip(*columns, strict=True), strict=True
                ):
                    document = LeftDocument(
                        number=start + place,
                        side=SPLITS[is_validation],
                        line=shard.line(files, is_validation, offset_bytes, line_bytes),
                        size_bytes=size_bytes,
                        source=source,
                    )
                    first, last = ends[start + place : start + place + 2].tolist()
                    if first < last:
                        _cut(document, self.cuts[first:last])
                    yield document
                start += len(rows)


def _cut(document: LeftDocument, cuts: Cuts) -> None:
    """Take the paragraphs that go out of a document."""
    record = json.loads(document.line)
    text, pieces, end = record["text"], list[str](), 0
    for cut in cuts:
        pieces.append(text[end : cut["start"]])
        end = int(cut["end"])
    record["text"] = "".join([*pieces, text[end:]])
    document.line = ENCODER.encode(record).encode() + b"\n"
    document.size_bytes = len(record["text"].encode())
