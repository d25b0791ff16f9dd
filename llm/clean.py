"""Turn raw files into documents with ids, without duplicates, split into train and validation.

A map pass over shards judges each document alone, one global decision drops duplicates, and a write
pass over shards writes the documents that are kept.

Steps run in this order; those marked (off) run only when enabled: decode; normalize (off); mask
personal data (off); rules of C4 and Gopher (off); length; exact duplicates; near duplicates (off);
decontamination (off); split. A shard is about `clean.shard_bytes` of raw files. The global decision
reads ids and signatures of all documents; it reads texts only to compare candidates.

A text record holds its text under `text_key`. Chats and preference pairs are in one of the formats
of llm/data/raw/record_formats.py; their turns follow the policy of llm/data/raw/conversations.py.

A document's id is the hash of its content, which alone decides its side of the split: more data
never moves a document to the other side. Chats and pairs with the same `group` (questions on one
function, say) stay together: for them the hash of the group decides; for other pairs, that of the
prompt. Of near duplicates the one of lowest
hash is kept, one in validation before one in training. Every dropped document is counted.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from llm.artifact import ArtifactWriter, Json, write_bytes_atomically
from llm.config import CleanConfig, NearDuplicatesConfig, read_section
from llm.data.cleaning.decontaminate import (
    NGRAM_BYTES,
    NGRAMS,
    PROTECTED,
    ngrams_of,
    write_protected,
)
from llm.data.cleaning.input_shards import RawInput
from llm.data.cleaning.minhash import NearDuplicates
from llm.data.cleaning.passes import DROPS, add_changes, map_pass, write_pass
from llm.data.cleaning.staging import DROP_REASONS, Drops, Staged, StagedShard
from llm.data.cleaning.stats import MAX_REJECTED_EXAMPLES, CleaningStats
from llm.data.content import Content
from llm.data.documents import (
    LINES,
    SPLITS,
    SUFFIXES,
    DocumentReader,
    DocumentShard,
    write_documents_json,
)
from llm.data.open_files import OpenFiles
from llm.data.raw.first_records import expected_format
from llm.data.raw.record_formats import MISSING_KEY
from llm.errors import DataError
from llm.runtime.job import Job, run_job
from llm.runtime.shards import FinishedShard, Shard, do_shards


def clean(job: Job, writer: ArtifactWriter) -> dict[str, Json]:
    """Write the documents of the input `raw` to `train/` and `validation/`.

    With several sources, `raw_0`, `raw_1` and so on, each document carries its source. The
    validation side of an input `held_out`, documents cleaned before, is kept out of training.

    Raises:
        DataError: a side of the split is empty, or a file cannot be read.
    """
    settings = read_section(CleanConfig, job.settings)
    raw = RawInput.of(job.inputs)
    stats, summary = CleaningStats(), dict[str, Json]()
    mapped, staged = _map(job, raw, settings, stats, summary)
    drops = _decide(job, staged, settings, stats)
    shards = _write(job, mapped, staged, drops, settings, writer, stats, summary)
    _refuse_empty_side(stats, settings, raw, job)
    lines = (json.dumps(example, sort_keys=True) + "\n" for example in stats.rejected())
    writer.write_bytes("rejected.jsonl", "".join(lines).encode())
    write_documents_json(writer, raw.content, shards, len(raw.folders))
    return _summary(stats, raw.content) | summary


def clean_shard(job: Job, writer: ArtifactWriter) -> dict[str, Json]:
    """Run one shard of a pass."""
    return {"map": map_pass, "write": write_pass}[cast(str, job.shard["pass"])](job, writer)


def find_near_duplicates(
    staged: Staged,
    drops: Drops,
    config: NearDuplicatesConfig,
    report: Callable[[int, int, str], None],
) -> npt.NDArray[np.int64]:
    """Return the documents that are nearly the same as one of higher precedence, (found,)."""
    signed = np.flatnonzero(staged.column("is_signed"))  # the document of each signature
    order = np.flatnonzero(drops[signed] == 0)
    order = order[np.argsort(staged.ranks()[signed[order]], kind="stable")]
    is_near_duplicate = np.zeros(len(order), dtype=np.bool_)
    folders = [shard.folder for shard in staged.shards]
    with OpenFiles() as files, NearDuplicates(folders, config) as near:
        bands = near.find(order, lambda number: staged.text(int(signed[number]), files))
        for band, first in enumerate(bands, start=1):
            report(band, near.num_bands, "bands")
            is_near_duplicate = first != np.arange(len(first))
    return signed[order[is_near_duplicate]]


def _map(
    job: Job, raw: RawInput, settings: CleanConfig, stats: CleaningStats, summary: dict[str, Json]
) -> tuple[list[FinishedShard], Staged]:
    """Run the map pass: stage the documents that pass every step on single documents."""
    parts = raw.plan(settings.shard_bytes)
    shards = [
        _shard("map", number, part.size_bytes, part.to_json()) for number, part in enumerate(parts)
    ]
    finished = do_shards(job, clean_shard, shards, "bytes")
    staged: list[StagedShard] = []
    lines_before = 0
    for number, (part, shard) in enumerate(zip(parts, finished, strict=True)):
        if not part.start_bytes:  # else it continues the file of the shard before
            lines_before = 0
        found = CleaningStats.from_json(shard.summary["stats"])
        stats.add(found, number, lines_before)
        staged.append(StagedShard(shard.folder, lines_before))
        lines_before += found.num_read  # in a file that is cut each line is a record
        add_changes(summary, cast(dict[str, Json], shard.summary["changes"]))
    return finished, Staged(staged)


def _decide(job: Job, staged: Staged, settings: CleanConfig, stats: CleaningStats) -> Drops:
    """Decide which documents are dropped, and write that for each shard beside the shards."""
    drops = np.zeros(len(staged), dtype=np.uint8)
    drops[staged.find_duplicates(job.work)] = DROP_REASONS.index("duplicate")
    is_tail = staged.column("is_tail")  # a document and its tail, dropped together, count as one
    stats.num_read += int((is_tail & (drops == 0)).sum())
    _count_dropped(staged, (drops != 0) & ~is_tail, "duplicate", "exact duplicates", stats)
    if settings.near_duplicates.unit != "none":
        found = find_near_duplicates(staged, drops, settings.near_duplicates, job.report_progress)
        drops[found] = reason = DROP_REASONS.index("near duplicate")
        _count_dropped(staged, drops == reason, "near duplicate", "near duplicates", stats)
    folder = job.work / "shards"
    for number in range(len(staged.shards)):
        data = staged.part(drops, number).tobytes()
        write_bytes_atomically(folder / DROPS.format(number), data, is_durable=False)
    if settings.decontamination.action != "none":
        _protect(job, staged, drops, settings, folder / PROTECTED)
    return drops


def _count_dropped(
    staged: Staged, is_dropped: npt.NDArray[np.bool_], reason: str, step: str, stats: CleaningStats
) -> None:
    """Count dropped documents, and keep the first as examples."""
    numbers = np.flatnonzero(is_dropped)
    stats.count(reason, step, len(numbers))
    with OpenFiles() as files:
        for number in numbers[:MAX_REJECTED_EXAMPLES].tolist():
            document = staged.document(number, files)
            stats.add_example(document.skip(reason), document.record, staged.locate(number)[0])


def _protect(job: Job, staged: Staged, drops: Drops, settings: CleanConfig, path: Path) -> None:
    """Write the n-grams of all evaluation data: validation, held-out documents, `texts`."""
    num_words = settings.decontamination.ngram_words
    other = path.with_name("other-ngrams.bin")
    with other.open("wb") as file:
        for text in settings.decontamination.texts:
            file.write(ngrams_of(text, num_words))
        if "held_out" in job.inputs:
            held_out = DocumentReader(Path(job.inputs["held_out"]), "validation")
            for document in held_out.read(range(len(held_out))):
                file.write(ngrams_of("\n".join(document.texts), num_words))
    counts = staged.column("num_ngrams")

    def parts() -> Iterator[npt.NDArray[np.uint64]]:
        yield np.fromfile(other, dtype="<u8")
        for number, shard in enumerate(staged.shards):
            is_kept = staged.part(drops, number) == 0
            ngrams = np.fromfile(shard.folder / NGRAMS, dtype="<u8")
            yield ngrams[np.repeat(is_kept, staged.part(counts, number))]

    num_ngrams = other.stat().st_size // NGRAM_BYTES + int(counts[drops == 0].sum())
    write_protected(parts(), num_ngrams, path)


def _write(
    job: Job,
    mapped: Sequence[FinishedShard],
    staged: Staged,
    drops: Drops,
    settings: CleanConfig,
    writer: ArtifactWriter,
    stats: CleaningStats,
    summary: dict[str, Json],
) -> dict[str, list[DocumentShard]]:
    """Run the write pass; sides of which all documents are kept are taken as staged."""
    is_judging = settings.decontamination.action != "none"
    sides: dict[int, list[str]] = {}
    for number, shard in enumerate(staged.shards):
        changed = shard.changed_sides(staged.part(drops, number))
        if is_judging and len(shard):
            changed.add("train")
        if changed:
            sides[number] = sorted(changed)
    shards: list[Shard] = []
    for number in sides:
        shard = staged.shards[number]
        chosen = {"number": number, "staged": shard.folder.name, "sides": cast(Json, sides[number])}
        shards.append(_shard("write", number, len(shard), chosen))
    written = dict(zip(sides, do_shards(job, clean_shard, shards, "documents"), strict=True))
    found: dict[str, list[DocumentShard]] = {side: [] for side in SPLITS}
    for number, shard in enumerate(mapped):
        for side in SPLITS:
            last = written[number] if side in sides.get(number, []) else shard
            _adopt(last, side, f"{number:05}", writer, stats, found[side])
    for number, shard in written.items():
        lines_before = staged.shards[number].lines_before
        stats.add(CleaningStats.from_json(shard.summary["stats"]), number, lines_before)
    if is_judging:
        counts = (shard.summary["contaminated_documents"] for shard in written.values())
        summary["contaminated_documents"] = sum(cast(Iterator[int], counts))
    return found


def _adopt(
    shard: FinishedShard,
    side: str,
    name: str,
    writer: ArtifactWriter,
    stats: CleaningStats,
    found: list[DocumentShard],
) -> None:
    """Make a shard's documents on one side the files `name` of that side, if there are any."""
    kept = CleaningStats.from_json(shard.summary["stats"])
    if not kept.num_kept[side]:
        return
    sizes = {record.path: record.size_bytes for record in shard.files}
    suffixes = [suffix for suffix in SUFFIXES if side + suffix in sizes]
    shard.adopt(writer, {side + suffix: f"{side}/{name}{suffix}" for suffix in suffixes})
    stats.keep(side, kept.kept_bytes[side], kept.num_kept[side])
    found.append(DocumentShard(name=name, documents=kept.num_kept[side], bytes=sizes[side + LINES]))


