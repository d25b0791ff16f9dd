"""Turn raw files into documents with ids, each once, split into train and validation.

A record of text holds it under `text_key`. A chat holds `messages`, each with `role` (system, user,
assistant) and `content`, or else `instruction`, `input` and `output`; `kind` may name what it is.

A document's id is the hash of its content, and the hash alone decides its side of the split: adding
data never moves a document from one side to the other. Chats with the same `group` (questions on
the same function, say) stay together: for them the hash of the group decides. Nothing is dropped
without being counted.
"""

import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

from llm.artifact import ArtifactWriter, Json
from llm.config import CleanConfig, read_section
from llm.data.documents import Document, read_documents
from llm.data.formats import Content
from llm.data.records import Skip
from llm.errors import DataError
from llm.job import Job, run_job

ID_BYTES = 16
MAX_REJECTED_EXAMPLES = 20
"""Kept of each reason."""
ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
SEEN_CACHE_KIBIBYTES = 64 * 1024


@dataclass(kw_only=True, slots=True)
class Tally:
    """What became of the documents: read = train + validation + skipped."""

    num_read: int = 0
    num_kept: Counter[str] = field(default_factory=Counter[str])
    """Documents by split."""
    kept_bytes: Counter[str] = field(default_factory=Counter[str])
    """Bytes of text by split."""
    skipped: Counter[str] = field(default_factory=Counter[str])
    """Documents by reason."""
    rejected: list[dict[str, Json]] = field(default_factory=list[dict[str, Json]])
    """The first examples of each reason."""
    num_decode_errors: int = 0

    def skip(self, unusable: Skip) -> None:
        """Count a document that is left out, and keep it while it is one of the first."""
        self.skipped[unusable.reason] += 1
        if self.skipped[unusable.reason] <= MAX_REJECTED_EXAMPLES:
            place = unusable.place
            self.rejected.append(
                {
                    "reason": unusable.reason,
                    "file": place.file,
                    "line": place.line,
                    "excerpt": unusable.excerpt,
                }
            )


def clean(job: Job, writer: ArtifactWriter) -> dict[str, Json]:
    """Write the documents of the input `raw` to `train.jsonl` and `validation.jsonl`.

    Raises:
        DataError: a side of the split is empty, or a file cannot be read as what its name says.
    """
    settings = read_section(CleanConfig, job.settings)
    raw = Path(job.inputs["raw"])
    source = json.loads((raw / "source.json").read_bytes())
    content = cast(Content, source["content"])
    files = sorted(path for path in (raw / "files").rglob("*") if path.is_file())
    total_bytes, done_bytes = sum(path.stat().st_size for path in files), 0
    tally = Tally()
    with (
        writer.open("train.jsonl") as train,
        writer.open("validation.jsonl") as validation,
        _seen_ids(job.work / "seen.sqlite3") as seen,
    ):
        sides = {"train": train, "validation": validation}
        for path in files:
            documents = read_documents(
                path,
                path.relative_to(raw / "files").as_posix(),
                content=content,
                text_key=source["text_key"],
                policy=settings.decode_errors,
                text_document_bytes=settings.text_document_bytes,
            )
            for document in documents:
                _take(document, content, settings, sides, seen, tally)
                done = done_bytes + document.place.read_bytes
                job.report_progress(done, total_bytes, "bytes")
            done_bytes += path.stat().st_size
    job.report_progress(total_bytes, total_bytes, "bytes")
    _refuse_empty_side(tally, settings)
    lines = (json.dumps(example, sort_keys=True) + "\n" for example in tally.rejected)
    writer.write_bytes("rejected.jsonl", "".join(lines).encode())
    writer.write_json("documents.json", {"content": content})
    return _summary(tally, content)


def _take(
    document: Document | Skip,
    content: Content,
    settings: CleanConfig,
    sides: dict[str, IO[bytes]],
    seen: sqlite3.Cursor,
    tally: Tally,
) -> None:
    """Write one document to its side, or count why not."""
    tally.num_read += 1
    tally.num_decode_errors += document.num_decode_errors
    if isinstance(document, Skip):
        tally.skip(document)
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
    seen.execute("INSERT OR IGNORE INTO seen VALUES (?)", (sha256[:ID_BYTES],))
    reason = (
        "empty"
        if not has_words
        else "too short"
        if size_bytes < settings.min_document_bytes
        else "duplicate"
        if seen.rowcount == 0
        else ""
    )
    if reason:
        excerpt = data[:200].decode(errors="replace")
        tally.skip(Skip(place=document.place, reason=reason, excerpt=excerpt))
        return
    if content == "text" and settings.split == "tail":
        parts = _cut_tail(document.text, settings.validation_fraction)
        tally.num_read += len(parts) - 1
        for side, part in parts.items():
            _keep(part.encode(), {"text": part}, len(part.encode()), sides[side], side, tally)
        return
    deciding = (
        sha256 if document.group is None else hashlib.sha256(document.group.encode()).digest()
    )
    is_validation = int.from_bytes(deciding[:8], "big") < settings.validation_fraction * 2**64
    side = "validation" if is_validation else "train"
    _keep(data, fields, size_bytes, sides[side], side, tally)


def _cut_tail(text: str, fraction: float) -> dict[str, str]:
    """Cut a text in two by characters, the last `fraction` for validation; a side without any is
    left out.
    """
    end = int(len(text) * (1 - fraction))
    parts = {"train": text[:end], "validation": text[end:]}
    return {side: part for side, part in parts.items() if part}


def _keep(
    data: bytes, fields: dict[str, Json], size_bytes: int, file: IO[bytes], side: str, tally: Tally
) -> None:
    line = {"id": hashlib.sha256(data).digest()[:ID_BYTES].hex(), **fields}
    file.write(ENCODER.encode(line).encode() + b"\n")
    tally.num_kept[side] += 1
    tally.kept_bytes[side] += size_bytes


@contextmanager
def _seen_ids(path: Path) -> Generator[sqlite3.Cursor]:
    """Open an empty set of ids on disk: memory stays bounded however many documents there are."""
    path.unlink(missing_ok=True)
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode = OFF")  # it is thrown away in any case
        cursor.execute("PRAGMA synchronous = OFF")
        cursor.execute(f"PRAGMA cache_size = -{SEEN_CACHE_KIBIBYTES}")
        cursor.execute("CREATE TABLE seen (id BLOB PRIMARY KEY) WITHOUT ROWID")
        cursor.execute("BEGIN")
        yield cursor
    finally:
        connection.close()
        path.unlink(missing_ok=True)


def _refuse_empty_side(tally: Tally, settings: CleanConfig) -> None:
    assert tally.num_read == tally.num_kept.total() + tally.skipped.total()
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
    }


if __name__ == "__main__":
    run_job(clean)
