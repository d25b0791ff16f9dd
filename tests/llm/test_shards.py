"""Shards of a stage: each is done once, by whatever process, and a kill costs one of them."""

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from llm.artifact import ArtifactWriter, Json
from llm.config import RuntimeConfig
from llm.errors import (
    ArtifactError,
    ConfigError,
    DataError,
    DiskFullError,
    Interrupted,
    StageError,
)
from llm.runtime import job as job_module
from llm.runtime import shards as shards_module
from llm.runtime.job import Job, is_finished, make_shard
from llm.runtime.shards import FinishedShard, Shard, do_shards, read_wanted, shard_work

SHARDS = [Shard(name=f"part-{k}", settings={"part": k}, size=10 + k) for k in range(5)]
TOTAL = sum(shard.size for shard in SHARDS)
# Each shard writes its number, and a line of who did it; `{body}` may do more before.
STAGE = """
import os, signal, sys, time
from pathlib import Path
from llm.errors import *
from llm.runtime.job import run_job

def part(job, writer):
    k = job.shard["part"]
    mark = job.work / "began"
    is_first = not mark.exists()
    mark.touch()
    (job.work / "pid").write_text(str(os.getpid()))
    {body}
    for done in range(4):
        job.report_progress(done, 4, "lines")
        time.sleep(0.01)
    writer.write_bytes("number.txt", f"{{k}}\\n".encode() * 100)
    with (job.work.parent / "done.txt").open("a") as file:
        file.write(f"{{k}}\\n")
    return {{"part": k}}

def clean(job, writer):
    from llm.runtime.shards import Shard, do_shards
    names = {names}
    do_shards(job, part, [Shard(name=f"part-{{k}}", settings={{"part": k}}, size=1)
                          for k in range(names)], "parts")
    return {{}}

if __name__ == "__main__":
    run_job(clean, part)
"""


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Put a stage of this file's making in place of `python -m llm.clean`; return its script."""

    def make(body: str = "") -> Path:
        script = tmp_path / "stage.py"
        indented = textwrap.indent(textwrap.dedent(body), "    ").strip() or "pass"
        script.write_text(STAGE.format(body=indented, names=len(SHARDS)))
        monkeypatch.setattr(
            shards_module, "command", lambda stage, path: [sys.executable, str(script), str(path)]
        )
        return script

    return make


def a_job(folder: Path, **runtime: object) -> Job:
    """A stage's job, whose shards two processes do where nothing else is said."""
    work = folder / "work"
    work.mkdir(exist_ok=True)
    settings = {"shard_workers": 2, **runtime}
    return Job(stage="clean", settings={}, runtime=RuntimeConfig(**settings), work=work)  # type: ignore[arg-type]


def part(job: Job, writer: ArtifactWriter) -> Mapping[str, Json]:
    """Do what the script's shards do, in this process."""
    k = job.shard["part"]
    for done in range(4):
        job.report_progress(done, 4, "lines")
    writer.write_bytes("number.txt", f"{k}\n".encode() * 100)
    return {"part": k}


def never(job: Job, writer: ArtifactWriter) -> Mapping[str, Json]:
    """Be no shard that this process does."""
    raise AssertionError("done in this process")


def digests(finished: list[FinishedShard]) -> list[str]:
    """The bytes of each."""
    return [record.sha256 for shard in finished for record in shard.files]


def done_by_processes(job: Job) -> list[int]:
    """The parts that were finished by the script's processes, each time one was."""
    path = job.work / "shards" / "done.txt"
    return sorted(int(line) for line in path.read_text().split()) if path.exists() else []


def test_processes_give_the_bytes_that_one_process_gives_in_the_order_of_the_shards(
    stage: Callable[..., Path], tmp_path: Path
) -> None:
    stage()
    (tmp_path / "one").mkdir()
    alone = do_shards(a_job(tmp_path / "one", shard_workers=1), part, SHARDS, "lines")
    several = do_shards(a_job(tmp_path), never, SHARDS, "lines")
    assert digests(several) == digests(alone)
    assert [shard.summary["part"] for shard in several] == [0, 1, 2, 3, 4]


