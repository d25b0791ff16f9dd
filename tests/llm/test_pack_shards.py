"""Pack by shards: the same bytes with any number of processes and after kills."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from llm.artifact import Json, read_manifest
from llm.config import RuntimeConfig
from llm.data.documents import SPLITS
from llm.data.packed import HEADER, PackedSequences
from llm.data.permutation import permute
from llm.errors import DataError
from llm.pack import pack
from llm.runtime.job import Job, write_job
from llm.seeds import derive_seed
from tests.llm.conftest import write_lines

MakeDocuments = Callable[..., Path]
RunStage = Callable[..., tuple[Path, Mapping[str, Json]]]

REPOSITORY = Path(__file__).parents[2]
NUM_TRAIN = 203
SECONDS_TO_WAIT = 60.0


@pytest.fixture
def inputs(make_documents: MakeDocuments, tokenizer_folder: Path) -> dict[str, Path]:
    """Documents of some hundred bytes, and a tokenizer."""
    texts = [f"def number_{n}():\n    return {n * n}\n" * (n % 9 + 1) for n in range(NUM_TRAIN + 9)]
    documents = make_documents(texts[:NUM_TRAIN], texts[NUM_TRAIN:])
    return {"documents": documents, "tokenizer": tokenizer_folder}


@pytest.fixture
def settings(inputs: dict[str, Path]) -> dict[str, Json]:
    """Settings that give four training shards."""
    size_bytes = (inputs["documents"] / "train/00000.jsonl").stat().st_size
    return {"seq_len": 256, "packing": "best_fit", "shard_bytes": -(-size_bytes // 4)}


def start(
    folder: Path, settings: Mapping[str, Json], inputs: Mapping[str, Path], workers: int
) -> subprocess.Popen[str]:
    """Start the stage as a process; its artifact and its work folder are in `folder`."""
    folder.mkdir(exist_ok=True)
    job = Job(stage="pack", settings=settings, seed=1, out=folder / "out", work=folder / "work")
    job.inputs = {name: str(path) for name, path in inputs.items()}
    job.runtime = RuntimeConfig(shard_workers=workers)
    write_job(folder / "job.json", job)
    command = [sys.executable, "-m", "llm.pack", str(folder / "job.json")]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def wait_for(is_so: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + SECONDS_TO_WAIT
    while not is_so():
        assert time.monotonic() < give_up_at
        time.sleep(0.005)


def process_of(job_file: Path) -> int:
    """The id of the process that does the job, 0 if there is none."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(job_file) in path.read_text().split("\0"):
                return int(path.parent.name)
        except OSError:  # it ended
            continue
    return 0


def ids_of(path: Path) -> list[str]:
    data = path.read_bytes()[HEADER.size :]
    return [data[place : place + 16].hex() for place in range(0, len(data), 16)]


