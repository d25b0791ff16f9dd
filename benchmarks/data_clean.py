"""Benchmarks of cleaning: its speed, and near deduplication against brute force."""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from data_stages import HERE, Figure, StageRun, run_stage, write_corpus

from llm.artifact import ArtifactWriter, Json
from llm.clean import find_near_duplicates
from llm.config import NearDuplicatesConfig, RuntimeConfig
from llm.data.cleaning.minhash import NearDuplicates, Signer, jaccard
from llm.data.cleaning.ngrams import hash_distinct_ngrams
from llm.data.cleaning.staging import Staged, StagedDocument, StagedShard, StagingWriter
from llm.data.raw.records import Location
from llm.data.sources.stdlib import library_files

# C4 and Gopher are rules for prose: their published limits would drop nearly all code, and leave
# later steps nothing to do. So every rule is computed and nearly all texts pass.
FILTERS: dict[str, Json] = {
    "filters": "gopher+c4",
    "c4": {"has_terminal_punctuation": False, "min_words_per_line": 0, "min_sentences": 0,
           "has_no_curly_bracket": False},
    "gopher": {"min_words": 1, "min_mean_word_characters": 1.0, "max_mean_word_characters": 99.0,
               "max_hashes_per_word": 1.0, "min_alphabetic_words_fraction": 0.01,
               "min_stop_words": 1,
               **{f"max_duplicate_{name}_fraction": 0.99 for name in (
                   "lines", "paragraphs", "line_characters", "paragraph_characters",
                   "5gram", "6gram", "7gram", "8gram", "9gram", "10gram")},
               **{f"max_top_{n}gram_fraction": 0.99 for n in (2, 3, 4)}},
}  # fmt: skip
ALL_ON: dict[str, Json] = {
    "line_ends": "lf", "unicode_form": "nfc", "masks_emails": True, "masks_ip_addresses": True,
    **FILTERS, "near_duplicates": {"unit": "document"}, "decontamination": {"action": "drop"},
}  # fmt: skip


def measure_clean(options: argparse.Namespace, folder: Path) -> Iterator[Figure]:
    """Measure the speed of cleaning with all optional steps off, and with each of them."""
    write_corpus(folder / "corpus.jsonl", options.megabytes * 1_000_000)
    raw = _raw(folder)
    variants = [(HERE, 1), (HERE, 2)] + ([(options.baseline, 1)] if options.baseline else [])
    for steps, chosen in (("nothing on", dict[str, Json]()), ("all steps on", ALL_ON)):
        rates: dict[tuple[Path, int], list[float]] = {variant: [] for variant in variants}
        for _ in range(options.repeats):
            for code, num_workers in variants:
                seconds = _run_clean(raw, chosen, code, num_workers).seconds
                rates[code, num_workers].append(options.megabytes / seconds)
        for num_workers in (1, 2):
            found = rates[HERE, num_workers]
            yield Figure(
                measure=f"clean, {steps}, workers: {num_workers}",
                value=f"{np.median(found):.1f} MB/s",
                target=">= 100" if not chosen else "",
            )
            if options.baseline:
                ratio = np.median(np.array(found) / np.array(rates[options.baseline, 1]))
                yield Figure(measure="  of the baseline's speed", value=f"{ratio:.2f}")
    for name, settings in (
        ("NFC, line ends, masks", {key: ALL_ON[key] for key in list(ALL_ON)[:4]}),
        ("gopher", {"filters": "gopher"}),
        ("c4", {"filters": "c4"}),
        ("gopher and c4, nearly all pass", FILTERS),
        ("near duplicates", {"near_duplicates": ALL_ON["near_duplicates"]}),
        ("decontamination", {"decontamination": ALL_ON["decontamination"]}),
    ):
        done = _run_clean(raw, settings, HERE)
        left = f"{done.summary['train_documents']:,} of {done.summary['read_documents']:,} left"
        yield Figure(
            measure=f"clean, {name}", value=f"{options.megabytes / done.seconds:.1f} MB/s, {left}"
        )


