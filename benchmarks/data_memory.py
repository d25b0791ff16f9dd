"""The row of memory: what the data stages need on a corpus far larger than memory."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from data_clean import ALL_ON
from data_stages import Figure, StageRun, run_stage, write_corpus

from llm.artifact import canonical
from llm.config import SourceConfig
from llm.data.sources import fingerprint


def measure_memory(options: argparse.Namespace, folder: Path) -> Iterator[Figure]:
    """Peak memory and time of every data stage, of all its processes together."""
    path = folder / "corpus.jsonl"
    write_corpus(path, options.megabytes * 1_000_000)
    source = SourceConfig(kind="files", path=str(path))
    digests = {"source": fingerprint(source, "corpus", None)}
    plain = canonical(source)
    assert isinstance(plain, dict)
    raw = run_stage(folder / "1", "download", plain, {}, role="corpus", input_digests=digests)
    yield _figure("download", options.megabytes, raw)
    path.unlink()
    at = {"raw": raw.folder}
    yield _figure(
        "clean, all steps on", options.megabytes, run_stage(folder / "2", "clean", ALL_ON, at)
    )
    documents = run_stage(folder / "3", "clean", {}, at)
    yield _figure("clean", options.megabytes, documents)
    at = {"documents": documents.folder}
    tokenizer = run_stage(folder / "4", "train_tokenizer", {"vocab_size": 32_768}, at)
    yield _figure("train_tokenizer, 50 MB of it", options.megabytes, tokenizer)
    at |= {"tokenizer": tokenizer.folder}
    yield _figure("pack", options.megabytes, run_stage(folder / "5", "pack", {"seq_len": 1024}, at))


def _figure(name: str, megabytes: int, run: StageRun) -> Figure:
    return Figure(
        measure=f"{name}, {megabytes:,} MB",
        value=f"{run.peak_mib:.0f} MiB, {run.seconds:.0f} s",
        target="<= 1024 MiB",
    )
