"""Turn raw files into documents with ids, each once, split into train and validation.

A record of text holds it under `text_key`. A chat holds `messages`, each with `role` (system, user,
assistant) and `content`, or else `instruction`, `input` and `output`; `kind` may name what it is.

The steps, in this order, each off unless a setting turns it on or nothing is said of it here:
decode; normalize (off); mask personal data (off); the rules of C4 and Gopher (off); length; exact
duplicates; near duplicates (off); decontamination (off); split. Up to the exact duplicates one pass
over the raw files is all; near duplicates and decontamination need two looks, so documents wait on
disk between.

A document's id is the hash of its content, and the hash alone decides its side of the split: adding
data never moves a document from one side to the other. Chats with the same `group` (questions on
the same function, say) stay together: for them the hash of the group decides. Of documents nearly
the same the one of the lowest hash is kept, which is in validation if any of them is. Nothing is
dropped without being counted.
"""

import hashlib
import json
import sqlite3
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from llm.artifact import ArtifactWriter, Json
from llm.config import CleanConfig, read_section
from llm.data.decontaminate import Decontamination
from llm.data.deduplicate import Deduplication
from llm.data.document_file import DocumentFile
from llm.data.document_steps import DocumentSteps
from llm.data.documents import Document, read_documents
from llm.data.formats import Content
from llm.data.records import EXCERPT_CHARACTERS, Skip
from llm.data.staging import ENCODER, StagedDocument, Staging, joined_text
from llm.data.tally import Tally
from llm.errors import DataError
from llm.job import Job, run_job

ID_BYTES = 16
SEEN_CACHE_KIBIBYTES = 64 * 1024

IsNew = Callable[[bytes], bool]


def clean(job: Job, writer: ArtifactWriter) -> dict[str, Json]:
    """Write the documents of the input `raw` to `train.jsonl` and `validation.jsonl`.

    Of several sources, `raw_0`, `raw_1` and so on, each document says which one it is from.
    An input `held_out`, documents cleaned before, has a validation side to keep out of training.

    Raises:
        DataError: a side of the split is empty, or a file cannot be read as what its name says.
    """
    settings = read_section(CleanConfig, job.settings)
    by_number = sorted(job.inputs.items(), key=lambda item: (len(item[0]), item[0]))
    raws = [Path(folder) for name, folder in by_number if name.startswith("raw")]
    content = cast(Content, json.loads((raws[0] / "source.json").read_bytes())["content"])
    tally, summary = Tally(), dict[str, Json]()
    with (
        writer.open("train.jsonl") as train,
        writer.open("validation.jsonl") as validation,
        _seen_hashes(job.work / "seen.sqlite3") as is_new,
    ):
        documents = _look_at_each(job, raws, content, settings, is_new, tally, summary)
        if settings.near_duplicates.unit != "none" or settings.decontamination.action != "none":
            documents = _compare(job, documents, content, settings, is_new, tally, summary)
        for document in documents:
            (validation if document.is_validation else train).write(document.line)
            tally.keep("validation" if document.is_validation else "train", document.size_bytes)
    summary = _summary(tally, content) | summary
    _refuse_empty_side(tally, settings)
    lines = (json.dumps(example, sort_keys=True) + "\n" for example in tally.rejected)
    writer.write_bytes("rejected.jsonl", "".join(lines).encode())
    several = {"num_sources": len(raws)} if len(raws) > 1 else {}
    writer.write_json("documents.json", {"content": content, **several})
    return summary


def _look_at_each(
    job: Job,
    raws: Sequence[Path],
    content: Content,
    settings: CleanConfig,
    is_new: IsNew,
    tally: Tally,
    summary: dict[str, Json],
) -> Iterator[StagedDocument]:
    """Yield what passes the steps up to the exact duplicates."""
    files = [(number, path) for number, raw in enumerate(raws) for path in _files(raw)]
    text_keys = [json.loads((raw / "source.json").read_bytes())["text_key"] for raw in raws]
    total_bytes, done_bytes = sum(path.stat().st_size for _, path in files), 0
    steps = DocumentSteps(settings)
    for number, path in files:
        name = path.relative_to(raws[number] / "files").as_posix()
        documents = read_documents(
            path,
            f"{number}/{name}" if len(raws) > 1 else name,
            content=content,
            text_key=text_keys[number],
            policy=settings.decode_errors,
            text_document_bytes=settings.text_document_bytes,
            limits=settings.reading,
            scratch=job.work,
        )
        for document in documents:
            tally.num_read += 1
            tally.num_decode_errors += document.num_decode_errors
            if isinstance(document, Skip):
                tally.skip(document, "read")
            else:
                document.source = number if len(raws) > 1 else None
                yield from _take(document, content, settings, steps, is_new, tally)
            job.report_progress(done_bytes + document.place.read_bytes, total_bytes, "bytes")
        done_bytes += path.stat().st_size
    job.report_progress(total_bytes, total_bytes, "bytes")
    summary |= steps.summary()


