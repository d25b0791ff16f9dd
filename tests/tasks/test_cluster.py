"""Shards on local clusters: the same bytes, whoever runs them and whatever is killed."""

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from llm.config import RuntimeConfig
from llm.errors import ConfigError, DataError, Interrupted, StageError
from llm.runtime.job import Job, is_finished, write_job
from llm.runtime.shards import shard_work
from tasks import launch as launch_module
from tasks.cluster import worker as shard_worker
from tasks.cluster.runner import EXTRAS
from tasks.cluster.worker import ShardKilledError, run_shard
from tasks.launch import launch
from tests.tiny import build, write_sources

pytestmark = pytest.mark.slow

NUM_SHARDS = 4
# `python -m llm.numbers`: what each shard does is said in the settings, by its number
STAGE = """
import os, signal, time
import llm.runtime.shards
from llm.errors import ConfigError, DataError
from llm.runtime.job import run_job
from llm.runtime.shards import Shard, do_shards

def part(job, writer):
    number = str(job.shard["number"])
    what = job.settings.get(number, "")
    mark = job.work / "began"
    mark.write_text(str(os.getpid()))
    while what == "last":
        job.report_progress(0, 1, "lines")
        time.sleep(0.01)
    if what == "fail":
        raise DataError("a.txt:1: bad")
    if what == "refuse":
        raise ConfigError("pack.seq_len: too large")
    if what == "kill itself":
        os.kill(os.getpid(), signal.SIGKILL)
    writer.write_bytes("number.txt", number.encode())
    return {"number": number}

def numbers(job, writer):
    if "seconds between looks" in job.settings:
        seconds = float(job.settings["seconds between looks"])
        llm.runtime.shards.CLUSTER_POLL_SECONDS = seconds
    shards = [Shard(name=f"part-{k}", settings={"number": k}, size=1) for k in range(NUM_SHARDS)]
    for shard in do_shards(job, part, shards, "parts"):
        shard.adopt(writer, {"number.txt": f"{shard.summary['number']}.txt"})
    return {}

if __name__ == "__main__":
    run_job(numbers, part)
""".replace("NUM_SHARDS", str(NUM_SHARDS))


@pytest.fixture
def numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Job]:
    """Make `python -m llm.numbers` work in every process; return what makes its job."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "numbers.py").write_text(STAGE)
    (tmp_path / "sitecustomize.py").write_text(
        f"import llm\nllm.__path__.append({str(tmp_path / 'modules')!r})\n"
    )
    paths = [str(tmp_path), str(Path(__file__).parents[2])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))

    def make(runner: str = "processes", **settings: str) -> Job:
        folder = tmp_path / runner
        return Job(
            stage="numbers",
            settings=settings,
            runtime=RuntimeConfig(shard_runner=runner, shard_workers=2),  # type: ignore[arg-type]
            out=folder / "out",
            work=folder / "work",
        )

    return make


@pytest.fixture(params=["dask", "ray"])
def cluster(
    request: pytest.FixtureRequest,
    prefect_server: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """Return each kind of cluster that is installed."""
    if importlib.util.find_spec(EXTRAS[request.param]) is None:
        pytest.skip(f"needs pip install fromscratch[{request.param}]")
    for name, value in prefect_server.items():
        monkeypatch.setenv(name, value)
    return request.param


def run(job: Job, should_stop: Callable[[], bool] = lambda: False) -> None:
    """Run a stage as a flow's task does."""
    job.work.parent.mkdir(exist_ok=True)
    launch(
        job,
        job.work.parent,
        is_training=False,
        on_progress=lambda progress: None,
        should_stop=should_stop,
    )


def own_processes() -> set[psutil.Process]:
    """Every process that this one started, and theirs; servers for all tests among them."""
    return set(psutil.Process().children(recursive=True))


