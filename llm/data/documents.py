"""Cleaned documents on disk: written once by `clean`, read in any order, not held in memory.

documents.json               text, chats or preferences, and the shards of each split in their order
train/00000.jsonl            one document per line; a shard without documents has no file
train/00000.offsets.bin      the byte offset of each line, and the file's length
train/00000.sources.bin      with several sources, the number of each document's source
validation/00000.jsonl ...
"""

import json
import re
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import numpy.typing as npt

from llm.artifact import ArtifactWriter
from llm.data.closing import Closing
from llm.data.content import Content, Message
from llm.data.open_files import OpenFiles
from llm.errors import ArtifactError

SPLITS = ("train", "validation")
SUFFIXES = LINES, OFFSETS, SOURCES = ".jsonl", ".offsets.bin", ".sources.bin"
SHARD_NAME = re.compile(r"\d{5,9}")
OFFSET, SOURCE = struct.Struct("<Q"), struct.Struct("<I")


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A text, the messages of a chat, or a preference pair."""

    id: bytes
    """16 bytes."""
    text: str = ""
    messages: tuple[Message, ...] = ()
    """Of a preference pair: of its prompt."""
    chosen: str = ""
    """Of a preference pair: the answer to prefer."""
    rejected: str = ""
    kind: str = ""
    """Of a chat or a pair, such as a task's name, if its source has one; and groups metrics."""
    size_bytes: int
    """Length of its line in the file."""

    @property
    def texts(self) -> list[str]:
        """The text; that of each message; of a pair, of its answers too."""
        if not self.messages:
            return [self.text]
        answers = [self.chosen, self.rejected] if self.chosen else []
        return [message["content"] for message in self.messages] + answers


class DocumentsWriter(Closing):
    """Write documents to `<name>.jsonl` of an artifact, with their offsets and sources.

    Offsets are little endian in 8 bytes, sources in 4.
    """

    def __init__(self, writer: ArtifactWriter, name: str, *, has_sources: bool) -> None:
        """Open the files."""
        self.num_bytes = 0
        super().__init__()
        self._lines, self._offsets = (
            self._stack.enter_context(writer.open(name + suffix)) for suffix in (LINES, OFFSETS)
        )
        self._sources = (
            self._stack.enter_context(writer.open(name + SOURCES)) if has_sources else None
        )
        self._offsets.write(OFFSET.pack(0))

    def add(self, line: bytes, source: int) -> None:
        """Append a document, as its line with the line end."""
        self._lines.write(line)
        self.num_bytes += len(line)
        self._offsets.write(OFFSET.pack(self.num_bytes))
        if self._sources is not None:
            self._sources.write(SOURCE.pack(source))


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentShard:
    """The entry of a shard in `documents.json`."""

    name: str
    documents: int
    bytes: int


def write_documents_json(
    writer: ArtifactWriter,
    content: Content,
    shards: Mapping[str, Sequence[DocumentShard]],
    num_sources: int = 1,
) -> None:
    """Write the content of the documents and the shards of each split, in their order."""
    several = {"num_sources": num_sources} if num_sources > 1 else {}
    writer.write_json("documents.json", {"content": content, **several, **shards})


