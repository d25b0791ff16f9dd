"""Drop staged documents, or cut out their paragraphs, that are nearly those that are kept.

The order that decides what is kept: validation before training, then by the hash of the content,
then by place in the document. It is the same wherever a document came from.
"""

import hashlib
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llm.artifact import ArtifactWriter
from llm.config import CleanConfig, NearDuplicatesConfig
from llm.data.cleaning.decisions import CUT, FATES, Cuts, Decisions, LeftDocument
from llm.data.cleaning.exact_duplicates import find_repeated
from llm.data.cleaning.minhash import NearDuplicates, Signer
from llm.data.cleaning.staging import Staged
from llm.data.closing import Closing
from llm.data.content import Content
from llm.data.open_files import OpenFiles

BLANK_LINES = re.compile(r"\n[ \t\r]*\n[ \t\r\n]*")
UNITS = "units.bin"
"""What is compared, each as a CUT of the document it is from."""
PACKED_UNIT = struct.Struct("<qII")
REST = np.dtype([("document", "<i8"), ("content", ">u8", 2), ("is_too_short", "?")])
"""What is left of a document that was cut."""

Report = Callable[[int, int, str], None]


def compares(settings: CleanConfig, content: Content) -> bool:
    """Tell whether near duplicates are looked for; chats are compared whole or not at all."""
    unit = settings.near_duplicates.unit
    return unit == "document" or (unit == "paragraph" and content == "text")


class UnitWriter(Closing):
    """Write what is to be compared of a shard's documents, signed."""

    def __init__(self, writer: ArtifactWriter, config: NearDuplicatesConfig) -> None:
        """Open the files.

        Raises:
            ConfigError: the library is missing.
        """
        self._is_whole = config.unit == "document"
        super().__init__()
        self._signer = self._stack.enter_context(Signer(writer, config))
        self._units = self._stack.enter_context(writer.open(UNITS))

    def add(self, number: int, text: str) -> None:
        """Take the text of the document of this number in the shard."""
        for start, end in [(0, len(text))] if self._is_whole else _paragraphs(text):
            if self._signer.add(text[start:end]):
                self._units.write(PACKED_UNIT.pack(number, start, end))


def find_near_duplicates(
    staged: Staged, decisions: Decisions, config: NearDuplicatesConfig, report: Report
) -> Cuts:
    """Return what goes of the documents that are left, by document and start."""
    units = _units(staged)
    ranks = _ranks(staged)
    order = np.flatnonzero(decisions.fates[units["document"]] == 0)
    order = order[np.argsort(ranks[units["document"][order]], kind="stable")]
    del ranks
    goes = np.zeros(len(units), dtype=np.bool_)
    with OpenFiles() as files, NearDuplicates(_folders(staged), config) as near:

        def read_text(number: int) -> str:
            document, start, end = units[number].tolist()
            return staged.text(document, files)[start:end]

        for band, first in enumerate(near.find(order, read_text), start=1):
            report(band, near.num_bands, "bands")
            goes[order] = first != np.arange(len(first))
    return units[goes]


def judge_rests(
    staged: Staged, decisions: Decisions, found: Sequence[npt.NDArray[np.void]], scratch: Path
) -> None:
    """Decide on the documents that were cut, given the RESTs of each shard: those of which next to
    nothing is left go, and those of which the same is left as there is elsewhere.
    """
    rests = np.concatenate([np.zeros(0, dtype=REST), *found])
    is_too_short = rests["is_too_short"]
    decisions.fates[rests["document"][is_too_short]] = FATES.index("near duplicate")
    rests = rests[~is_too_short]
    rests = rests[np.argsort(_ranks(staged)[rests["document"]])]

    def contents() -> Iterator[npt.NDArray[np.uint64]]:
        yield from staged.columns("content")
        yield rests["content"].astype(np.uint64)

    is_repeated = find_repeated(contents(), len(staged) + len(rests), scratch)[len(staged) :]
    decisions.fates[rests["document"][is_repeated]] = FATES.index("duplicate when cut")


def rest_of(document: LeftDocument, min_bytes: int) -> bytes:
    """Return what is to be known of what is left of a document, as a REST."""
    text = document.text
    rest = np.zeros(1, dtype=REST)
    rest["document"] = document.number
    rest["content"] = np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], dtype=">u8")
    rest["is_too_short"] = not text.strip() or document.size_bytes < min_bytes
    return rest.tobytes()


def _folders(staged: Staged) -> Sequence[Path]:
    return [shard.folder for shard in staged.shards]


def _units(staged: Staged) -> Cuts:
    """Return what is compared, of all documents."""
    parts = [np.zeros(0, dtype=CUT)]
    for folder, start in zip(_folders(staged), staged.starts, strict=False):
        units = np.fromfile(folder / UNITS, dtype=CUT)
        units["document"] += start
        parts.append(units)
    return np.concatenate(parts)


def _ranks(staged: Staged) -> npt.NDArray[np.int64]:
    """Return the place of each document in the order of what is kept, (documents,)."""
    ids, is_validation = staged.column("id"), staged.column("is_validation")
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