def test_one_shard_is_done_in_the_process_of_the_stage(tmp_path: Path) -> None:
    (finished,) = do_shards(a_job(tmp_path), part, SHARDS[:1], "lines")
    assert finished.summary == {"part": 0}


def test_finished_shards_become_files_of_the_artifact_without_being_copied(tmp_path: Path) -> None:
    writer = ArtifactWriter(tmp_path / "out")
    for shard in do_shards(a_job(tmp_path, shard_workers=1), part, SHARDS, "lines"):
        shard.adopt(writer, {"number.txt": f"numbers/{shard.summary['part']}.txt"})
    manifest = writer.finish(stage="clean", summary={})
    assert [record.path for record in manifest.files] == [f"numbers/{k}.txt" for k in range(5)]
    there = tmp_path / "out" / "numbers" / "3.txt"
    assert there.read_text() == "3\n" * 100
    assert there.samefile(tmp_path / "work" / "shards" / "part-3" / "number.txt")


def test_shard_whose_process_is_killed_is_done_again_and_the_others_once(
    stage: Callable[..., Path], tmp_path: Path
) -> None:
    stage("if k == 2 and is_first: os.kill(os.getpid(), signal.SIGKILL)")
    job = a_job(tmp_path)
    finished = do_shards(job, never, SHARDS, "lines")
    assert [shard.summary["part"] for shard in finished] == [0, 1, 2, 3, 4]
    assert done_by_processes(job) == [0, 1, 2, 3, 4]


def test_stage_that_begins_again_does_the_shards_that_are_missing(
    stage: Callable[..., Path], tmp_path: Path
) -> None:
    # two of them: the last one that is missing would be done in this process
    stage("if k >= 3 and (job.work.parents[1] / 'failing').exists(): raise RuntimeError('once')")
    job = a_job(tmp_path)
    (job.work / "failing").touch()
    with pytest.raises(StageError, match="once"):
        do_shards(job, never, SHARDS, "lines")
    kept = done_by_processes(job)
    assert not {3, 4} & set(kept)
    (job.work / "failing").unlink()
    do_shards(job, never, SHARDS, "lines")
    assert done_by_processes(job) == [0, 1, 2, 3, 4]


def test_shard_killed_each_time_is_an_error_that_says_how_often(
    stage: Callable[..., Path], tmp_path: Path
) -> None:
    stage("""
        with (job.work / "tries").open("a") as file: file.write("x")
        if k == 1: os.kill(os.getpid(), signal.SIGKILL)
    """)
    with pytest.raises(StageError, match=r"part-1 was killed by SIGKILL .*3 times.*shard_workers"):
        do_shards(a_job(tmp_path), never, SHARDS, "lines")
    tries = tmp_path / "work" / "shards" / "part-1.work" / "tries"
    assert len(tries.read_text()) == shards_module.MAX_ATTEMPTS


@pytest.mark.parametrize("kind", [ArtifactError, ConfigError, DataError, DiskFullError, StageError])
def test_users_errors_of_a_shard_reach_the_stage_as_they_are(
    kind: type[Exception], stage: Callable[..., Path], tmp_path: Path
) -> None:
    stage(f"if k == 1: raise {kind.__name__}('corpus.txt:3: no text there')")
    with pytest.raises(kind) as caught:
        do_shards(a_job(tmp_path), never, SHARDS, "lines")
    assert type(caught.value) is kind
    assert str(caught.value) == "corpus.txt:3: no text there"


def test_shard_whose_process_ends_by_itself_and_says_nothing_is_not_tried_again(
    stage: Callable[..., Path], tmp_path: Path
) -> None:
    stage("""
        with (job.work / "tries").open("a") as file: file.write("x")
        if k == 1: os._exit(3)
    """)
    with pytest.raises(StageError, match="shard part-1 exited with 3"):
        do_shards(a_job(tmp_path), never, SHARDS, "lines")
    assert (tmp_path / "work" / "shards" / "part-1.work" / "tries").read_text() == "x"


