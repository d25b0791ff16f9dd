"""Drop staged documents, or cut out their paragraphs, that are nearly those that are kept.

The order that decides what is kept: validation before training, then by the hash of the content,
then by place in the document. It is the same wherever a document came from.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llm.artifact import Json
from llm.config import CleanConfig
from llm.data.near_duplicates import NearDuplicates
from llm.data.staging import ENCODER, StagedDocument, Staging

BLANK_LINES = re.compile(r"\n[ \t\r]*\n[ \t\r\n]*")
UNIT = np.dtype([("document", "<u8"), ("start", "<u4"), ("end", "<u4")])
"""What is compared: characters `start` to `end` of the text of a document."""
REASONS = ("", "near duplicate", "duplicate when cut")

Report = Callable[[int, int, str], None]
IsNew = Callable[[bytes], bool]


class Deduplication:
    """Add each document as it is staged, resolve, then ask what is left."""

    def __init__(self, folder: Path, settings: CleanConfig) -> None:
        """Keep signatures in `folder`, which must be there.

        Raises:
            ConfigError: the library is missing.
        """
        self._settings = settings
        self._near = NearDuplicates(folder, settings.near_duplicates)
        self._units = (folder / "units.bin").open("w+b")
        self._num_documents = 0
        self._cuts = np.zeros(0, dtype=UNIT)  # by document and start
        self._fates = np.zeros(0, dtype=np.uint8)  # (documents,): which of REASONS

    def add(self, text: str) -> None:
        """Take the text of the next document."""
        is_whole = self._settings.near_duplicates.unit == "document"
        for start, end in [(0, len(text))] if is_whole else _paragraphs(text):
            if self._near.add(text[start:end]):
                unit = np.array((self._num_documents, start, end), dtype=UNIT)
                self._units.write(unit.tobytes())
        self._num_documents += 1

    def resolve(self, staging: Staging, is_new: IsNew, report: Report) -> None:
        """Decide what goes. `is_new` tells of the hash of a rest whether it comes for the first
        time.
        """
        ranks = _ranks(staging)
        self._units.seek(0)
        units = np.frombuffer(self._units.read(), dtype=UNIT)
        order = np.argsort(ranks[units["document"]], kind="stable")

        def read_text(number: int) -> str:
            document, start, end = units[number].tolist()
            return staging.read(document).text[start:end]

        goes = np.zeros(len(units), dtype=np.bool_)
        for band, first in enumerate(self._near.find(order, read_text), start=1):
            report(band, self._near.num_bands, "bands")
            goes[order] = first != np.arange(len(first))
        self._near.close()
        self._units.close()
        self._cuts = units[goes]
        self._fates = np.zeros(self._num_documents, dtype=np.uint8)
        changed = np.unique(self._cuts["document"])
        for number in changed[np.argsort(ranks[changed])].tolist():
            rest = self._rest(number, staging.read(number))
            if not rest.text.strip() or rest.size_bytes < self._settings.min_document_bytes:
                self._fates[number] = 1
            elif not is_new(hashlib.sha256(rest.text.encode()).digest()):
                self._fates[number] = 2

    def left(self, staging: Staging) -> Iterator[tuple[StagedDocument, str]]:
        """Yield what is left of each document, and the reason where it is nothing."""
        for number, document in enumerate(staging):
            fate = int(self._fates[number])
            yield (document if fate else self._rest(number, document)), REASONS[fate]

    def summary(self) -> dict[str, Json]:
        """Return how many paragraphs were cut out, where that is what is done."""
        if self._settings.near_duplicates.unit == "document":
            return {}
        return {"removed_paragraphs": len(self._cuts)}

    def _rest(self, number: int, document: StagedDocument) -> StagedDocument:
        """Return the document without what goes of it."""
        first, last = np.searchsorted(self._cuts["document"], [number, number + 1])
        if first == last:
            return document
        pieces, end = list[str](), 0
        for cut in self._cuts[first:last]:
            pieces.append(document.text[end : cut["start"]])
            end = int(cut["end"])
        text = "".join([*pieces, document.text[end:]])
        record = {**json.loads(document.line), "text": text}
        line = ENCODER.encode(record).encode() + b"\n"
        return replace(document, line=line, text=text, size_bytes=len(text.encode()))


def _ranks(staging: Staging) -> npt.NDArray[np.int64]:
    """Return the place of each document in the order of what is kept, (documents,)."""
    ids, is_validation = staging.column("id"), staging.column("is_validation")
    ranks = np.empty(len(ids), dtype=np.int64)
    ranks[np.lexsort((ids[:, 1], ids[:, 0], ~is_validation))] = np.arange(len(ids))
    return ranks


def _paragraphs(text: str) -> Iterator[tuple[int, int]]:
    """Yield where each paragraph starts and ends, with the blank lines behind it."""
    start = 0
    for blank in BLANK_LINES.finditer(text):
        yield start, blank.end()
        start = blank.end()
    yield start, len(text)
