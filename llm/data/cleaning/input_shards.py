"""Cut the raw files that `clean` reads into shards, and read one of them.

A plain `.jsonl` file is cut at line ends near equal distances, without reading what is between.
Any other file must be read from its beginning: it lies in one shard, small ones together. What a
shard is depends on the files and `clean.shard_bytes` alone.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from llm.artifact import Json
from llm.config import CleanConfig
from llm.data.content import Content
from llm.data.raw.formats import Format, format_of
from llm.data.raw.parsing import RawDocument, read_documents
from llm.data.raw.records import Skip, Span
from llm.errors import DataError

BLOCK_BYTES = 1 << 20


@dataclass(kw_only=True, slots=True)
class RawShard:
    """Files of raw input that are read together, or a span of one."""

    files: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])
    """Number of the source and path in its folder of files."""
    size_bytes: int = 0
    start_bytes: int = 0
    """Of the one file, where only a span of it is meant; else 0."""
    end_bytes: int = 0

    @property
    def goes_on(self) -> bool:
        """Whether it begins in the middle of a file, of which the shard before is a part too."""
        return self.start_bytes > 0

    def to_json(self) -> dict[str, Json]:
        """Return what `from_json` takes."""
        files: list[Json] = [[source, name] for source, name in self.files]
        numbers = (self.size_bytes, self.start_bytes, self.end_bytes)
        return {"files": files, "size_bytes": numbers[0], "span": list(numbers[1:])}

    @classmethod
    def from_json(cls, found: Mapping[str, Json]) -> "RawShard":
        """Return the shard that `to_json` described."""
        files = [(int(source), str(name)) for source, name in cast(list[list[str]], found["files"])]
        start_bytes, end_bytes = cast(list[int], found["span"])
        size_bytes = cast(int, found["size_bytes"])
        return cls(files=files, size_bytes=size_bytes, start_bytes=start_bytes, end_bytes=end_bytes)


@dataclass(frozen=True, slots=True)
class RawInput:
    """The folders that `download` left, one for each source."""

    folders: Sequence[Path]

    @classmethod
    def of(cls, inputs: Mapping[str, str]) -> "RawInput":
        """Take the inputs of the job that are raw: `raw`, or `raw_0`, `raw_1` and so on."""
        by_number = sorted(inputs.items(), key=lambda item: (len(item[0]), item[0]))
        return cls([Path(folder) for name, folder in by_number if name.startswith("raw")])

    @property
    def content(self) -> Content:
        """What the documents are; the same in all sources."""
        return cast(Content, self._source(0)["content"])

    def plan(self, shard_bytes: int) -> list[RawShard]:
        """Cut all into shards of about `shard_bytes`, in the order documents are read."""
        shards: list[RawShard] = []
        for source, path in self._files():
            name = path.relative_to(self.folders[source] / "files").as_posix()
            size_bytes = path.stat().st_size
            num_spans = round(size_bytes / shard_bytes)
            if format_of(name) == Format(suffix=".jsonl") and num_spans > 1:
                for start_bytes, end_bytes in _spans(path, size_bytes, num_spans):
                    shards.append(
                        RawShard(files=[(source, name)], size_bytes=end_bytes - start_bytes,
                                 start_bytes=start_bytes, end_bytes=end_bytes)
                    )  # fmt: skip
                continue
            last = shards[-1] if shards else None
            if last is None or last.end_bytes or last.size_bytes + size_bytes > shard_bytes:
                shards.append(last := RawShard())
            last.files.append((source, name))
            last.size_bytes += size_bytes
        return shards

    def read(
        self, shard: RawShard, settings: CleanConfig, scratch: Path
    ) -> Iterator[tuple[RawDocument | Skip, int]]:
        """Yield what a shard holds, and how many of its bytes were read by then. Lines of a span
        are counted from 1 at its beginning.
        """
        done_bytes, span = 0, None
        if shard.end_bytes:
            span = Span(start_bytes=shard.start_bytes, end_bytes=shard.end_bytes)
        for source, name in shard.files:
            for document in self._documents(source, name, settings, scratch, span):
                if isinstance(document, RawDocument):
                    document.source = source
                yield document, done_bytes + document.place.read_bytes - shard.start_bytes
            done_bytes += self._path(source, name).stat().st_size

    def _documents(
        self, source: int, name: str, settings: CleanConfig, scratch: Path, span: Span | None
    ) -> Iterator[RawDocument | Skip]:
        path, content = self._path(source, name), self.content
        text_key = self.text_key(source)

        def read(span: Span | None) -> Iterator[RawDocument | Skip]:
            return read_documents(
                path,
                f"{source}/{name}" if len(self.folders) > 1 else name,
                content=content,
                text_key=text_key,
                policy=settings.decode_errors,
                text_document_bytes=settings.text_document_bytes,
                limits=settings.reading,
                scratch=scratch,
                setting=self.setting(source),
                span=span,
            )

        try:
            yield from read(span)
        except DataError:
            if span is not None:  # the message names a line: now it is worth counting those before
                for _ in read(replace(span, line=1 + _count_lines(path, span.start_bytes))):
                    pass
            raise

    def setting(self, number: int = 0) -> str:
        """Return what the settings of a source begin with."""
        role = "corpus" if self.content == "text" else "chats"
        return f"download.{role}" + (f".sources.{number}" if len(self.folders) > 1 else "")

    def text_key(self, number: int = 0) -> str:
        """Return the key under which the records of a source hold their text."""
        return cast(str, self._source(number)["text_key"])

    def _path(self, source: int, name: str) -> Path:
        return self.folders[source] / "files" / name

    def _source(self, number: int) -> dict[str, Json]:
        return json.loads((self.folders[number] / "source.json").read_bytes())

    def _files(self) -> Iterator[tuple[int, Path]]:
        for number, folder in enumerate(self.folders):
            for path in sorted((folder / "files").rglob("*")):
                if path.is_file():
                    yield number, path


def _spans(path: Path, size_bytes: int, num_spans: int) -> Iterator[tuple[int, int]]:
    """Yield where spans begin and end, each end behind the first line end from a multiple of their
    length on. One that a long line reaches over is left out.
    """
    start_bytes = 0
    with path.open("rb", buffering=0) as file:
        for number in range(1, num_spans + 1):
            target = size_bytes * number // num_spans
            if target <= start_bytes:
                continue
            end_bytes = file.seek(target - 1)
            while block := file.read(BLOCK_BYTES):
                if found := block.find(b"\n") + 1:
                    end_bytes += found
                    break
                end_bytes += len(block)
            yield start_bytes, end_bytes
            start_bytes = end_bytes


def _count_lines(path: Path, end_bytes: int) -> int:
    num_lines = 0
    with path.open("rb", buffering=0) as file:
        while end_bytes > 0 and (block := file.read(min(BLOCK_BYTES, end_bytes))):
            num_lines += block.count(b"\n")
            end_bytes -= len(block)
    return num_lines