def test_bug_in_a_shard_arrives_with_its_traceback(
    stage: Callable[..., Path], tmp_path: Path
) -> None:
    stage("if k == 1: {}['missing']")
    with pytest.raises(StageError, match=r"shard part-1 failed: KeyError(?s:.*)\['missing'\]"):
        do_shards(a_job(tmp_path), never, SHARDS, "lines")


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "no manifest"])
@pytest.mark.parametrize("num_damaged", [1, 2])
def test_damaged_finished_shard_is_done_again_and_the_others_not(
    damage: str, num_damaged: int, stage: Callable[..., Path], tmp_path: Path
) -> None:
    stage()
    job = a_job(tmp_path, shard_workers=2)
    before = digests(do_shards(a_job(tmp_path, shard_workers=1), part, SHARDS, "lines"))
    for k in range(num_damaged):  # one is done in this process, two by processes
        path = job.work / "shards" / f"part-{k}" / "number.txt"
        data = path.read_bytes()
        if damage == "flipped":
            path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        elif damage == "cut":
            path.write_bytes(data[:-1])
        elif damage == "gone":
            path.unlink()
        else:
            (path.parent / "manifest.json").unlink()
    assert digests(do_shards(job, part, SHARDS, "lines")) == before
    assert done_by_processes(job) == ([0, 1] if num_damaged == 2 else [])


@pytest.mark.parametrize("num_workers", [1, 2])
def test_progress_adds_up_to_the_total_and_never_goes_back(
    num_workers: int, stage: Callable[..., Path], tmp_path: Path
) -> None:
    stage("if k == 2 and is_first: job.report_progress(3, 4, 'lines'); os.kill(os.getpid(), 9)")
    seen: list[tuple[int, int, str]] = []
    job = a_job(tmp_path, shard_workers=num_workers)
    job.report = lambda done, total, unit: seen.append((done, total, unit))
    do_shards(job, part, SHARDS, "lines")
    done = [done for done, _, _ in seen]
    assert done[0] == 0 and done[-1] == TOTAL
    assert all(before <= after for before, after in itertools.pairwise(done))
    assert {(total, unit) for _, total, unit in seen} == {(TOTAL, "lines")}
    assert len(set(done)) > len(SHARDS), "shards that are not finished count too"
    seen.clear()
    do_shards(job, never, SHARDS, "lines")
    assert seen == [(TOTAL, TOTAL, "lines")], "what was done before counts at once"