class DocumentReader:
    """The documents of one split, in all its files."""

    def __init__(self, folder: Path, split: str) -> None:
        """Find the files.

        Raises:
            ArtifactError: a file is missing or of another size than expected.
        """
        self.path = folder / split
        found = _read_documents_json(folder)
        self._content: Content = found["content"]
        self._has_sources = "num_sources" in found
        self._shards: list[DocumentShard] = [DocumentShard(**one) for one in found[split]]
        self._starts = list(accumulate((one.documents for one in self._shards), initial=0))
        self._paths = [
            (self.path / (shard.name + LINES), self.path / (shard.name + OFFSETS))
            for shard in self._shards
        ]
        for shard, (lines, offsets) in zip(self._shards, self._paths, strict=True):
            _refuse_other_size(lines, shard.bytes)
            _refuse_other_size(offsets, OFFSET.size * (shard.documents + 1))

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def size_bytes(self) -> int:
        """Total size of the files of lines."""
        return sum(shard.bytes for shard in self._shards)

    def source_numbers(self) -> npt.NDArray[np.int64]:
        """Return the number of each document's source, (num_documents,).

        Raises:
            ArtifactError: the artifact has no source numbers.
        """
        if not self._has_sources:
            raise ArtifactError(
                f"{self.path}: without the source of each document; run clean again"
            )
        numbers = np.zeros(len(self), dtype=np.int64)
        for shard, start in zip(self._shards, self._starts[:-1], strict=True):
            path = self.path / (shard.name + SOURCES)
            _refuse_other_size(path, SOURCE.size * shard.documents)
            numbers[start : start + shard.documents] = np.fromfile(path, dtype="<u4")
        return numbers

    def read(self, ordinals: Iterable[int]) -> Iterator[Document]:
        """Yield the documents with these ordinals, counted from 0 over all files.

        Raises:
            ArtifactError: a line is not a document; the message names file and line.
        """
        with OpenFiles() as files:
            for ordinal in ordinals:
                shard = bisect_right(self._starts, ordinal) - 1
                lines, offsets = self._paths[shard]
                number = int(ordinal) - self._starts[shard]
                ends = files.read(offsets, number * OFFSET.size, 2 * OFFSET.size)
                (start,), (end,) = OFFSET.iter_unpack(ends)
                if not start <= end <= self._shards[shard].bytes:
                    raise ArtifactError(
                        f"{offsets}: line {number + 1} begins at {start} and ends at {end} of"
                        f" {self._shards[shard].bytes} bytes; run clean again"
                    )
                line = files.read(lines, start, end - start)
                try:
                    yield _parse(line, self._content)
                except (ValueError, TypeError, KeyError, RecursionError) as error:
                    raise ArtifactError(
                        f"{lines}:{number + 1}: not a document of {self._content}"
                        f" ({type(error).__name__}: {error}); run clean again"
                    ) from error


def read_content(folder: Path) -> Content:
    """Return whether the documents in `folder` are `text`, `chats` or `preferences`.

    Raises:
        ArtifactError: `documents.json` is missing or damaged.
    """
    return _read_documents_json(folder)["content"]


def _read_documents_json(folder: Path) -> dict[str, Any]:
    path = folder / "documents.json"
    try:
        found = cast(dict[str, Any], json.loads(path.read_bytes()))
        content = found["content"]
        for split in SPLITS:
            for shard in (DocumentShard(**shard) for shard in found[split]):
                counts = (shard.documents, shard.bytes)
                if not SHARD_NAME.fullmatch(shard.name) or any(
                    type(count) is not int or count < 0 for count in counts
                ):
                    raise ValueError(str(shard))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: not there; run clean again") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ArtifactError(f"{path}: damaged ({error!r}); run clean again") from error
    if content not in get_args(Content):
        raise ArtifactError(
            f"{path}: content is {content!r}, expected one of {', '.join(get_args(Content))}"
        )
    return found


def _refuse_other_size(path: Path, expected_bytes: int) -> None:
    try:
        found_bytes = path.stat().st_size
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: not there; run clean again") from error
    if found_bytes != expected_bytes:
        raise ArtifactError(
            f"{path}: {found_bytes} bytes, expected {expected_bytes}; run clean again"
        )


def _parse(line: bytes, content: Content) -> Document:
    record = cast(dict[str, Any], json.loads(line))
    identifier = bytes.fromhex(record["id"])
    if len(identifier) != 16:
        raise ValueError(f"an id of {len(identifier)} bytes, expected 16")
    if content == "text":
        return Document(id=identifier, text=_string(record["text"]), size_bytes=len(line))
    messages = tuple(
        Message(role=_string(message["role"]), content=_string(message["content"]))
        for message in record["messages"]
    )
    if not messages:
        raise ValueError("without messages")
    chosen = rejected = ""
    if content == "preferences":
        chosen, rejected = _string(record["chosen"]), _string(record["rejected"])
    return Document(
        id=identifier,
        messages=messages,
        chosen=chosen,
        rejected=rejected,
        kind=_string(record.get("kind", "")),
        size_bytes=len(line),
    )


def _string(value: Any) -> str:
    """Return `value` if it is text that UTF-8 can encode; a lone surrogate is a ValueError."""
    if not isinstance(value, str):
        raise TypeError(f"found {value!r}, expected text")
    value.encode()
    return value
