"""Rows of what the data stages need: memory on a corpus far larger than it, and all for a GB."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from data_clean import ALL_ON
from data_stages import Figure, StageRun, run_stage, write_corpus

from llm.artifact import canonical
from llm.config import SourceConfig
from llm.data.sources.fingerprint import fingerprint


def measure_memory(options: argparse.Namespace, folder: Path) -> Iterator[Figure]:
    """Peak memory and time of every data stage, of all its processes together."""
    for name, run in _run_all(options.megabytes, folder):
        yield Figure(
            measure=f"{name}, {options.megabytes:,} MB",
            value=f"{run.peak_mib:.0f} MiB, {run.seconds:.0f} s",
            target="<= 1024 MiB",
        )


def measure_cost(options: argparse.Namespace, folder: Path) -> Iterator[Figure]:
    """What a GB of text takes of cores and disk, stage by stage (docs/scale.md)."""
    gigabytes = options.megabytes / 1000
    for name, run in _run_all(options.megabytes, folder):
        made_bytes = sum(path.stat().st_size for path in run.folder.rglob("*") if path.is_file())
        yield Figure(
            measure=f"{name}, a GB",
            value=f"{run.core_seconds / gigabytes:.1f} core-seconds,"
            f" {made_bytes / gigabytes / 1e9:.2f} GB made,"
            f" {run.peak_disk_bytes / gigabytes / 1e9:.2f} GB at most at work,"
            f" {run.seconds / gigabytes:.1f} s",
        )


def _run_all(megabytes: int, folder: Path) -> Iterator[tuple[str, StageRun]]:
    """Run every data stage on so much text, one after another."""
    path = folder / "corpus.jsonl"
    write_corpus(path, megabytes * 1_000_000)
    source = SourceConfig(kind="files", path=str(path))
    digests = {"source": fingerprint(source, "corpus", None)}
    plain = canonical(source)
    assert isinstance(plain, dict)
    raw = run_stage(folder / "1", "download", plain, {}, role="corpus", input_digests=digests)
    yield "download", raw
    path.unlink()
    at = {"raw": raw.folder}
    yield "clean, all steps on", run_stage(folder / "2", "clean", ALL_ON, at)
    documents = run_stage(folder / "3", "clean", {}, at)
    yield "clean", documents
    at = {"documents": documents.folder}
    tokenizer = run_stage(folder / "4", "train_tokenizer", {"vocab_size": 32_768}, at)
    yield "train_tokenizer, 50 MB of it", tokenizer
    at |= {"tokenizer": tokenizer.folder}
    yield "pack", run_stage(folder / "5", "pack", {"seq_len": 1024}, at)
