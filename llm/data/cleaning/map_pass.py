"""The first look at documents: a shard of raw input becomes staged documents, each judged alone."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import cast

from llm.artifact import ArtifactWriter, Json
from llm.config import CleanConfig, read_section
from llm.data.cleaning.counts import Tally
from llm.data.cleaning.deduplicate import UnitWriter, compares
from llm.data.cleaning.document_steps import DocumentSteps
from llm.data.cleaning.input_shards import RawInput, RawShard
from llm.data.cleaning.staging import ENCODER, StagedDocument, StagingWriter, joined_text
from llm.data.content import Content
from llm.data.raw.parsing import RawDocument
from llm.data.raw.records import EXCERPT_CHARACTERS, Skip
from llm.runtime.job import Job

ID_BYTES = 16
MAX_REMEMBERED = 1 << 18
"""Contents of documents in a shard, 25 MB of memory: one that is there again need not be staged."""


def read_shard(job: Job, writer: ArtifactWriter) -> dict[str, Json]:
    """Write the staged documents of a shard, signed where near duplicates are looked for."""
    settings = read_section(CleanConfig, job.settings)
    raw, raw_shard = RawInput.of(job.inputs), RawShard.from_json(job.shard)
    content, has_sources = raw.content, len(raw.folders) > 1
    steps, tally, seen = DocumentSteps(settings), Tally(), set[bytes]()
    with ExitStack() as stack:
        staging = stack.enter_context(StagingWriter(writer, has_sources=has_sources))
        units = None
        if compares(settings, content):
            units = stack.enter_context(UnitWriter(writer, settings.near_duplicates))
        for document, done_bytes in raw.read(raw_shard, settings, job.work):
            tally.num_read += 1
            tally.num_decode_errors += document.num_decode_errors
            if isinstance(document, Skip):
                tally.skip(document, tally.num_read, "read")
            elif fields := _judge(document, content, settings, steps, tally):
                sha256 = _sha256(fields)
                if sha256 in seen:
                    _skip(document, joined_text(fields), "duplicate", "exact duplicates", tally)
                    continue
                if settings.split == "hash" and len(seen) < MAX_REMEMBERED:
                    seen.add(sha256)  # else it is found later, and shown by the part it begins with
                for staged, text in _stage(
                    document, fields, sha256, settings, tally.num_read, has_sources=has_sources
                ):
                    if units is not None:
                        units.add(staging.num_documents, text)
                    staging.add(staged)
                    side = "validation" if staged.is_validation else "train"
                    tally.keep(side, staged.size_bytes)
            job.report_progress(done_bytes, raw_shard.size_bytes, "bytes")
    return {"tally": tally.to_json(), "changes": steps.summary()}


def _judge(
    document: RawDocument,
    content: Content,
    settings: CleanConfig,
    steps: DocumentSteps,
    tally: Tally,
) -> dict[str, Json]:
    """Return what is to be written of a document; nothing, and count why, if it is left out."""
    step = "filters"
    reason, excerpt = steps.apply(document), document.text
    fields: dict[str, Json] = {"text": document.text}
    if content == "chats":
        fields = {"messages": cast(Json, document.messages), "kind": document.kind}
    if not reason:
        step, excerpt = "length", joined_text(fields)
        if content == "text" and not document.text.strip():
            reason = "empty"
        elif _size_bytes(fields) < settings.min_document_bytes:
            reason = "too short"
    if not reason:
        return fields
    _skip(document, excerpt, reason, step, tally)
    return {}


def _skip(document: RawDocument, text: str, reason: str, step: str, tally: Tally) -> None:
    skip = Skip(place=document.place, reason=reason, excerpt=text[:EXCERPT_CHARACTERS])
    tally.skip(skip, tally.num_read, step)


def _stage(
    document: RawDocument,
    fields: dict[str, Json],
    sha256: bytes,
    settings: CleanConfig,
    record: int,
    *,
    has_sources: bool,
) -> Iterator[tuple[StagedDocument, str]]:
    """Yield a document with its text, or the two sides of one that is cut."""
    if "text" in fields and settings.split == "tail":
        parts = _cut_tail(document.text, settings.validation_fraction)
        sides = [(side == "validation", fields | {"text": part}) for side, part in parts.items()]
    else:
        group = document.group
        deciding = sha256 if group is None else hashlib.sha256(group.encode()).digest()
        below = settings.validation_fraction * 2**64
        sides = [(int.from_bytes(deciding[:8], "big") < below, fields)]
    source: dict[str, Json] = {"source": document.source} if has_sources else {}
    for place, (is_validation, part) in enumerate(sides):
        identifier = (sha256 if part is fields else _sha256(part))[:ID_BYTES]
        record_of_line = {"id": identifier.hex(), **source, **part}
        staged = StagedDocument(
            id=identifier,
            content=sha256[:ID_BYTES],
            line=ENCODER.encode(record_of_line).encode() + b"\n",
            size_bytes=_size_bytes(part),
            is_validation=is_validation,
            is_tail=place > 0,
            place=document.place,
            record=record,
            source=document.source,
        )
        yield staged, joined_text(part)


def _cut_tail(text: str, fraction: float) -> dict[str, str]:
    """Cut a text in two by characters, the last `fraction` for validation; a side without any is
    left out.
    """
    end = int(len(text) * (1 - fraction))
    parts = {"train": text[:end], "validation": text[end:]}
    return {side: part for side, part in parts.items() if part}


def _sha256(fields: Mapping[str, Json]) -> bytes:
    """Hash the text, or role and content of each message."""
    data = fields["text"] if "text" in fields else ENCODER.encode(fields["messages"])
    return hashlib.sha256(cast(str, data).encode()).digest()


def _size_bytes(fields: Mapping[str, Json]) -> int:
    if "text" in fields:
        return len(cast(str, fields["text"]).encode())
    messages = cast(list[dict[str, str]], fields["messages"])
    return sum(len(message["content"].encode()) for message in messages)
