"""The two passes over shards: map (judge each document alone) and write (the documents kept).

The global decision stands between them, in llm/clean.py.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import numpy as np

from llm.artifact import ArtifactWriter, Json
from llm.config import CleanConfig, read_section
from llm.data.cleaning.decontaminate import NGRAM_BYTES, NGRAMS, PROTECTED, Protected, ngrams_of
from llm.data.cleaning.filters import apply_c4, gopher_reason
from llm.data.cleaning.input_shards import InputShard, RawInput
from llm.data.cleaning.minhash import Signer
from llm.data.cleaning.normalize import normalize
from llm.data.cleaning.personal_data import MaskCounts, mask
from llm.data.cleaning.staging import (
    StagedDocument,
    StagedShard,
    StagingWriter,
    joined_text,
    texts_of,
)
from llm.data.cleaning.stats import CleaningStats
from llm.data.closing import Closing
from llm.data.content import Content
from llm.data.documents import DocumentsWriter
from llm.data.raw.reading import RawDocument, read_documents
from llm.data.raw.records import EXCERPT_CHARACTERS, Skip
from llm.runtime.job import Job

DROPS = "drops-{:05}.bin"
"""Beside the shards: a byte for each document of one, the index of its drop reason."""
ID_BYTES = 16
MAX_SEEN = 1 << 18
"""Contents of a shard in memory, 25 MB: an exact duplicate within the shard is not staged."""
DEFAULT_KINDS = {"chats": "chat", "preferences": "preference"}
ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def map_pass(job: Job, writer: ArtifactWriter) -> dict[str, Json]:
    """Stage the documents of a shard of raw input that pass the steps on single documents."""
    settings = read_section(CleanConfig, job.settings)
    raw, shard = RawInput.of(job.inputs), InputShard.from_json(job.shard)
    with _Stager(writer, settings, raw) as stager:
        for document, done_bytes in _read(raw, shard, job.role, settings, job.work):
            stager.add(document)
            job.report_progress(done_bytes, shard.size_bytes, "bytes")
    return {"stats": stager.stats.to_json(), "changes": stager.changes()}


def write_pass(job: Job, writer: ArtifactWriter) -> dict[str, Json]:
    """Write the kept documents of a staged shard on the sides of `job.shard`.

    Training documents that share an n-gram with the protected ones are counted or dropped.
    """
    settings = read_section(CleanConfig, job.settings)
    action, protected = settings.decontamination.action, None
    if action != "none":
        protected = Protected(job.out.parent / PROTECTED, settings.decontamination.ngram_words)
    shard = StagedShard(job.out.parent / cast(str, job.shard["staged"]))
    drops = np.fromfile(job.out.parent / DROPS.format(job.shard["number"]), dtype=np.uint8)
    has_sources = RawInput.of(job.inputs).has_sources
    stats, num_contaminated = CleaningStats(), 0
    sides = cast(list[str], job.shard["sides"])
    with ExitStack() as stack:
        files = {
            side: stack.enter_context(DocumentsWriter(writer, side, has_sources=has_sources))
            for side in sides
        }
        for number, document in shard.kept(drops, sides):
            job.report_progress(number, len(shard), "documents")
            if protected and document.side == "train" and protected.is_in(document.text):
                num_contaminated += 1
                if action == "drop":
                    stats.skip(document.skip("contaminated"), document.record, "decontamination")
                    continue
            files[document.side].add(document.line, document.source)
            stats.keep(document.side, document.size_bytes)
    return {"stats": stats.to_json(), "contaminated_documents": num_contaminated}


def add_changes(total: dict[str, Json], found: Mapping[str, Json]) -> None:
    """Add a shard's counts of changes to the total."""
    for name, value in found.items():
        if isinstance(value, dict):
            counts = Counter(cast(dict[str, int], total.get(name, {})))
            counts.update(cast(dict[str, int], value))
            total[name] = dict(sorted(counts.items()))
        else:
            total[name] = cast(int, total.get(name, 0)) + cast(int, value)


