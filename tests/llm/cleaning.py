"""Helpers for tests of cleaning: raw files in, documents and their summary out."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from llm.artifact import ArtifactWriter, Json, load_artifact
from llm.clean import clean
from llm.config import RuntimeConfig
from llm.data.documents import SPLITS
from llm.runtime.job import Job, finish

TEXTS = [f"Document {number} has words of its own." for number in range(200)]


def make_job(
    folder: Path,
    files: Mapping[str, bytes],
    content: str = "text",
    num_workers: int = 1,
    record_format: str = "auto",
    **chosen: Json,
) -> Job:
    """Write raw `files` and return the job that cleans them; one worker is this process."""
    raw = folder / "raw"
    shutil.rmtree(raw, ignore_errors=True)
    (raw / "files").mkdir(parents=True)
    source = {"kind": "files", "content": content, "text_key": "text", "format": record_format}
    (raw / "source.json").write_text(json.dumps(source))
    for name, data in files.items():
        (raw / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / "files" / name).write_bytes(data)
    (folder / "work").mkdir(exist_ok=True)
    return Job(
        stage="clean", role="corpus" if content == "text" else content, settings=chosen,
        inputs={"raw": str(raw)}, out=folder / "out", work=folder / "work",
        runtime=RuntimeConfig(shard_workers=num_workers),
    )  # fmt: skip


def run_clean(
    folder: Path,
    files: Mapping[str, bytes],
    content: str = "text",
    num_workers: int = 1,
    record_format: str = "auto",
    **chosen: Json,
) -> tuple[dict[str, Json], dict[str, list[dict[str, Json]]], str]:
    """Clean raw `files`; return the summary, the lines of each output, and the digest."""
    shutil.rmtree(folder / "work", ignore_errors=True)  # of other settings
    job = make_job(folder, files, content, num_workers, record_format, **chosen)
    writer = ArtifactWriter(job.out)
    summary = clean(job, writer)
    finish(job, writer, summary)
    rejected = (job.out / "rejected.jsonl").read_bytes().splitlines()
    outputs = {split: lines_of(job.out, split) for split in SPLITS}
    outputs["rejected"] = list(map(json.loads, rejected))
    found = json.loads((job.out / "documents.json").read_bytes())
    assert found["content"] == content
    for split in SPLITS:
        assert sum(shard["documents"] for shard in found[split]) == len(outputs[split])
    assert summary["read_documents"] == (
        len(outputs["train"]) + len(outputs["validation"]) + sum(summary["skipped"].values())  # type: ignore[union-attr]
    )
    assert {path.name for path in (folder / "work").iterdir()} <= {"shards", "progress.json"}
    return summary, outputs, load_artifact(job.out).digest


def lines_of(folder: Path, split: str) -> list[dict[str, Json]]:
    """Return the lines of the documents on one side of the split."""
    shards = json.loads((folder / "documents.json").read_bytes())[split]
    files = [folder / split / f"{shard['name']}.jsonl" for shard in shards]
    assert files == sorted((folder / split).glob("*.jsonl")), (
        "a shard without documents has no file"
    )
    return [json.loads(line) for file in files for line in file.read_bytes().splitlines()]


def jsonl(records: list[Json]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def corpus(texts: list[str]) -> bytes:
    return jsonl([{"text": text} for text in texts])


def texts_of(documents: list[dict[str, Json]]) -> set[str]:
    return {str(document["text"]) for document in documents}