def test_each_shard_has_consecutive_shuffled_documents(
    inputs: dict[str, Path], settings: dict[str, Json], run_stage: RunStage
) -> None:
    out, summary = run_stage(pack, settings, **inputs)
    lines = (inputs["documents"] / "train/00000.jsonl").read_text().splitlines()
    ids = [json.loads(line)["id"] for line in lines]
    order = permute(np.arange(NUM_TRAIN), NUM_TRAIN, derive_seed(1, "document order", "train"))
    runs = [range(NUM_TRAIN * n // 4, NUM_TRAIN * (n + 1) // 4) for n in range(4)]
    paths = sorted(out.glob("train/*.document_ids.bin"))
    assert [ids_of(path) for path in paths] == [[ids[order[n]] for n in run] for run in runs]
    rows, whole = (
        PackedSequences(out, "train"),
        run_stage(pack, {"seq_len": 256}, out="whole", **inputs)[1],
    )
    assert summary["train_rows"] == rows.num_sequences
    for name in ("documents", "tokens", "bytes"):
        assert summary[f"train_{name}"] == whole[f"train_{name}"]
    assert summary["train_cut_documents"] == 0 < int(str(whole["train_cut_documents"]))
    assert len(list(out.glob("validation/*.tokens.bin"))) == 1


def test_two_processes_give_the_bytes_of_one_also_when_a_worker_is_killed(
    inputs: dict[str, Path], settings: dict[str, Json], run_stage: RunStage, tmp_path: Path
) -> None:
    expected = read_manifest(run_stage(pack, settings, **inputs)[0])
    folder = tmp_path / "two"
    stage = start(folder, settings, inputs, workers=2)
    job_file = folder / "work/shards/train-00002.work/job.json"
    wait_for(lambda: process_of(job_file) != 0)
    os.kill(process_of(job_file), signal.SIGKILL)
    output, _ = stage.communicate(timeout=SECONDS_TO_WAIT)
    assert stage.returncode == 0
    assert [line for line in output.splitlines() if "again" in line] == [
        "the process of shard train-00002 was killed by SIGKILL (which the"
        " kernel sends when memory runs out); it is started again"
    ]
    assert read_manifest(folder / "out").digest == expected.digest


def test_a_restarted_stage_makes_only_missing_and_damaged_shards(
    inputs: dict[str, Path], settings: dict[str, Json], run_stage: RunStage, tmp_path: Path
) -> None:
    expected = read_manifest(run_stage(pack, settings, **inputs)[0])
    folder = tmp_path / "killed"
    shards = folder / "work/shards"

    def finished() -> dict[str, int]:
        return {
            p.parent.name: p.stat().st_mtime_ns for p in sorted(shards.glob("[tv]*/manifest.json"))
        }

    stage = start(folder, settings, inputs, workers=2)
    wait_for(lambda: len(finished()) >= 2)
    stage.kill()
    stage.communicate()
    names = [f"train-{n:05}" for n in range(4)]
    wait_for(lambda: not any(process_of(shards / f"{name}.work/job.json") for name in names))
    before = finished()
    assert 2 <= len(before) < 5 and not (folder / "out/manifest.json").exists()
    damaged = min(before)
    data = bytearray((shards / damaged / "tokens.bin").read_bytes())
    data[-1] ^= 1
    (shards / damaged / "tokens.bin").write_bytes(data)
    again = start(folder, settings, inputs, workers=1)
    again.communicate(timeout=SECONDS_TO_WAIT)
    assert again.returncode == 0
    assert read_manifest(folder / "out").digest == expected.digest
    after = finished()
    assert len(after) == 5 and after[damaged] != before.pop(damaged)
    assert {name: after[name] for name in before} == before


def test_a_mixture_of_many_shards_keeps_its_shares_and_its_caps(
    inputs: dict[str, Path], run_stage: RunStage
) -> None:
    path = inputs["documents"] / "train/00000.jsonl"
    sides = [inputs["documents"] / f"{split}/00000.jsonl" for split in SPLITS]
    lines = {side.parent.name: side.read_text().splitlines() for side in sides}
    write_lines(inputs["documents"], lines, num_sources=3)
    shares: list[Json] = [{"weight": 2}, {"weight": 1}, {"weight": 1, "max_bytes": 8000}]
    packed = {"seq_len": 64, "shares": shares, "shard_bytes": path.stat().st_size // 2}
    out, _ = run_stage(pack, packed, **inputs)
    report = json.loads((out / "pack.json").read_text())["sources"]
    paths = sorted(out.glob("train/*.document_ids.bin"))
    assert len(paths) == 3, "with its second readings a mixture is longer than its sources"
    assert [source["share"] for source in report] == pytest.approx([0.5, 0.25, 0.25], abs=0.04)
    records = [json.loads(line) for line in lines["train"]]
    numbers = {record["id"]: n % 3 for n, record in enumerate(records)}
    times = Counter(name for each in paths for name in ids_of(each))
    used = Counter(numbers[name] for name in times)
    assert [source["distinct_documents"] for source in report] == [used[n] for n in range(3)]
    assert used[2] == 67 - report[2]["unused_documents"] < 67 < 68 == used[0] == used[1]
    given = Counter(numbers[name] for name in times.elements())
    assert [source["documents"] for source in report] == [given[n] for n in range(3)]
    assert PackedSequences(out, "train").info.num_tokens == sum(
        source["tokens"] for source in report
    )
    sizes = {record["id"]: len(record["text"]) for record in records}
    assert sum(sizes[name] for name in times if numbers[name] == 2) <= 8000
    shares[2] = {"weight": 1, "max_tokens": 4}
    with pytest.raises(DataError, match=r"sources\.2: none of its documents is left"):
        run_stage(pack, packed, out="capped", **inputs)