def _read(
    raw: RawInput, shard: InputShard, role: str, settings: CleanConfig, scratch: Path
) -> Iterator[tuple[RawDocument | Skip, int]]:
    """Yield the documents of a shard, and how many of its bytes have been read."""
    options = [raw.read_options(n, role, settings, scratch) for n in range(len(raw.folders))]
    done_bytes = 0
    for source, name in shard.files:
        path, shown = raw.path(source, name), f"{source}/{name}" if raw.has_sources else name
        for document in read_documents(path, shown, options[source], shard.span):
            if isinstance(document, RawDocument):
                document.source = source
            yield document, done_bytes + document.location.read_bytes - shard.start_bytes
        done_bytes += path.stat().st_size


class _Stager(Closing):
    """Judges each document alone and stages it, or counts why it is dropped.

    Documents are signed if near duplicates are dropped; the n-grams of validation documents are
    written if training documents are compared with them.
    """

    def __init__(self, writer: ArtifactWriter, settings: CleanConfig, raw: RawInput) -> None:
        super().__init__()
        self.stats = CleaningStats()
        self._masked, self._removed_lines = MaskCounts(), Counter[str]()
        self._edits = Counter[str]()
        self._settings, self._has_sources = settings, raw.has_sources
        self._content: Content = raw.content
        self._seen = set[bytes]()
        self._signer = self._ngrams = None
        if settings.near_duplicates.unit != "none":
            self._signer = self._stack.enter_context(Signer(writer, settings.near_duplicates))
        if settings.decontamination.action != "none":
            self._ngrams = self._stack.enter_context(writer.open(NGRAMS))
        self._staging = self._stack.enter_context(
            StagingWriter(writer, has_sources=raw.has_sources)
        )

    def add(self, document: RawDocument | Skip) -> None:
        """Stage or count the next document."""
        self.stats.num_read += 1
        self.stats.num_decode_errors += document.num_decode_errors
        if isinstance(document, Skip):
            self.stats.skip(document, self.stats.num_read, "read")
            return
        if not (fields := self._judge(document)):
            return
        sha256 = _sha256(fields)
        if sha256 in self._seen:
            self._drop(document, joined_text(fields), "duplicate", "exact duplicates")
            return
        if self._settings.split == "hash" and len(self._seen) < MAX_SEEN:
            self._seen.add(sha256)  # else the global decision finds it
        for index, (is_validation, part) in enumerate(self._split(document, fields, sha256)):
            identifier = (sha256 if part is fields else _sha256(part))[:ID_BYTES]
            source: dict[str, Json] = {"source": document.source} if self._has_sources else {}
            record = {"id": identifier.hex(), **source, **part}
            text, num_ngrams = joined_text(part), 0
            if self._ngrams is not None and is_validation:
                data = ngrams_of(text, self._settings.decontamination.ngram_words)
                num_ngrams = self._ngrams.write(data) // NGRAM_BYTES
            staged = StagedDocument(
                id=identifier,
                content=sha256[:ID_BYTES],
                line=ENCODER.encode(record).encode() + b"\n",
                size_bytes=_size_bytes(part),
                is_validation=is_validation,
                is_tail=index > 0,
                is_signed=self._signer is not None and self._signer.add(text),
                num_ngrams=num_ngrams,
                location=document.location,
                record=self.stats.num_read,
                source=document.source,
            )
            self._staging.add(staged)
            self.stats.keep(staged.side, staged.size_bytes)

    def changes(self) -> dict[str, Json]:
        """Return the counts of changes by the enabled steps."""
        counts: dict[str, Json] = {}
        if self._settings.masks_emails:
            counts["masked_emails"] = self._masked.num_emails
        if self._settings.masks_ip_addresses:
            counts["masked_ip_addresses"] = self._masked.num_ip_addresses
        if "c4" in self._settings.filters:
            counts["removed_lines"] = dict(sorted(self._removed_lines.items()))
        if self._edits:
            counts["edited_conversations"] = dict(sorted(self._edits.items()))
        return counts

    def _judge(self, document: RawDocument) -> dict[str, Json]:
        """Return the output fields of a document; none, and count why, if it is dropped."""
        self._rewrite(document)
        step, reason = "filters", self._filter(document)
        fields = _fields(document, self._content)
        if not reason:
            step = "length"
            if self._content == "text" and not document.text.strip():
                reason = "empty"
            elif _size_bytes(fields) < self._settings.min_document_bytes:
                reason = "too short"
        if not reason:
            self._edits.update(document.edits)
            return fields
        self._drop(document, joined_text(fields), reason, step)
        return {}

    def _rewrite(self, document: RawDocument) -> None:
        """Normalize a document and mask personal data, as far as enabled."""
        settings = self._settings
        is_masking = settings.masks_emails or settings.masks_ip_addresses
        if settings.line_ends == settings.unicode_form == "as_is" and not is_masking:
            return

        def rewrite(text: str) -> str:
            text = normalize(text, settings.line_ends, settings.unicode_form)
            emails, ip_addresses = settings.masks_emails, settings.masks_ip_addresses
            return mask(text, self._masked, emails=emails, ip_addresses=ip_addresses)

        document.text = rewrite(document.text)
        document.chosen, document.rejected = rewrite(document.chosen), rewrite(document.rejected)
        for message in document.messages:
            message["content"] = rewrite(message["content"])

    def _filter(self, document: RawDocument) -> str:
        """Return why the quality filters drop a document, or ""; C4's rules remove lines.

        Conversations are not filtered, except for pairs from which nothing can be learned.
        """
        settings, reason = self._settings, ""
        if document.messages:
            is_pair = self._content == "preferences"
            is_equal = is_pair and document.chosen.strip() == document.rejected.strip()
            return "equal answers" if is_equal else ""
        if settings.filters == "none":
            return ""
        if not document.text.strip():
            return "empty"
        if "c4" in settings.filters:
            document.text, reason = apply_c4(document.text, settings.c4, self._removed_lines)
        if not reason and "gopher" in settings.filters:
            reason = gopher_reason(document.text, settings.gopher)
        return reason

    def _drop(self, document: RawDocument, text: str, reason: str, step: str) -> None:
        skip = Skip(location=document.location, reason=reason, excerpt=text[:EXCERPT_CHARACTERS])
        self.stats.skip(skip, self.stats.num_read, step)

    def _split(
        self, document: RawDocument, fields: dict[str, Json], sha256: bytes
    ) -> list[tuple[bool, dict[str, Json]]]:
        """Return (is_validation, fields) of a document, or of both parts of one that is cut."""
        fraction = self._settings.validation_fraction
        if "text" in fields and self._settings.split == "tail":
            end = int(len(document.text) * (1 - fraction))  # characters
            parts = ((False, document.text[:end]), (True, document.text[end:]))
            return [
                (is_validation, fields | {"text": part}) for is_validation, part in parts if part
            ]
        deciding = sha256
        if document.group:
            deciding = hashlib.sha256(document.group.encode()).digest()
        elif document.chosen:  # the pairs of one prompt stay together
            deciding = _sha256({"messages": fields["messages"]})
        return [(int.from_bytes(deciding[:8], "big") < fraction * 2**64, fields)]


def _fields(document: RawDocument, content: Content) -> dict[str, Json]:
    """Return the output fields of a document."""
    if content == "text":
        return {"text": document.text}
    fields: dict[str, Json] = {"messages": cast(Json, document.messages)}
    if content == "preferences":
        fields |= {"chosen": document.chosen, "rejected": document.rejected}
    return fields | {"kind": document.kind or DEFAULT_KINDS[content]}


def _sha256(fields: Mapping[str, Json]) -> bytes:
    """Hash the text; role and content of each message; of a pair, the answers too."""
    if "text" in fields:
        data = cast(str, fields["text"])
    else:
        answers = [fields[key] for key in ("chosen", "rejected") if key in fields]
        data = ENCODER.encode([fields["messages"], *answers] if answers else fields["messages"])
    return hashlib.sha256(data.encode()).digest()


def _size_bytes(fields: Mapping[str, Json]) -> int:
    return sum(len(text.encode()) for text in texts_of(fields))
