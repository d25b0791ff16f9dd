"""Copy a source of raw data: the standard library, local files, a URL or a hub dataset."""

import contextlib
import dataclasses
import functools
import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from llm.artifact import ArtifactWriter, Json
from llm.config import SourceConfig, read_section
from llm.data.content import Content
from llm.data.raw.first_records import FirstRecords
from llm.data.raw.formats import content_of, refuse_name
from llm.data.raw.reading import read_stream
from llm.data.raw.records import ReadOptions, Skip
from llm.data.sources.fingerprint import files_fingerprint, fingerprint, list_files
from llm.data.sources.http import fetch_file, file_name
from llm.data.sources.hub import (
    HubFile,
    authorization,
    dataset_files,
    digest_of,
    open_hub_file,
    resolve_commit,
)
from llm.data.sources.stdlib import corpus_documents
from llm.data.sources.stdlib_chats import chat_records, preference_records
from llm.errors import DataError
from llm.runtime.job import Job, run_job

COPY_BLOCK_BYTES = 1 << 20
TEXT_DOCUMENT_BYTES = 1 << 20
"""Text files of the hub are cut into records of this size if `max_documents` is set."""


def download(job: Job, writer: ArtifactWriter) -> dict[str, Json]:
    """Write the source of `job.role` to `files/`, and its kind and content to `source.json`.

    Raises:
        DataError: the source is missing, has other bytes than expected, or changed during the copy.
        ConnectionError: the network failed; another attempt may succeed.
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
        "source.json",
        {"kind": source.kind, "content": content, "text_key": source.text_key,
         "format": source.format},
    )  # fmt: skip
    return {"kind": source.kind, "content": content, **summary}


def _write_stdlib(job: Job, source: SourceConfig, writer: ArtifactWriter) -> dict[str, Json]:
    makers: dict[Content, Callable[[], Iterator[Mapping[str, Json]]]] = {
        "text": lambda: ({"text": text} for text in corpus_documents()),
        "chats": chat_records,
        "preferences": preference_records,
    }
    records = makers[content_of(job.role)]()
    lines = _limited(map(_json_line, records), source.max_documents)
    summary = _write_records(job, lines, "files/stdlib.jsonl", writer)
    _refuse_change(job, fingerprint(source, job.role, None), "the standard library")
    return summary


def _write_hub(job: Job, source: SourceConfig, writer: ArtifactWriter) -> dict[str, Json]:
    commit = resolve_commit(source, job.role)
    pinned = dataclasses.replace(source, hub_revision=commit)
    _refuse_change(job, fingerprint(pinned, job.role, None), f"{source.hub_revision} on the hub")
    files = dataset_files(source, job.role, commit)
    if source.max_documents == 0 and not source.is_hub_streamed:
        summary = _write_hub_files(job, files, writer)
    else:
        skipped: Counter[str] = Counter()
        records = _hub_records(job, source, commit, files, skipped)
        lines = islice(map(_json_line, records), source.max_documents or None)
        summary = _write_records(job, lines, "files/hub.jsonl", writer)
        summary["skipped"] = dict(sorted(skipped.items()))
    return {"commit": commit, **summary}


def _write_hub_files(job: Job, files: Sequence[HubFile], writer: ArtifactWriter) -> dict[str, Json]:
    """Fetch all files unchanged."""
    before_bytes, total_bytes = 0, sum(file.size_bytes for file in files)
    for file in files:
        partial = _fetch_hub_file(job, file, before_bytes, total_bytes)
        _copy_file(job, partial, f"files/{file.path}", writer)
        before_bytes += file.size_bytes
    return {"num_files": len(files), "num_bytes": total_bytes}


def _fetch_hub_file(job: Job, file: HubFile, before_bytes: int, total_bytes: int) -> Path:
    partial = job.work / f"{file.digest[:40]}.partial"
    fetching = fetch_file(
        file.url,
        file.digest,
        partial,
        f"download.{job.role}.hub_name",
        authorization=authorization(),
        digest_of=functools.partial(digest_of, file),
    )
    for done_bytes, _ in fetching:
        job.report_progress(before_bytes + done_bytes, total_bytes, "bytes")
    return partial


def _hub_records(
    job: Job, source: SourceConfig, commit: str, files: Sequence[HubFile], skipped: Counter[str]
) -> Iterator[dict[str, Json]]:
    """Yield the records of the files in order, and count the skipped ones by reason."""
    options = ReadOptions(
        content=content_of(job.role),
        text_key=source.text_key,
        format=source.format,
        setting=f"download.{job.role}",
        text_document_bytes=TEXT_DOCUMENT_BYTES,
        scratch=job.work,
    )
    for file in files:
        first = FirstRecords(options)
        with contextlib.ExitStack() as stack:
            if source.is_hub_streamed:
                opened = stack.enter_context(open_hub_file(source, job.role, commit, file))
            else:
                opened = stack.enter_context(_fetch_hub_file(job, file, 0, 0).open("rb"))
            for record in read_stream(opened, file.size_bytes, file.path, options):
                if isinstance(record, Skip):
                    skipped[record.reason] += 1
                elif isinstance(record.value, str):
                    yield {source.text_key: record.value}
                else:
                    first.check(record)
                    value = record.value
                    yield {key: value[key] for key in options.keys if key in value}


def _fetch_url(job: Job, source: SourceConfig, writer: ArtifactWriter) -> dict[str, Json]:
    """Fetch into the work folder, where a partial file survives kills, then copy the whole."""
    name, setting = file_name(source.url), f"download.{job.role}.url"
    refuse_name(name, job.role, "url")
    partial = job.work / f"{source.sha256[:16]}.partial"
    for done_bytes, total_bytes in fetch_file(source.url, source.sha256, partial, setting):
        job.report_progress(done_bytes, max(done_bytes, total_bytes) if total_bytes else 0, "bytes")
    num_bytes, sha256 = _copy_file(job, partial, f"files/{name}", writer)
    if sha256 != source.sha256:
        raise DataError(
            f"{setting}: the fetched bytes changed while they were copied; run it again"
        )
    return {"num_bytes": num_bytes}


def _limited(lines: Iterator[bytes], max_documents: int) -> Iterator[bytes]:
    """Yield `max_documents` lines sampled by their hash, in order, so that all kinds occur."""
    if max_documents == 0:
        return lines
    sample = heapq.nsmallest(
        max_documents, enumerate(lines), key=lambda item: hashlib.sha256(item[1]).digest()
    )
    return (line for _, line in sorted(sample))


def _json_line(record: Mapping[str, Json]) -> bytes:
    """Return a line of JSON; values that JSON has no type for become null."""
    text = json.dumps(record, ensure_ascii=False, default=lambda _: None)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate, which clean counts
        return json.dumps(record, default=lambda _: None).encode() + b"\n"


def _copy_files(job: Job, source: SourceConfig, writer: ArtifactWriter) -> dict[str, Json]:
    found = list_files(source, job.role)
    total_bytes = sum(path.stat().st_size for _, path in found.files)
    if total_bytes == 0:
        raise DataError(
            f"download.{job.role}.path: the {len(found.files)} files in {source.path} are empty"
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
    """Copy one file; return the size and sha256 of the copied bytes."""
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
    """Raise if the source changed since the cache key was computed from it."""
    planned = job.input_digests.get("source", copied)
    if copied != planned:
        raise DataError(
            f"download.{job.role}: {what} changed after the run began; run again when nothing"
            " writes to it"
        )


if __name__ == "__main__":
    run_job(download)