def _shard(name: str, number: int, size: int, settings: Mapping[str, Json]) -> Shard:
    return Shard(name=f"{name}-{number:05}", size=size, settings={"pass": name, **settings})


def _refuse_empty_side(
    stats: CleaningStats, settings: CleanConfig, raw: RawInput, job: Job
) -> None:
    if stats.num_kept["train"] and stats.num_kept["validation"]:
        return
    counts = [f"{count} {reason}" for reason, count in sorted(stats.skipped.items())]
    examples = stats.rejected()
    first = [f"the first in {example['file']} line {example['line']}" for example in examples[:1]]
    found = (
        f"of {stats.num_read} documents {stats.num_kept.total()} are left"
        f" (skipped: {', '.join(counts + first) or 'none'})"
    )
    if not stats.num_kept.total() and examples and examples[0]["reason"] == MISSING_KEY:
        keys = str(examples[0]["excerpt"]).partition(": {")[0]
        expected = expected_format(raw.read_options(0, job.role, settings, job.work))
        raise DataError(f"{found}; found {keys}; {expected}")
    side = "train" if stats.num_kept["validation"] else "validation"
    raise DataError(
        f"{found}, and none of them is in {side}; add data, change clean.validation_fraction"
        f" ({settings.validation_fraction:g}), or lower clean.text_document_bytes"
        f" ({settings.text_document_bytes}), which cuts text files into more documents"
    )


def _summary(stats: CleaningStats, content: Content) -> dict[str, Json]:
    return {
        "content": content,
        "read_documents": stats.num_read,
        "train_documents": stats.num_kept["train"],
        "validation_documents": stats.num_kept["validation"],
        "train_bytes": stats.kept_bytes["train"],
        "validation_bytes": stats.kept_bytes["validation"],
        "skipped": dict(sorted(stats.skipped.items())),
        "num_decode_errors": stats.num_decode_errors,
        "funnel": stats.funnel(),
    }


if __name__ == "__main__":
    run_job(clean, clean_shard)
