"""Peak memory and speed of the data stages on a corpus far larger than memory should have to hold.

    python benchmarks/memory.py --megabytes 500

The corpus is the running Python's standard library repeated, every copy varied so that none is a
duplicate. Each stage runs as in a pipeline, `python -m llm.<stage> JOB.json`; the peak is that of
its process (VmHWM).
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from llm.artifact import canonical
from llm.config import CleanConfig, PackConfig, SourceConfig, TrainTokenizerConfig
from llm.data.sources import fingerprint
from llm.data.stdlib import library_files
from llm.job import Job, write_job


def write_corpus(path: Path, num_bytes: int) -> None:
    """Write about `num_bytes` of JSON lines: library files with numbers varied."""
    texts = [file.read_text(encoding="utf-8", errors="replace") for _, file in library_files()]
    rng = random.Random(1)
    written = 0
    with path.open("w", encoding="utf-8") as lines:
        while written < num_bytes:
            text = rng.choice(texts)[:20_000].replace("1", str(rng.randrange(10**6)))
            written += lines.write(json.dumps({"text": text}) + "\n")


def run_stage(stage: str, settings: object, inputs: Mapping[str, Path], **parts: object) -> Path:
    """Run one stage, print its figures, return its folder."""
    folder = inputs["folder"] / stage
    folder.mkdir()
    job = Job(
        stage=stage,
        settings=canonical(settings),  # type: ignore[arg-type]
        inputs={name: str(path) for name, path in inputs.items() if name != "folder"},
        out=folder / "out",
        work=folder / "work",
        seed=1,
        **parts,  # type: ignore[arg-type]
    )
    write_job(folder / "job.json", job)
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['llm.{stage}', {str(folder / 'job.json')!r}]\n"
        f"runpy.run_module('llm.{stage}', run_name='__main__')\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if 'VmHWM' in line))\n"
    )
    started_at = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    peak_mib = int(done.stdout.split()[-1]) / 1024
    print(f"{stage:<16} {time.monotonic() - started_at:8.1f} s {peak_mib:8.0f} MiB", flush=True)
    return job.out


def main() -> None:
    """Make the corpus and run download to pack over it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--vocab-size", type=int, default=32_768)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "corpus.jsonl", options.megabytes * 1_000_000)
        source = SourceConfig(kind="files", path=str(folder / "corpus.jsonl"))
        digests = {"source": fingerprint(source, "corpus", None)}
        at = {"folder": folder}
        raw = run_stage("download", source, at, role="corpus", input_digests=digests)
        documents = run_stage("clean", CleanConfig(), at | {"raw": raw})
        tokenizer = run_stage(
            "train_tokenizer",
            TrainTokenizerConfig(vocab_size=options.vocab_size),
            at | {"documents": documents},
        )
        run_stage(
            "pack",
            PackConfig(seq_len=1024),
            at | {"documents": documents, "tokenizer": tokenizer},
        )


if __name__ == "__main__":
    main()
