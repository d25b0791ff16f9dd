"""Corpora to measure on, and stages run on them as a pipeline runs them, watched from outside."""

import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm.artifact import ArtifactWriter, Json, load_artifact
from llm.data.cleaning.passes import ENCODER
from llm.data.documents import (
    SPLITS,
    DocumentShard,
    DocumentsWriter,
    write_documents_json,
)
from llm.data.sources.stdlib import library_files
from llm.runtime.job import Job, write_job

HERE = Path(__file__).parents[1]
SECONDS_BETWEEN_LOOKS = 0.05
SECONDS_BETWEEN_LOOKS_AT_DISK = 1.0
MAX_DOCUMENT_CHARACTERS = 20_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One row of the table."""

    measure: str
    value: str
    target: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageRun:
    """What came of a stage."""

    folder: Path
    seconds: float
    peak_mib: float
    """Of its processes together: proportional set sizes, 20 times a second."""
    core_seconds: float
    """CPU time of its processes together."""
    peak_disk_bytes: int
    """Of its result and what it keeps while at work, once a second."""
    summary: Mapping[str, Any]
    digest: str


def library_texts() -> list[str]:
    """Return the modules of the running Python's standard library."""
    return [path.read_text(encoding="utf-8", errors="replace") for _, path in library_files()]


def varied(texts: Sequence[str], num_bytes: int) -> Iterable[str]:
    """Yield texts drawn again and again until there are about `num_bytes`, their numbers varied so
    that no two are the same.
    """
    rng = random.Random(1)
    while num_bytes > 0:
        text = rng.choice(texts)[:MAX_DOCUMENT_CHARACTERS].replace("1", str(rng.randrange(10**6)))
        num_bytes -= len(text.encode())
        yield text


def write_corpus(path: Path, num_bytes: int) -> None:
    """Write about `num_bytes` of JSON lines: library files with numbers varied."""
    with path.open("w", encoding="utf-8") as lines:
        for text in varied(library_texts(), num_bytes):
            lines.write(json.dumps({"text": text}) + "\n")


def write_documents(folder: Path, texts: Iterable[str]) -> None:
    """Write texts as `clean` does, one of a hundred and the first for validation."""
    writer = ArtifactWriter(folder)
    counts: dict[str, int] = dict.fromkeys(SPLITS, 0)
    with ExitStack() as stack:
        sides = {
            split: stack.enter_context(DocumentsWriter(writer, f"{split}/00000", has_sources=False))
            for split in SPLITS
        }
        for number, text in enumerate(texts):
            record = {"id": random.Random(number).randbytes(16).hex(), "text": text}
            split = "train" if number % 100 else "validation"
            sides[split].add(ENCODER.encode(record).encode() + b"\n", 0)
            counts[split] += 1
    shards = {
        split: [DocumentShard(name="00000", documents=counts[split], bytes=sides[split].num_bytes)]
        for split in SPLITS
    }
    write_documents_json(writer, "text", shards)


def run_stage(
    folder: Path,
    stage: str,
    settings: Mapping[str, Json],
    inputs: Mapping[str, Path],
    *,
    code: Path = HERE,
    environment: Mapping[str, str] | None = None,
    **parts: Any,
) -> StageRun:
    """Run one stage in the new `folder` as a pipeline does; `parts` are other fields of its job."""
    folder.mkdir(parents=True)
    job = Job(
        stage=stage,
        settings=settings,
        inputs={name: str(path) for name, path in inputs.items()},
        out=folder / "out",
        work=folder / "work",
        **({"seed": 1} | parts),
    )
    write_job(folder / "job.json", job)
    with (folder / "log.txt").open("w+") as log:
        used_before = _core_seconds_of_children()
        started_at = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", f"llm.{stage}", str(folder / "job.json")],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=code,
            env=os.environ | (environment or {}),
        )
        peak_mib, peak_disk_bytes, next_disk_at = 0.0, 0, 0.0
        while process.returncode is None:
            peak_mib = max(peak_mib, _memory_mib(process.pid))
            if time.monotonic() > next_disk_at:
                peak_disk_bytes = max(peak_disk_bytes, _disk_bytes(folder))
                next_disk_at = time.monotonic() + SECONDS_BETWEEN_LOOKS_AT_DISK
            with suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_BETWEEN_LOOKS)
        seconds = time.monotonic() - started_at
        log.seek(0)
        assert process.returncode == 0, log.read()
    artifact = load_artifact(job.out)
    return StageRun(
        folder=job.out,
        seconds=seconds,
        peak_mib=peak_mib,
        core_seconds=_core_seconds_of_children() - used_before,
        peak_disk_bytes=max(peak_disk_bytes, _disk_bytes(folder)),
        summary=artifact.summary,
        digest=artifact.digest,
    )


def _core_seconds_of_children() -> float:
    """Return the CPU time of all processes that were started here and have ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _disk_bytes(folder: Path) -> int:
    """Return what the files below `folder` take on disk, a file of several names once."""
    sizes: dict[int, int] = {}
    for place, _, names in os.walk(folder):  # which passes over folders that are gone
        for name in names:
            with suppress(FileNotFoundError):
                status = Path(place, name).lstat()
                sizes[status.st_ino] = status.st_blocks * 512
    return sum(sizes.values())


def _memory_mib(pid: int) -> float:
    """Return the proportional set size of a process and all below it; 0 for one that is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        own_kib = sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        threads = Path(f"/proc/{pid}/task").iterdir()
        children = [
            int(child) for task in threads for child in (task / "children").read_text().split()
        ]
    except (OSError, ValueError):
        return 0
    return own_kib / 1024 + sum(map(_memory_mib, children))
