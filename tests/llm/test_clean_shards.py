"""Cleaning by shards: the same documents and counts for any division, workers and kills."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm.artifact import Json, read_manifest
from llm.errors import DataError
from llm.runtime.job import EXIT_INTERRUPTED, Job, is_finished, write_job
from tests.llm.cleaning import TEXTS, corpus, jsonl, lines_of, make_job, run_clean
from tests.llm.test_passes import EVERYTHING, near_copies, sentences

pytest.importorskip("rensa", reason="needs the library that signs texts")
ROOT = Path(__file__).parents[2]


def everything(shard_bytes: int) -> dict[str, Json]:
    near: Json = {"unit": "document", "min_words": 8}
    decontamination: Json = {"action": "drop", "ngram_words": 4}
    return EVERYTHING | {
        "near_duplicates": near, "decontamination": decontamination, "shard_bytes": shard_bytes,
    }  # fmt: skip


def texts_for_all_steps() -> list[str]:
    """Return texts such that each step drops some, in several shards of one file."""
    texts = [sentences(number) for number in range(60)]
    texts += [f"{sentences(300 + n)}\n\n{sentences(number)}" for n, number in enumerate(range(9))]
    texts += [*near_copies(500, 4), "x", texts[0], "so {short}", "Two a@b.de", *texts[20:23]]
    texts += [f"{sentences(700 + n)} {texts[n]}" for n in range(12)]
    return random.Random(1).sample(texts, len(texts))


def files_of(texts: list[str]) -> dict[str, bytes]:
    return {"a.jsonl": corpus(texts)[:-1] + b"\n{\n\xff\n", "b.txt": b"Words of a text. " * 9}


def test_one_digest_whatever_the_number_of_workers(tmp_path: Path) -> None:
    files, chosen = files_of(texts_for_all_steps()), everything(12_000)
    here = run_clean(tmp_path / "1", files, **chosen)
    there = run_clean(tmp_path / "2", files, num_workers=2, **chosen)
    assert here == there
    shards = tmp_path / "2/work/shards"
    assert all(len(list(shards.glob(f"{name}-*/manifest.json"))) > 1 for name in ("map", "write"))
    assert (shards / "map-00001.work/job.json").is_file(), "a process of its own did it"
    assert {"duplicate", "near duplicate", "contaminated"} <= set(here[0]["skipped"])  # type: ignore[arg-type]


RECORDS = st.lists(
    st.sampled_from([
        *(sentences(number, 12) for number in range(4)), *near_copies(500, 3), "", "x", "a@b.de",
        f"{sentences(9)}\n\n{sentences(1, 12)}", "one\r\ntwo",
    ]) | st.text(max_size=30), max_size=25,
)  # fmt: skip


@given(RECORDS, st.integers(400, 3000), st.sampled_from(["hash", "tail"]))
@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
def test_documents_counts_and_examples_equal_those_of_one_shard(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    shard_bytes: int,
    split: str,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    texts = [*(sentences(1000 + number, 14) for number in range(20)), *texts]
    files = {"a.jsonl": corpus(texts) + b"{\n", "b.json": json.dumps(
        [{"text": text} for text in texts[::2]]).encode()}  # fmt: skip
    whole = run_clean(folder / "1", files, **everything(1 << 20), split=split)
    cut = run_clean(folder / "2", files, **everything(shard_bytes), split=split)
    assert whole[:2] == cut[:2]


@given(st.lists(st.integers(0, 200), max_size=6).map(sorted))
@settings(max_examples=5)
def test_documents_lie_in_the_same_order_however_they_lay_in_files(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("layout")
    lines = corpus(TEXTS).splitlines(keepends=True)
    ends = zip([0, *cuts], [*cuts, len(lines)], strict=True)
    files = {f"{n}.jsonl": b"".join(lines[start:end]) for n, (start, end) in enumerate(ends)}
    summary, outputs, _ = run_clean(folder / "many", files, shard_bytes=3000)
    one_summary, one, _ = run_clean(folder / "one", {"a.jsonl": corpus(TEXTS)})
    assert summary == one_summary and outputs == one


def test_lines_are_counted_through_a_file_that_is_cut(tmp_path: Path) -> None:
    lines = corpus(TEXTS).splitlines(keepends=True)
    bad = list(range(5, 200, 12))
    for number in bad:
        lines[number] = b'{"text": 3, "more": "%s"}\n' % (b"x" * number * 9)
    copies, expected = [50, 150], [number + 1 for number in bad]
    for number in copies:
        lines[number] = lines[3]
    files = {"a.jsonl": b"".join(lines), "b.jsonl": b"{\n", "c.jsonl": b"".join(lines[:100])}
    summary, outputs, _ = run_clean(tmp_path, files, shard_bytes=2000)
    assert len(list((tmp_path / "work/shards").glob("map-*/manifest.json"))) > 8
    found = {
        (name, reason): [
            example["line"] for example in outputs["rejected"]
            if (example["file"], example["reason"]) == (name, reason)
        ]
        for name in files for reason in ("wrong type", "duplicate", "malformed JSON")
    }  # fmt: skip
    assert found["a.jsonl", "wrong type"] == expected
    assert found["a.jsonl", "duplicate"] == [number + 1 for number in copies]
    assert found["b.jsonl", "malformed JSON"] == [1]
    left = [number for number in range(100) if number not in bad]
    assert found["c.jsonl", "duplicate"] == [number + 1 for number in left[:18]]
    assert summary["skipped"] == {
        "duplicate": 2 + len(left), "malformed JSON": 1, "wrong type": len(bad) + 8,
    }  # fmt: skip


@pytest.mark.parametrize("shard_bytes", [3000, 1 << 20])
def test_an_error_names_the_line_of_the_file_not_of_the_shard(
    tmp_path: Path, shard_bytes: int
) -> None:
    files = {"a.jsonl": corpus(TEXTS) + b'{"text": "\xff"}\n' + corpus(TEXTS)}
    with pytest.raises(DataError, match=r"a\.jsonl: byte \d+ \(line 201\)"):
        run_clean(tmp_path, files, decode_errors="strict", shard_bytes=shard_bytes)


@pytest.mark.parametrize("shard_bytes", [500, 10_000])
def test_a_line_longer_than_shards_is_one_document(tmp_path: Path, shard_bytes: int) -> None:
    texts = [*TEXTS[:20], "long " * 4000, *TEXTS[20:50]]
    files = {"a.jsonl": b"\xef\xbb\xbf" + corpus(texts)[:-1]}  # the last line has no end
    summary, outputs, _ = run_clean(tmp_path, files, shard_bytes=shard_bytes)
    found = [document["text"] for side in ("train", "validation") for document in outputs[side]]
    assert sorted(map(str, found)) == sorted(texts) and summary["skipped"] == {}


def test_a_side_from_which_nothing_goes_is_not_written_again(tmp_path: Path) -> None:
    run_clean(tmp_path, {"a.jsonl": corpus(TEXTS)}, shard_bytes=3000)
    shards = tmp_path / "work/shards"
    assert not list(shards.glob("write-*"))
    staged, files = shards / "map-00001/train.jsonl", tmp_path / "out/train/00001.jsonl"
    assert staged.stat().st_ino == files.stat().st_ino


def start(job: Job, folder: Path) -> subprocess.Popen[bytes]:
    write_job(folder / "job.json", job)
    return subprocess.Popen(
        [sys.executable, "-m", "llm.clean", str(folder / "job.json")], cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def wait_for(folder: Path, pattern: str) -> Path:
    deadline = time.monotonic() + 60
    while not (found := sorted(folder.glob(pattern))):
        assert time.monotonic() < deadline, f"no {pattern}"
        time.sleep(0.005)
    return found[0]


def inodes(shards: Path) -> Mapping[str, int]:
    return {path.parent.name: path.stat().st_ino for path in shards.glob("*-*/manifest.json")}


def child_of(process: subprocess.Popen[bytes]) -> int:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    while not (children := path.read_text().split()):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return int(children[0])


def test_after_a_kill_of_a_worker_or_the_stage_the_rest_is_done_and_the_digest_the_same(
    tmp_path: Path,
) -> None:
    files = files_of(texts_for_all_steps())
    chosen = everything(12_000)
    expected = run_clean(tmp_path / "whole", files, **chosen)[2]
    job = make_job(tmp_path, files, num_workers=2, **chosen)
    shards = job.work / "shards"
    process = start(job, tmp_path)
    os.kill(child_of(process), signal.SIGKILL)  # its shard is done again
    wait_for(shards, "drops-*.bin")
    process.kill()
    assert process.wait() == -signal.SIGKILL and not is_finished(job.out)
    time.sleep(0.5)  # its workers end with it
    done = inodes(shards)
    assert {name for name in done if name.startswith("map")} and "write-00000" not in done
    process = start(job, tmp_path)
    assert process.wait(120) == 0
    assert read_manifest(job.out).digest == expected
    assert {name: inodes(shards)[name] for name in done} == done, "nothing is done twice"


def test_a_stage_asked_to_stop_stops_and_goes_on_later(tmp_path: Path) -> None:
    files = files_of(texts_for_all_steps())
    job = make_job(tmp_path, files, num_workers=2, shard_bytes=12_000)
    process = start(job, tmp_path)
    child_of(process)
    process.terminate()
    assert process.wait(60) == EXIT_INTERRUPTED
    process = start(job, tmp_path)
    assert process.wait(60) == 0
    (tmp_path / "again").mkdir()
    assert (
        read_manifest(job.out).digest == run_clean(tmp_path / "again", files, shard_bytes=12_000)[2]
    )


def test_chats_of_many_shards_are_kept_with_their_sources(tmp_path: Path) -> None:
    chats: list[Json] = [{"instruction": text, "output": "Yes."} for text in TEXTS]
    _, outputs, _ = run_clean(tmp_path, {"a.jsonl": jsonl(chats)}, "chats", shard_bytes=4000)
    assert len(outputs["train"] + outputs["validation"]) == len(TEXTS)
    assert len(lines_of(tmp_path / "out", "train")) > 150