def test_interruption_ends_the_processes_and_the_shards_done_are_kept(
    stage: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage("""
        while k > 0 and not (job.work.parent / "go").exists():
            job.report_progress(0, 1, "lines")
            time.sleep(0.01)
    """)
    job = a_job(tmp_path)
    folder = job.work / "shards"

    def stop_when_one_is_done_and_one_runs() -> None:
        while not (is_finished(folder / "part-0") and (folder / "part-2.work" / "pid").exists()):
            time.sleep(0.01)
        monkeypatch.setattr(job_module, "_is_stopping", True)

    watcher = threading.Thread(target=stop_when_one_is_done_and_one_runs)
    watcher.start()
    with pytest.raises(Interrupted):
        do_shards(job, never, SHARDS, "lines")
    watcher.join()
    pids = [int(path.read_text()) for path in folder.glob("*.work/pid")]
    assert len(pids) == 3 and not any(Path(f"/proc/{pid}").exists() for pid in pids)
    monkeypatch.setattr(job_module, "_is_stopping", False)
    (folder / "go").touch()
    do_shards(job, never, SHARDS, "lines")
    assert done_by_processes(job) == [0, 1, 2, 3, 4]


def test_killed_stage_leaves_no_process(stage: Callable[..., Path], tmp_path: Path) -> None:
    script = stage("""
        import ctypes
        ctypes.PyDLL(None).sleep(600)  # as a library's call that keeps the interpreter's lock
    """)
    job = a_job(tmp_path)
    parent = tmp_path / "parent.py"
    parent.write_text(
        "import sys\nfrom pathlib import Path\n"
        "from llm.runtime import shards\nfrom llm.runtime.job import *\n"
        "from llm.config import RuntimeConfig\n"
        f"shards.command = lambda stage, path: [sys.executable, {str(script)!r}, str(path)]\n"
        f"job = Job(stage='clean', settings={{}}, runtime=RuntimeConfig(shard_workers=2),"
        f" work=Path({str(job.work)!r}))\n"
        "shards.do_shards(job, None, [shards.Shard(name=f'part-{k}', settings={'part': k}, size=1)"
        " for k in range(3)], 'lines')\n"
    )
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2]))
    process = subprocess.Popen([sys.executable, str(parent)], env=environment)
    pids = [job.work / "shards" / f"part-{k}.work" / "pid" for k in range(2)]
    deadline = time.monotonic() + 30
    while not all(path.exists() and path.read_text() for path in pids):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(Path(f"/proc/{path.read_text()}").exists() for path in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_two_that_do_the_same_shard_leave_one_that_is_whole(tmp_path: Path) -> None:
    """A cluster may take a worker for dead that is not."""
    shard = a_job(tmp_path)
    shard.shard, shard.out = {"part": 0}, tmp_path / "part-0"

    def overtaken(job: Job, writer: ArtifactWriter) -> Mapping[str, Json]:
        other = Path(str(writer.folder) + "-other")
        writer_of_other = ArtifactWriter(other)
        job_module.finish(job, writer_of_other, part(job, writer_of_other))
        other.rename(job.out)
        return part(job, writer)

    make_shard(shard, overtaken)
    assert is_finished(shard.out)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def left_to_a_cluster(job: Job, errors: list[BaseException]) -> threading.Thread:
    """Have a stage leave its shards to a cluster, in a thread; return when they are wanted."""

    def be_the_stage() -> None:
        try:
            do_shards(job, never, SHARDS, "lines")
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=be_the_stage)
    thread.start()
    while read_wanted(job.work / "shards") is None:
        time.sleep(0.01)
    return thread


def test_stage_that_leaves_its_shards_to_a_cluster_waits_until_all_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "HEARTBEAT_SECONDS", 0.1)
    job = a_job(tmp_path, shard_runner="dask")
    do_shards(a_job(tmp_path, shard_workers=1), part, SHARDS[:1], "lines")
    errors: list[BaseException] = []
    stage = left_to_a_cluster(job, errors)
    folder = job.work / "shards"
    wanted = read_wanted(folder)
    assert wanted is not None and wanted.names == [f"part-{k}" for k in range(1, 5)]
    signed_at = (folder / "wanted.json").stat().st_mtime_ns
    while (folder / "wanted.json").stat().st_mtime_ns == signed_at:  # it says that it is there
        time.sleep(0.01)
    for name in wanted.names:
        assert stage.is_alive()
        make_shard(job_module.read_job(shard_work(folder, name) / "job.json"), part)
    stage.join(timeout=10)
    assert not stage.is_alive() and not errors
    assert read_wanted(folder) is None


def test_error_on_a_cluster_ends_the_stage_with_its_message(tmp_path: Path) -> None:
    job = a_job(tmp_path, shard_runner="ray")
    errors: list[BaseException] = []
    stage = left_to_a_cluster(job, errors)
    error = {"type": "DataError", "message": "a.txt:1: bad", "traceback": ""}
    (shard_work(job.work / "shards", "part-2") / "error.json").write_text(json.dumps(error))
    stage.join(timeout=10)
    assert [str(error) for error in errors] == ["a.txt:1: bad"]
    assert isinstance(errors[0], DataError)
    assert read_wanted(job.work / "shards") is None, "nobody need go on"
