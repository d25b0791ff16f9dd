"""The later looks at staged documents: each takes one shard, and what was decided on all of them.

rest       what is left of documents that paragraphs are cut out of
protect    the n-grams of validation documents
count      how many training documents hold each of these
write      the documents that stay
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import cast

from llm.artifact import ArtifactWriter, Json
from llm.config import CleanConfig, read_section
from llm.data.cleaning.counts import MAX_REJECTED_EXAMPLES, Tally
from llm.data.cleaning.decisions import Decisions, LeftDocument
from llm.data.cleaning.decontaminate import DocumentCounts, Protected, ngrams_of
from llm.data.cleaning.deduplicate import rest_of
from llm.data.cleaning.input_shards import RawInput
from llm.data.cleaning.staging import StagedShard
from llm.data.documents import SPLITS, DocumentsWriter
from llm.runtime.job import Job

DECISIONS, PROTECTED, JUDGED = "decisions", "protected.bin", "judged.bin"
"""Beside the shards, made before those that read them are done."""
RESTS, NGRAMS, COUNTS = "rests.bin", "ngrams.bin", "counts.bin"
"""What a shard leaves."""


def rest_shard(job: Job, writer: ArtifactWriter) -> dict[str, Json]:
    """Write what is left of the documents that are cut."""
    settings = read_section(CleanConfig, job.settings)
    with writer.open(RESTS) as file:
        for document in _left(job, is_cut=True):
            file.write(rest_of(document, settings.min_document_bytes))
    return {}


def protect_shard(job: Job, writer: ArtifactWriter) -> dict[str, Json]:
    """Write the n-grams of the validation documents."""
    config = read_section(CleanConfig, job.settings).decontamination
    with writer.open(NGRAMS) as file:
        for document in _left(job, ["validation"]):
            file.write(ngrams_of(document.text, config.ngram_words))
    return {}


def count_shard(job: Job, writer: ArtifactWriter) -> dict[str, Json]:
    """Write how many training documents hold each of the n-grams that are in any."""
    config = read_section(CleanConfig, job.settings).decontamination
    protected = Protected(job.out.parent / PROTECTED, config.ngram_words)
    counts = DocumentCounts(len(protected))
    for document in _left(job, ["train"]):
        counts.add(protected.find(document.text))
    writer.write_bytes(COUNTS, counts.to_bytes())
    return {}


def write_shard(job: Job, writer: ArtifactWriter) -> dict[str, Json]:
    """Write the documents that stay on the sides asked for; judge those of training."""
    config = read_section(CleanConfig, job.settings).decontamination
    judged = None
    if config.action != "none":
        judged = Protected(job.out.parent / JUDGED, config.ngram_words)
    tally, num_contaminated = Tally(), 0
    shard = _shard(job)
    has_sources = len(RawInput.of(job.inputs).folders) > 1
    sides = cast(list[str], job.shard["sides"])
    with ExitStack() as stack:
        files = {
            side: stack.enter_context(DocumentsWriter(writer, side, has_sources=has_sources))
            for side in sides
        }
        for document in _left(job, sides):
            if judged and document.side == "train" and judged.find(document.text).size:
                num_contaminated += 1
                if config.action == "drop":
                    tally.count("contaminated", "decontamination", 1)
                    if tally.skipped["contaminated"] <= MAX_REJECTED_EXAMPLES:
                        tally.show(*shard.skip(document.number, "contaminated"))
                    continue
            files[document.side].add(document.line, document.source)
            tally.keep(document.side, document.size_bytes)
    return {"tally": tally.to_json(), "contaminated_documents": num_contaminated}


def _left(
    job: Job, sides: Sequence[str] = SPLITS, *, is_cut: bool = False
) -> Iterator[LeftDocument]:
    """Yield what is left of the documents of the shard, and report how far that is."""
    shard = _shard(job)
    decisions = Decisions.read(job.out.parent / DECISIONS, cast(int, job.shard["number"]))
    for document in decisions.left(shard, sides, is_cut=is_cut):
        yield document
        job.report_progress(document.number + 1, len(shard), "documents")


def _shard(job: Job) -> StagedShard:
    return StagedShard(job.out.parent / cast(str, job.shard["staged"]))
