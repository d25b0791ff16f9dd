"""Bring a source here as it is: the standard library, local files, a URL or a hub dataset."""

import hashlib
import heapq
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path

from llm.artifact import ArtifactWriter, Json
from llm.config import SourceConfig, read_section
from llm.data.fetch import fetch, file_name
from llm.data.formats import content_of, refuse_name
from llm.data.hub import hub_records
from llm.data.sources import files_fingerprint, fingerprint, local_files
from llm.data.stdlib import corpus_documents
from llm.data.stdlib_chats import chat_records
from llm.errors import DataError
from llm.job import Job, run_job

COPY_BLOCK_BYTES = 1 << 20


def download(job: Job, writer: ArtifactWriter) -> dict[str, Json]:
    """Write the source of `job.role` to `files/`, and what it is to `source.json`.

    Raises:
        DataError: the source is missing, is not what it was said to be, or changed under the copy.
        ConnectionError: the network failed; another try may succeed.
    """
    source = read_section(SourceConfig, job.settings)
    makers: dict[str, Callable[[Job, SourceConfig, ArtifactWriter], dict[str, Json]]] = {
        "stdlib": _write_stdlib,
        "files": _copy_files,
        "url": _fetch_url,
        "hub": _write_hub,
    }
    summary = makers[source.kind](job, source, writer)
    content = content_of(job.role)
    writer.write_json(
        "source.json", {"kind": source.kind, "content": content, "text_key": source.text_key}
    )
    return {"kind": source.kind, "content": content, **summary}


def _write_stdlib(job: Job, source: SourceConfig, writer: ArtifactWriter) -> dict[str, Json]:
    records: Iterator[Mapping[str, Json]] = (
        chat_records()
        if content_of(job.role) == "chats"
        else ({"text": text} for text in corpus_documents())
    )
    lines = _limited(map(_json_line, records), source.max_documents)
    summary = _write_records(job, lines, "files/stdlib.jsonl", writer)
    _refuse_change(job, fingerprint(source, job.role, None), "the standard library")
    return summary


def _write_hub(job: Job, source: SourceConfig, writer: ArtifactWriter) -> dict[str, Json]:
    records = islice(hub_records(source, job.role), source.max_documents or None)
    return _write_records(job, map(_json_line, records), "files/hub.jsonl", writer)


def _fetch_url(job: Job, source: SourceConfig, writer: ArtifactWriter) -> dict[str, Json]:
    """Fetch into the work folder, where a partial file outlives kills, then copy what is whole."""
    name, setting = file_name(source.url), f"download.{job.role}.url"
    refuse_name(name, job.role, "url")
    partial = job.work / f"{source.sha256[:16]}.partial"
    for done_bytes, total_bytes in fetch(source.url, source.sha256, partial, setting):
        job.report_progress(done_bytes, max(done_bytes, total_bytes) if total_bytes else 0, "bytes")
    num_bytes, sha256 = _copy_file(job, partial, f"files/{name}", writer)
    if sha256 != source.sha256:
        raise DataError(
            f"{setting}: the fetched bytes changed while they were copied; run it again"
        )
    return {"num_bytes": num_bytes}


def _limited(lines: Iterator[bytes], max_documents: int) -> Iterator[bytes]:
    """Yield `max_documents` lines drawn by their hash, in order: every kind is among them."""
    if max_documents == 0:
        return lines
    drawn = heapq.nsmallest(
        max_documents, enumerate(lines), key=lambda item: hashlib.sha256(item[1]).digest()
    )
    return (line for _, line in sorted(drawn))


def _json_line(record: Mapping[str, Json]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _copy_files(job: Job, source: SourceConfig, writer: ArtifactWriter) -> dict[str, Json]:
    found = local_files(source, job.role)
    total_bytes = sum(path.stat().st_size for _, path in found.files)
    if total_bytes == 0:
        raise DataError(
            f"download.{job.role}.path: {source.path} holds {len(found.files)} files"
            " and not one byte"
        )
    hashes: list[tuple[str, str]] = []
    num_bytes = 0
    for name, path in found.files:
        copied_bytes, sha256 = _copy_file(job, path, f"files/{name}", writer)
        num_bytes += copied_bytes
        hashes.append((name, sha256))
        job.report_progress(num_bytes, max(total_bytes, num_bytes), "bytes")
    _refuse_change(job, files_fingerprint(source, job.role, hashes), source.path)
    return {
        "num_files": len(hashes),
        "num_ignored_files": found.num_ignored,
        "num_bytes": num_bytes,
    }


def _copy_file(job: Job, path: Path, name: str, writer: ArtifactWriter) -> tuple[int, str]:
    """Copy one file byte for byte; return how many bytes, and the sha256 of what was copied."""
    num_bytes, sha256 = 0, hashlib.sha256()
    with path.open("rb") as original, writer.open(name) as file:
        while block := original.read(COPY_BLOCK_BYTES):
            sha256.update(block)
            num_bytes += file.write(block)
            job.raise_if_stopping()
    return num_bytes, sha256.hexdigest()


def _write_records(
    job: Job, lines: Iterator[bytes], name: str, writer: ArtifactWriter
) -> dict[str, Json]:
    num_documents = num_bytes = 0
    with writer.open(name) as file:
        for line in lines:
            num_bytes += file.write(line)
            num_documents += 1
            job.report_progress(num_documents, 0, "documents")
    return {"num_documents": num_documents, "num_bytes": num_bytes}


def _refuse_change(job: Job, copied: str, what: str) -> None:
    """Raise when the source is no longer what the cache key was computed from."""
    planned = job.input_digests.get("source", copied)
    if copied != planned:
        raise DataError(
            f"download.{job.role}: {what} changed after the run began; start it again when nothing"
            " writes there any more"
        )


if __name__ == "__main__":
    run_job(download)