def measure_near_duplicates(options: argparse.Namespace, folder: Path) -> Iterator[Figure]:
    """Measure near deduplication: its speed with all I/O, and recall against brute force."""
    texts = _texts_with_near_copies(options.documents)
    config = NearDuplicatesConfig(unit="document")
    started_at = time.monotonic()
    writer, size_bytes = ArtifactWriter(folder / "staged"), 0
    with StagingWriter(writer, has_sources=False) as staging, Signer(writer, config) as signer:
        for number, text in enumerate(texts):
            document = _staged(number, text, is_signed=signer.add(text))
            size_bytes += document.size_bytes
            staging.add(document)
    signed_at = time.monotonic()
    staged = Staged([StagedShard(folder / "staged")])
    drops = np.zeros(len(staged), dtype=np.uint8)
    found = find_near_duplicates(staged, drops, config, lambda *_: None)
    ended_at = time.monotonic()
    yield Figure(
        measure=f"near dedup of {options.documents:,} documents, {size_bytes / 1e6:.0f} MB",
        value=f"{ended_at - started_at:.1f} s ({signed_at - started_at:.1f} s to sign),"
        f" {len(found):,} dropped",
        target="<= 60 s",
    )
    num_pairs, num_found = _recall(list(_texts_with_near_copies(2000)), folder / "recall")
    yield Figure(
        measure=f"recall of {num_pairs:,} pairs at Jaccard 0.8",
        value=f"{num_found / num_pairs:.4f}",
        target=">= 0.95",
    )


def _run_clean(
    raw: Path, settings: Mapping[str, Json], code: Path, num_workers: int = 1
) -> StageRun:
    runtime = RuntimeConfig(shard_workers=num_workers)
    with tempfile.TemporaryDirectory(dir=raw.parent) as name:
        return run_stage(
            Path(name) / "clean", "clean", settings, {"raw": raw}, code=code, runtime=runtime
        )


def _raw(folder: Path) -> Path:
    """Make what `download` leaves of the corpus in `folder`."""
    (folder / "raw/files").mkdir(parents=True)
    (folder / "corpus.jsonl").rename(folder / "raw/files/corpus.jsonl")
    source = {"kind": "files", "content": "text", "text_key": "text", "format": "auto"}
    (folder / "raw/source.json").write_text(json.dumps(source))
    return folder / "raw"


def _texts_with_near_copies(num_texts: int) -> Iterator[str]:
    """Yield texts of about 300 words, three in ten of them a copy of an earlier one with up to
    one word in twelve changed, which leaves 1 to 0.4 of the 5-grams.
    """
    words = " ".join(path.read_text(errors="replace") for _, path in library_files()).split()
    rng = random.Random(1)
    recent: list[list[str]] = []
    for _ in range(num_texts):
        if recent and rng.random() < 0.3:
            text = list(rng.choice(recent))
            for _ in range(rng.randrange(1, max(len(text) // 12, 2))):
                text[rng.randrange(len(text))] = rng.choice(words)
        else:
            text = []
            while len(text) < 300 * (0.5 + rng.random()):
                start = rng.randrange(len(words))
                text += words[start : start + 30]
            recent = [*recent[-999:], text]
        yield " ".join(text)


def _recall(texts: Sequence[str], folder: Path) -> tuple[int, int]:
    """Return how many pairs brute force finds, and how many of them are in one cluster."""
    config = NearDuplicatesConfig(unit="document")
    with Signer(ArtifactWriter(folder), config) as signer:
        taken = [text for text in texts if signer.add(text)]
    with NearDuplicates([folder], config) as near:
        *_, first = near.find(np.arange(len(taken)), taken.__getitem__)
    sets = [hash_distinct_ngrams(text, 5) for text in taken]
    num_pairs = num_found = 0
    for one in range(len(sets)):
        for other in range(one):
            if jaccard(sets[one], sets[other]) >= 0.8:
                num_pairs += 1
                num_found += first[one] == first[other]
    return num_pairs, num_found


def _staged(number: int, text: str, *, is_signed: bool) -> StagedDocument:
    identifier = random.Random(number).randbytes(16)
    line = json.dumps({"id": identifier.hex(), "text": text}).encode() + b"\n"
    return StagedDocument(
        id=identifier,
        content=identifier,
        line=line,
        size_bytes=len(text.encode()),
        is_validation=False,
        is_signed=is_signed,
        location=Location(file="a", line=number, offset_bytes=0),
        record=number,
    )
