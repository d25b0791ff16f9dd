"""What tests of cleaning share: raw files in, documents and their summary out."""

import json
from collections.abc import Mapping
from pathlib import Path

from llm.artifact import ArtifactWriter, Json, load_artifact
from llm.clean import clean
from llm.job import Job, finish

TEXTS = [f"Document {number} has words of its own." for number in range(200)]


def run_clean(
    folder: Path, files: Mapping[str, bytes], content: str = "text", **chosen: Json
) -> tuple[dict[str, Json], dict[str, list[dict[str, Json]]], str]:
    """Clean raw `files`; return the summary, the lines of each output, and the digest."""
    raw = folder / "raw"
    (raw / "files").mkdir(parents=True, exist_ok=True)
    (raw / "source.json").write_text(
        json.dumps({"kind": "files", "content": content, "text_key": "text"})
    )
    for name, data in files.items():
        (raw / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / "files" / name).write_bytes(data)
    (folder / "work").mkdir(exist_ok=True)
    job = Job(
        stage="clean", settings=chosen, inputs={"raw": str(raw)}, out=folder / "out",
        work=folder / "work",
    )  # fmt: skip
    writer = ArtifactWriter(job.out)
    summary = clean(job, writer)
    finish(job, writer, summary)
    names = ("train", "validation", "rejected")
    outputs = {
        name: [json.loads(line) for line in (job.out / f"{name}.jsonl").read_bytes().splitlines()]
        for name in names
    }
    assert json.loads((job.out / "documents.json").read_bytes()) == {"content": content}
    assert summary["read_documents"] == (
        len(outputs["train"]) + len(outputs["validation"]) + sum(summary["skipped"].values())  # type: ignore[union-attr]
    )
    assert not list((folder / "work").glob("s*")), "what was needed on the way is removed"
    return summary, outputs, load_artifact(job.out).digest


def jsonl(records: list[Json]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def corpus(texts: list[str]) -> bytes:
    return jsonl([{"text": text} for text in texts])


def texts_of(documents: list[dict[str, Json]]) -> set[str]:
    return {str(document["text"]) for document in documents}