def _files(raw: Path) -> list[Path]:
    return sorted(path for path in (raw / "files").rglob("*") if path.is_file())


def _take(
    document: Document,
    content: Content,
    settings: CleanConfig,
    steps: DocumentSteps,
    is_new: IsNew,
    tally: Tally,
) -> Iterator[StagedDocument]:
    """Yield one document, or the two sides of one that is cut, or count why not."""
    if reason := steps.apply(document):
        tally.skip(_skip(document, document.text, reason), "filters")
        return
    if content == "text":
        data = document.text.encode()
        size_bytes, has_words = len(data), bool(document.text.strip())
        fields: dict[str, Json] = {"text": document.text}
    else:
        data = ENCODER.encode(document.messages).encode()  # role, then content
        size_bytes = sum(len(message["content"].encode()) for message in document.messages)
        has_words = True
        fields = {"messages": cast(Json, document.messages), "kind": document.kind}
    sha256 = hashlib.sha256(data).digest()
    reason, step = "", "length"
    if not has_words:
        reason = "empty"
    elif size_bytes < settings.min_document_bytes:
        reason = "too short"
    elif not is_new(sha256):
        reason, step = "duplicate", "exact duplicates"
    if reason:
        tally.skip(
            _skip(document, data[:EXCERPT_CHARACTERS].decode(errors="replace"), reason), step
        )
        return
    if content == "text" and settings.split == "tail":
        parts = _cut_tail(document.text, settings.validation_fraction)
        tally.num_read += len(parts) - 1
        for side, part in parts.items():
            digest = hashlib.sha256(part.encode()).digest()
            size_bytes = len(part.encode())
            yield _staged(
                document, digest, fields | {"text": part}, size_bytes, side == "validation"
            )
        return
    deciding = (
        sha256 if document.group is None else hashlib.sha256(document.group.encode()).digest()
    )
    is_validation = int.from_bytes(deciding[:8], "big") < settings.validation_fraction * 2**64
    yield _staged(document, sha256, fields, size_bytes, is_validation)


def _staged(
    document: Document, sha256: bytes, fields: dict[str, Json], size_bytes: int, is_validation: bool
) -> StagedDocument:
    source: dict[str, Json] = {} if document.source is None else {"source": document.source}
    line = ENCODER.encode({"id": sha256[:ID_BYTES].hex(), **source, **fields}).encode() + b"\n"
    return StagedDocument(
        id=sha256[:ID_BYTES],
        line=line,
        text=joined_text(fields),
        size_bytes=size_bytes,
        is_validation=is_validation,
        place=document.place,
    )


def _cut_tail(text: str, fraction: float) -> dict[str, str]:
    """Cut a text in two by characters, the last `fraction` for validation; a side without any is
    left out.
    """
    end = int(len(text) * (1 - fraction))
    parts = {"train": text[:end], "validation": text[end:]}
    return {side: part for side, part in parts.items() if part}


