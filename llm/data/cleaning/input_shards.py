"""The raw input of `clean`, and its division into shards.

A plain `.jsonl` file is cut at line ends near equal distances, without reading the bytes between.
Any other file is read from its start, so it lies in one shard, several small files together. The
shards depend on the files and `clean.shard_bytes` alone.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from llm.artifact import Json
from llm.config import CleanConfig
from llm.data.content import Content
from llm.data.raw.formats import Format, format_of
from llm.data.raw.records import BLOCK_BYTES, ReadOptions, Span


@dataclass(kw_only=True, slots=True)
class InputShard:
    """Raw files that are read by one process, or a span of one file."""

    files: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])
    """Index of the source, and path in its folder of files."""
    size_bytes: int = 0
    start_bytes: int = 0
    """Start of the span of the one file; else 0."""
    end_bytes: int = 0
    """End of the span; 0 for whole files."""

    @property
    def span(self) -> Span | None:
        """The span of the one file; None for whole files."""
        if not self.end_bytes:
            return None
        return Span(start_bytes=self.start_bytes, end_bytes=self.end_bytes)

    def to_json(self) -> dict[str, Json]:
        """Return what `from_json` takes."""
        files: list[Json] = [[source, name] for source, name in self.files]
        span: list[Json] = [self.start_bytes, self.end_bytes]
        return {"files": files, "size_bytes": self.size_bytes, "span": span}

    @classmethod
    def from_json(cls, found: Mapping[str, Json]) -> "InputShard":
        """Return the shard that `to_json` described."""
        files = [(int(source), str(name)) for source, name in cast(list[list[str]], found["files"])]
        start_bytes, end_bytes = cast(list[int], found["span"])
        size_bytes = cast(int, found["size_bytes"])
        return cls(files=files, size_bytes=size_bytes, start_bytes=start_bytes, end_bytes=end_bytes)


@dataclass(frozen=True, slots=True)
class RawInput:
    """The folders that `download` wrote, one per source."""

    folders: Sequence[Path]

    @classmethod
    def of(cls, inputs: Mapping[str, str]) -> "RawInput":
        """Take the raw inputs of a job: `raw`, or `raw_0`, `raw_1` and so on."""
        by_number = sorted(inputs.items(), key=lambda item: (len(item[0]), item[0]))
        return cls([Path(folder) for name, folder in by_number if name.startswith("raw")])

    @property
    def content(self) -> Content:
        """The content of all sources."""
        return cast(Content, self._source(0)["content"])

    @property
    def has_sources(self) -> bool:
        """Whether there are several sources."""
        return len(self.folders) > 1

    def plan(self, shard_bytes: int) -> list[InputShard]:
        """Divide the files into shards of about `shard_bytes`, in reading order."""
        shards: list[InputShard] = []
        for source, path in self._files():
            name = path.relative_to(self.folders[source] / "files").as_posix()
            size_bytes = path.stat().st_size
            num_spans = round(size_bytes / shard_bytes)
            if format_of(name) == Format(suffix=".jsonl") and num_spans > 1:
                for start_bytes, end_bytes in _spans(path, size_bytes, num_spans):
                    shards.append(
                        InputShard(files=[(source, name)], size_bytes=end_bytes - start_bytes,
                                   start_bytes=start_bytes, end_bytes=end_bytes)
                    )  # fmt: skip
                continue
            last = shards[-1] if shards else None
            if last is None or last.end_bytes or last.size_bytes + size_bytes > shard_bytes:
                shards.append(last := InputShard())
            last.files.append((source, name))
            last.size_bytes += size_bytes
        return shards

    def path(self, source: int, name: str) -> Path:
        """Return the path of a file."""
        return self.folders[source] / "files" / name

    def read_options(
        self, source: int, role: str, settings: CleanConfig, scratch: Path
    ) -> ReadOptions:
        """Return how the files of a source of the dataset `role` are read."""
        found = cast(dict[str, str], self._source(source))
        return ReadOptions(
            content=self.content,
            text_key=found["text_key"],
            format=found["format"],
            tool_turns=settings.tool_turns,
            setting=f"download.{role}" + (f".sources.{source}" if self.has_sources else ""),
            decode_errors=settings.decode_errors,
            text_document_bytes=settings.text_document_bytes,
            limits=settings.reading,
            scratch=scratch,
        )

    def _source(self, number: int) -> dict[str, Json]:
        return json.loads((self.folders[number] / "source.json").read_bytes())

    def _files(self) -> Iterator[tuple[int, Path]]:
        for number, folder in enumerate(self.folders):
            for path in sorted((folder / "files").rglob("*")):
                if path.is_file():
                    yield number, path


def _spans(path: Path, size_bytes: int, num_spans: int) -> Iterator[tuple[int, int]]:
    """Yield start and end of spans; each ends after the first line end from a multiple of their
    length on. A span inside one long line is left out.
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
