"""A small real corpus, a tokenizer learned from it, and a way to run one stage in a test."""

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import settings

from llm.artifact import ArtifactWriter, Json
from llm.config import RuntimeConfig
from llm.data.documents import (
    Content,
    DocumentShard,
    DocumentsWriter,
    Message,
    write_documents_json,
)
from llm.runtime.job import Job, StageFunction, finish
from llm.tokenizer.base import TOKENIZER_JSON
from llm.tokenizer.bpe import ByteLevelBPE

settings.register_profile("project", deadline=None)  # no test of timing: machines are shared
settings.load_profile("project")
RunStage = Callable[..., tuple[Path, Mapping[str, Json]]]
MakeDocuments = Callable[..., Path]


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """A module of the standard library, 100 KB of Python and English, in pieces."""
    text = Path(argparse.__file__).read_text(encoding="utf-8")
    return [piece + "\n" for piece in text.split("\n\n\n")]


@pytest.fixture(scope="session")
def tokenizer(corpus: list[str]) -> ByteLevelBPE:
    """Learned from `corpus`, 600 tokens."""
    return ByteLevelBPE.train(corpus, 600)


@pytest.fixture
def tokenizer_folder(tokenizer: ByteLevelBPE, tmp_path: Path) -> Path:
    """A folder with `tokenizer` in it."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / TOKENIZER_JSON).write_bytes(tokenizer.to_files()[TOKENIZER_JSON])
    return folder


@pytest.fixture
def make_documents(tmp_path: Path) -> MakeDocuments:
    """Return a function that writes documents as `clean` does and returns their folder."""

    def make(
        train: Sequence[str | Sequence[Message]], validation: Sequence[str | Sequence[Message]]
    ) -> Path:
        is_text = isinstance([*train, *validation, ""][0], str)
        key = "text" if is_text else "messages"
        lines = {
            split: [
                json.dumps({"id": document_id(document), key: document}, ensure_ascii=False)
                for document in documents
            ]
            for split, documents in (("train", train), ("validation", validation))
        }
        return write_lines(tmp_path / "documents", lines, "text" if is_text else "chats")

    return make


@pytest.fixture
def run_stage(tmp_path: Path) -> RunStage:
    """Return a function that runs one stage in this process; it returns its folder and summary."""

    def run(
        stage: StageFunction,
        settings: Mapping[str, Json],
        seed: int = 1,
        out: str = "out",
        **inputs: Path,
    ) -> tuple[Path, Mapping[str, Json]]:
        folders = {name: str(folder) for name, folder in inputs.items()}
        job = Job(stage=stage.__name__, settings=settings, seed=seed, inputs=folders)
        job.runtime = RuntimeConfig(shard_workers=1)  # shards in this process
        job.out, job.work = tmp_path / out, tmp_path / f"{out}.work"
        job.work.mkdir(exist_ok=True)
        writer = ArtifactWriter(job.out)
        summary = stage(job, writer)
        finish(job, writer, summary)
        return job.out, summary

    return run


def write_lines(
    folder: Path,
    lines: Mapping[str, Sequence[str]],
    content: Content = "text",
    num_sources: int = 1,
) -> Path:
    """Write the lines of each side as `clean` does documents, in turn from each of the sources, and
    return the folder.
    """
    writer = ArtifactWriter(folder)
    shards: dict[str, list[DocumentShard]] = {}
    for split, found in lines.items():
        with DocumentsWriter(writer, f"{split}/00000", has_sources=num_sources > 1) as file:
            for n, line in enumerate(found):
                file.add(line.encode(errors="surrogateescape") + b"\n", n % num_sources)
        shards[split] = [DocumentShard(name="00000", documents=len(found), bytes=file.num_bytes)]
    write_documents_json(writer, content, shards, num_sources)
    return folder


def document_id(document: str | Sequence[Message]) -> str:
    """The id that `make_documents` gives a document."""
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()[:32]
