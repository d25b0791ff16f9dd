"""Turn raw files into documents with ids, each once, split into train and validation.

A record of text holds it under `text_key`. A chat holds `messages`, each with `role` (system, user,
assistant) and `content`, or else `instruction`, `input` and `output`; `kind` may name what it is.

The steps, in this order, each off unless a setting turns it on or nothing is said of it here:
decode; normalize (off); mask personal data (off); the rules of C4 and Gopher (off); length; exact
duplicates; near duplicates (off); decontamination (off); split. The work is done by shards, each
with the documents of about `clean.shard_bytes` of raw files: up to the length a document is judged
alone, in a first look. What must be known of all, ids and signatures, is compared here. The later
looks, by shards again, write what is left. Texts pass through this process only where two of them
may be nearly the same.

A document's id is the hash of its content, and the hash alone decides its side of the split: adding
data never moves a document from one side to the other. Chats with the same `group` (questions on
the same function, say) stay together: for them the hash of the group decides. Of documents nearly
the same the one of the lowest hash is kept, which is in validation if any of them is. Nothing is
dropped without being counted.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from llm.artifact import ArtifactWriter, Json
from llm.config import CleanConfig, read_section
from llm.data.cleaning.counts import MAX_REJECTED_EXAMPLES, Tally
from llm.data.cleaning.decisions import FATES, Decisions
from llm.data.cleaning.decontaminate import DocumentCounts, merge_ngrams, ngrams_of, write_uncommon
from llm.data.cleaning.deduplicate import REST, compares, find_near_duplicates, judge_rests
from llm.data.cleaning.document_steps import add_changes
from llm.data.cleaning.exact_duplicates import find_repeated
from llm.data.cleaning.input_shards import RawInput
from llm.data.cleaning.map_pass import read_shard
from llm.data.cleaning.staging import Staged, StagedShard
from llm.data.cleaning.write_pass import (
    COUNTS,
    DECISIONS,
    JUDGED,
    NGRAMS,
    PROTECTED,
    RESTS,
    count_shard,
    protect_shard,
    rest_shard,
    write_shard,
)
from llm.data.content import Content
from llm.data.documents import (
    LINES,
    SPLITS,
    SUFFIXES,
    DocumentReader,
    DocumentShard,
    write_documents_json,
)
from llm.data.raw.parsing import MISSING_KEY
from llm.data.raw.record_layouts import expected_layout
from llm.errors import DataError
from llm.runtime.job import Job, run_job
from llm.runtime.shards import FinishedShard, Shard, do_shards

LOOKS = {
    "read": read_shard, "rest": rest_shard, "protect": protect_shard, "count": count_shard,
    "write": write_shard,
}  # fmt: skip


def clean(job: Job, writer: ArtifactWriter) -> dict[str, Json]:
    """Write the documents of the input `raw` to the files of `train` and `validation`.

    Of several sources, `raw_0`, `raw_1` and so on, each document says which one it is from.
    An input `held_out`, documents cleaned before, has a validation side to keep out of training.

    Raises:
        DataError: a side of the split is empty, or a file cannot be read as what its name says.
    """
    settings = read_section(CleanConfig, job.settings)
    raw = RawInput.of(job.inputs)
    tally, summary = Tally(), dict[str, Json]()
    read, staged = _read(job, raw, settings, tally, summary)
    decisions = Decisions.none(len(staged))
    _drop_exact_duplicates(job, staged, decisions, tally)
    if compares(settings, raw.content):
        _drop_near_duplicates(job, staged, decisions, settings, tally, summary)
    decisions.write(job.work / "shards" / DECISIONS, staged)
    if settings.decontamination.action != "none":
        _protect(job, staged, settings)
    shards = _write(job, read, staged, decisions, settings, writer, tally, summary)
    _refuse_empty_side(tally, settings, raw)
    lines = (json.dumps(example, sort_keys=True) + "\n" for example in tally.rejected())
    writer.write_bytes("rejected.jsonl", "".join(lines).encode())
    write_documents_json(writer, raw.content, shards, len(raw.folders))
    return _summary(tally, raw.content) | summary


def clean_shard(job: Job, writer: ArtifactWriter) -> dict[str, Json]:
    """Do one shard of the stage."""
    return LOOKS[cast(str, job.shard["look"])](job, writer)


def _read(
    job: Job, raw: RawInput, settings: CleanConfig, tally: Tally, summary: dict[str, Json]
) -> tuple[list[FinishedShard], Staged]:
    """Have documents staged that pass the steps up to the length, and count the others."""
    parts = raw.plan(settings.shard_bytes)
    shards = [
        _shard("read", number, part.size_bytes, part.to_json()) for number, part in enumerate(parts)
    ]
    finished = do_shards(job, clean_shard, shards, "bytes")
    staged: list[StagedShard] = []
    lines_before = 0
    for number, (part, shard) in enumerate(zip(parts, finished, strict=True)):
        lines_before *= part.goes_on
        found = Tally.from_json(shard.summary["tally"])
        tally.add(found, number, lines_before)
        staged.append(StagedShard(shard.folder, lines_before))
        lines_before += found.num_read  # of a file that is cut each line is a record
        add_changes(summary, cast(dict[str, Json], shard.summary["changes"]))
    return finished, Staged(staged)


def _drop_exact_duplicates(job: Job, staged: Staged, decisions: Decisions, tally: Tally) -> None:
    """Let the first of the documents with the same content stay."""
    is_whole = ~staged.column("is_tail")  # a tail goes with the document it was cut from

    def contents() -> Iterator[npt.NDArray[np.uint64]]:
        start = 0
        for block in staged.columns("content"):
            yield block[is_whole[start : start + len(block)]]
            start += len(block)

    is_repeated = find_repeated(contents(), int(is_whole.sum()), job.work)
    goes = is_repeated[np.cumsum(is_whole) - 1]
    decisions.fates[goes] = FATES.index("duplicate")
    tally.num_read += int((~is_whole & ~goes).sum())
    _count(staged, goes & is_whole, "duplicate", "exact duplicates", tally)


def _drop_near_duplicates(
    job: Job,
    staged: Staged,
    decisions: Decisions,
    settings: CleanConfig,
    tally: Tally,
    summary: dict[str, Json],
) -> None:
    """Let the first of each cluster stay, or what is left of a document without the paragraphs
    that stand elsewhere.
    """
    config = settings.near_duplicates
    cuts = find_near_duplicates(staged, decisions, config, job.report_progress)
    if config.unit == "document":
        decisions.fates[cuts["document"]] = FATES.index("near duplicate")
    else:
        decisions.cuts = cuts
        decisions.write(job.work / "shards" / DECISIONS, staged)
        numbers = np.searchsorted(staged.starts, np.unique(cuts["document"]), side="right") - 1
        rests: list[npt.NDArray[np.void]] = []
        for number, shard in _look_again(job, staged, "rest", np.unique(numbers).tolist()):
            rests.append(np.fromfile(shard.folder / RESTS, dtype=REST))
            rests[-1]["document"] += staged.starts[number]
        judge_rests(staged, decisions, rests, job.work)
        summary["removed_paragraphs"] = len(cuts)
    for fate in ("near duplicate", "duplicate when cut"):
        goes = decisions.fates == FATES.index(fate)
        _count(staged, goes, fate, "near duplicates", tally)


def _protect(job: Job, staged: Staged, settings: CleanConfig) -> None:
    """Collect the n-grams of all that is measured on, and those by which training is judged."""
    config = settings.decontamination
    shared = job.work / "shards"
    other = shared / "other-ngrams.bin"
    with other.open("wb") as file:
        for text in config.texts:
            file.write(ngrams_of(text, config.ngram_words))
        if "held_out" in job.inputs:
            held_out = DocumentReader(Path(job.inputs["held_out"]), "validation")
            for document in held_out.read(range(len(held_out))):
                file.write(ngrams_of("\n".join(document.texts), config.ngram_words))
    numbers = range(len(staged.shards))
    found = [shard.folder / NGRAMS for _, shard in _look_again(job, staged, "protect", numbers)]
    if not config.max_documents:
        merge_ngrams([other, *found], shared / JUDGED)
        return
    counts = DocumentCounts(merge_ngrams([other, *found], shared / PROTECTED))
    for _, shard in _look_again(job, staged, "count", numbers):
        counts.add_bytes((shard.folder / COUNTS).read_bytes())
    write_uncommon(shared / PROTECTED, counts, config.max_documents, shared / JUDGED)


def _write(
    job: Job,
    read: Sequence[FinishedShard],
    staged: Staged,
    decisions: Decisions,
    settings: CleanConfig,
    writer: ArtifactWriter,
    tally: Tally,
    summary: dict[str, Json],
) -> dict[str, list[DocumentShard]]:
    """Write the sides of each shard from which something goes; those that stay as they are staged
    are taken as they are.
    """
    is_judging = settings.decontamination.action != "none"
    sides: dict[int, list[str]] = {}
    for number, shard in enumerate(staged.shards):
        changed = decisions.part(staged, number).changed_sides(shard)
        if is_judging and len(shard):
            changed.add("train")
        if changed:
            sides[number] = sorted(changed)
    written = dict(_look_again(job, staged, "write", list(sides), sides))
    found: dict[str, list[DocumentShard]] = {side: [] for side in SPLITS}
    for number, shard in enumerate(read):
        for side in SPLITS:
            from_shard = written[number] if side in sides.get(number, []) else shard
            _adopt(from_shard, side, f"{number:05}", writer, tally, found[side])
    for number, shard in written.items():
        lines_before = staged.shards[number].lines_before
        tally.add(Tally.from_json(shard.summary["tally"]), number, lines_before)
    if is_judging:
        counts = (shard.summary["contaminated_documents"] for shard in written.values())
        summary["contaminated_documents"] = sum(cast(Iterator[int], counts))
    return found


def _adopt(
    shard: FinishedShard,
    side: str,
    name: str,
    writer: ArtifactWriter,
    tally: Tally,
    found: list[DocumentShard],
) -> None:
    """Make the documents of a shard on one side the files `name` of that side, if there are any."""
    kept = Tally.from_json(shard.summary["tally"])
    if not kept.num_kept[side]:
        return
    sizes = {record.path: record.size_bytes for record in shard.files}
    suffixes = [suffix for suffix in SUFFIXES if side + suffix in sizes]
    shard.adopt(writer, {side + suffix: f"{side}/{name}{suffix}" for suffix in suffixes})
    tally.keep(side, kept.kept_bytes[side], kept.num_kept[side])
    found.append(DocumentShard(name=name, documents=kept.num_kept[side], bytes=sizes[side + LINES]))


def _look_again(
    job: Job,
    staged: Staged,
    look: str,
    numbers: Iterable[int],
    sides: Mapping[int, list[str]] | None = None,
) -> Iterator[tuple[int, FinishedShard]]:
    """Have another look at some of the staged shards; yield what came of each."""
    numbers = [number for number in numbers if len(staged.shards[number])]
    shards: list[Shard] = []
    for number in numbers:
        shard = staged.shards[number]
        more: dict[str, Json] = {} if sides is None else {"sides": cast(Json, sides[number])}
        settings = {"number": number, "staged": shard.folder.name, **more}
        shards.append(_shard(look, number, len(shard), settings))
    yield from zip(numbers, do_shards(job, clean_shard, shards, "documents"), strict=True)


def _shard(look: str, number: int, size: int, settings: Mapping[str, Json]) -> Shard:
    return Shard(name=f"{look}-{number:05}", size=size, settings={"look": look, **settings})


def _count(
    staged: Staged, goes: npt.NDArray[np.bool_], reason: str, step: str, tally: Tally
) -> None:
    """Count the documents that go, and show the first."""
    numbers = np.flatnonzero(goes)
    tally.count(reason, step, len(numbers))
    for number in numbers[:MAX_REJECTED_EXAMPLES].tolist():
        shard, place = staged.locate(number)
        skip, record = staged.shards[shard].skip(place, reason)
        tally.show(skip, record, shard)


def _refuse_empty_side(tally: Tally, settings: CleanConfig, raw: RawInput) -> None:
    if tally.num_kept["train"] and tally.num_kept["validation"]:
        return
    counts = [f"{count} {reason}" for reason, count in sorted(tally.skipped.items())]
    examples = tally.rejected()
    first = [f"the first in {example['file']} line {example['line']}" for example in examples[:1]]
    found = (
        f"of {tally.num_read} documents {tally.num_kept.total()} are left"
        f" (skipped: {', '.join(counts + first) or 'none'})"
    )
    if not tally.num_kept.total() and examples and examples[0]["reason"] == MISSING_KEY:
        keys = str(examples[0]["excerpt"]).partition(": {")[0]
        raise DataError(
            f"{found}; found {keys}; {expected_layout(raw.content, raw.text_key(), raw.setting())}"
        )
    side = "train" if tally.num_kept["validation"] else "validation"
    raise DataError(
        f"{found}, and none of them fell to {side};"
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
    run_job(clean, clean_shard)