def _compare(
    job: Job,
    documents: Iterator[StagedDocument],
    content: Content,
    settings: CleanConfig,
    is_new: IsNew,
    tally: Tally,
    summary: dict[str, Json],
) -> Iterator[StagedDocument]:
    """Yield what is left after the steps that compare documents, which wait on disk meanwhile."""
    unit = settings.near_duplicates.unit
    with Staging(job.work / "staged") as staging:
        duplicates = None
        if unit == "document" or (unit == "paragraph" and content == "text"):
            duplicates = Deduplication(staging.folder, settings)
        for document in documents:
            staging.add(document)
            if duplicates is not None:
                duplicates.add(document.text)
        if duplicates is not None:
            duplicates.resolve(staging, is_new, job.report_progress)
            summary |= duplicates.summary()

        def left() -> Iterator[tuple[StagedDocument, str]]:
            found = duplicates.left(staging) if duplicates else ((one, "") for one in staging)
            for number, (document, reason) in enumerate(found, start=1):
                job.report_progress(number, len(staging), "documents")
                yield document, reason

        contamination, num_contaminated = None, 0
        if settings.decontamination.action != "none":
            contamination = _protect(job, staging.folder / "ngrams.bin", settings, left)
        for document, reason in left():
            if reason:
                tally.skip(_skip(document, document.text, reason), "near duplicates")
                continue
            if contamination and contamination.is_contaminated(document):
                num_contaminated += 1
                if settings.decontamination.action == "drop":
                    skip = _skip(document, document.text, "contaminated")
                    tally.skip(skip, "decontamination")
                    continue
            yield document
        if contamination:
            summary["contaminated_documents"] = num_contaminated


def _protect(
    job: Job,
    path: Path,
    settings: CleanConfig,
    left: Callable[[], Iterator[tuple[StagedDocument, str]]],
) -> Decontamination:
    """Return what knows the n-grams of all texts that are measured on."""
    contamination = Decontamination(path, settings.decontamination)
    for text in settings.decontamination.texts:
        contamination.protect(text)
    if "held_out" in job.inputs:
        held_out = DocumentFile(Path(job.inputs["held_out"]), "validation")
        for document in held_out.read(range(len(held_out))):
            contamination.protect("\n".join(document.texts))
    for document, reason in left():
        if document.is_validation and not reason:
            contamination.protect(document.text)
    contamination.finish()
    if contamination.is_counting:
        for document, reason in left():
            if not reason:
                contamination.count(document)
    return contamination


def _skip(document: Document | StagedDocument, text: str, reason: str) -> Skip:
    return Skip(place=document.place, reason=reason, excerpt=text[:EXCERPT_CHARACTERS])


@contextmanager
def _seen_hashes(path: Path) -> Generator[IsNew]:
    """Give a function that tells whether a hash comes for the first time. The set is on disk:
    memory stays bounded however many documents there are.
    """
    path.unlink(missing_ok=True)
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode = OFF")  # it is thrown away in any case
        cursor.execute("PRAGMA synchronous = OFF")
        cursor.execute(f"PRAGMA cache_size = -{SEEN_CACHE_KIBIBYTES}")
        cursor.execute("CREATE TABLE seen (id BLOB PRIMARY KEY) WITHOUT ROWID")
        cursor.execute("BEGIN")

        def is_new(sha256: bytes) -> bool:
            cursor.execute("INSERT OR IGNORE INTO seen VALUES (?)", (sha256[:ID_BYTES],))
            return cursor.rowcount == 1

        yield is_new
    finally:
        connection.close()
        path.unlink(missing_ok=True)


def _refuse_empty_side(tally: Tally, settings: CleanConfig) -> None:
    if tally.num_kept["train"] and tally.num_kept["validation"]:
        return
    counts = [f"{count} {reason}" for reason, count in sorted(tally.skipped.items())]
    first = [f"the first in {example['file']} line {example['line']}" for example in tally.rejected]
    side = "train" if tally.num_kept["validation"] else "validation"
    raise DataError(
        f"of {tally.num_read} documents {tally.num_kept.total()} are left"
        f" (skipped: {', '.join(counts + first[:1]) or 'none'}), and none of them fell to {side};"
        f" give more data, change clean.validation_fraction ({settings.validation_fraction:g}), or"
        f" make clean.text_document_bytes ({settings.text_document_bytes}) smaller, which cuts text"
        " files into more documents"
    )


def _summary(tally: Tally, content: Content) -> dict[str, Json]:
    return {
        "content": content,
        "read_documents": tally.num_read,
        "train_documents": tally.num_kept["train"],
        "validation_documents": tally.num_kept["validation"],
        "train_bytes": tally.kept_bytes["train"],
        "validation_bytes": tally.kept_bytes["validation"],
        "skipped": dict(sorted(tally.skipped.items())),
        "num_decode_errors": tally.num_decode_errors,
        "funnel": tally.funnel(),
    }


if __name__ == "__main__":
    run_job(clean)