def kill_a_worker(folder: Path, killed: list[int]) -> None:
    """Wait for a process at a shard of a stage in `folder`, and kill the worker that started it."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for process in own_processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if re.search(rf"{folder}/.*/work/shards/", " ".join(process.cmdline())):
                    killed.append(process.ppid())
                    os.kill(killed[0], signal.SIGKILL)
                    return
        time.sleep(0.01)


def test_cluster_packs_the_same_rows_though_a_worker_is_killed(
    cluster: str, tmp_path: Path
) -> None:
    before = own_processes()
    overrides = [*write_sources(tmp_path), "pack.shard_bytes=3000", "runtime.shard_workers=2"]
    alone = build(tmp_path / "alone", overrides, last="pack corpus")["pack corpus"]
    killed: list[int] = []
    artifacts = tmp_path / cluster
    build(artifacts, overrides, last="train_tokenizer")
    watcher = threading.Thread(target=kill_a_worker, args=(artifacts / "staging", killed))
    watcher.start()
    overrides.append(f"runtime.shard_runner={cluster}")
    there = build(artifacts, overrides, last="pack corpus")["pack corpus"]
    watcher.join()
    assert there.status == alone.status == "built"
    assert there.digest == alone.digest
    assert killed and not psutil.pid_exists(killed[0])
    assert not own_processes() - before


@pytest.mark.parametrize("cluster", ["dask"], indirect=True)
def test_stage_that_is_stopped_leaves_nothing_running(
    cluster: str, numbers: Callable[..., Job]
) -> None:
    before = own_processes()
    job = numbers(cluster, **{"2": "last"})
    mark = shard_work(job.work / "shards", "part-2") / "began"
    with pytest.raises(Interrupted):
        run(job, should_stop=mark.exists)
    assert not Path(f"/proc/{mark.read_text()}").exists()
    assert not own_processes() - before


def test_bad_setting_that_a_worker_finds_stays_a_bad_setting(
    cluster: str, numbers: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage reads it from the shard's file too; here it looks too late for that."""
    monkeypatch.setattr(launch_module, "SECONDS_TO_SAVE", 0.5)
    job = numbers(cluster, **{"2": "refuse", "seconds between looks": "600"})
    with pytest.raises(ConfigError, match=r"seq_len: too large"):
        run(job)


@pytest.mark.parametrize("kind", ["dask", "ray"])
def test_library_that_is_missing_is_one_error_before_the_stage_starts(
    kind: str, numbers: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    job = numbers(kind)
    with pytest.raises(ConfigError, match=rf"pip install 'fromscratch\[{kind}\]'"):
        run(job)
    assert not job.out.exists()


@pytest.fixture
def wanted(numbers: Callable[..., Job]) -> Callable[..., Path]:
    """Be a stage that waits for shards; return the folder that a worker is told of."""

    def make(**settings: str) -> Path:
        job = numbers(**settings)
        folder = job.work / "shards"
        for k in range(NUM_SHARDS):
            work = shard_work(folder, f"part-{k}")
            work.mkdir(parents=True)
            job.shard, job.out, job.work = {"number": k}, folder / f"part-{k}", work
            write_job(work / "job.json", job)
        (folder / "wanted.json").write_text(json.dumps({"id": "1", "names": []}))
        return folder

    return make


def test_worker_runs_a_shard_once(wanted: Callable[..., Path]) -> None:
    folder = wanted()
    run_shard(str(folder), "part-3", "1")
    made_at = (folder / "part-3" / "manifest.json").stat().st_mtime_ns
    run_shard(str(folder), "part-3", "1")
    assert (folder / "part-3" / "manifest.json").stat().st_mtime_ns == made_at


def test_worker_distinguishes_a_killed_shard_from_a_failed_one(
    wanted: Callable[..., Path],
) -> None:
    folder = wanted(**{"0": "kill itself", "1": "fail"})
    with pytest.raises(ShardKilledError, match=r"part-0 on .* was killed by SIGKILL"):
        run_shard(str(folder), "part-0", "1")
    with pytest.raises(DataError, match=r"part-1 on .*: a\.txt:1: bad"):
        run_shard(str(folder), "part-1", "1")


@pytest.mark.parametrize("sign", ["gone", "of another", "old"])
def test_worker_ends_a_shard_that_no_stage_waits_for(
    sign: str, wanted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = wanted(**{"0": "last"})
    path = folder / "wanted.json"

    def stop_waiting() -> None:
        while not (shard_work(folder, "part-0") / "began").exists():
            time.sleep(0.01)
        if sign == "gone":
            path.unlink()
        elif sign == "of another":
            path.write_text(json.dumps({"id": "2", "names": []}))
        else:
            monkeypatch.setattr(shard_worker, "SECONDS_UNTIL_EXPIRED", 0.1)

    watcher = threading.Thread(target=stop_waiting)
    watcher.start()
    run_shard(str(folder), "part-0", "1")
    watcher.join()
    assert not is_finished(folder / "part-0")
    pid = (shard_work(folder, "part-0") / "began").read_text()
    assert not Path(f"/proc/{pid}").exists()


def test_worker_that_does_not_see_the_folder_says_what_to_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_worker, "SECONDS_TO_APPEAR", 0.0)
    with pytest.raises(StageError, match=r"does not see .*part-0.*runtime\.artifacts_dir"):
        run_shard(str(tmp_path / "elsewhere"), "part-0", "1")


def test_worker_needs_no_prefect() -> None:
    code = "import sys, tasks.cluster.worker; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not set(loaded) & {"prefect", "mlflow", "torch", "numpy"}
