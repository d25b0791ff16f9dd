"""No process of a stage outlives the process that started it."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.flaky(
    reason="real kills and processes that must be gone, on a machine that may be busy"
)

ROOT = Path(__file__).parents[2]
SECONDS_TO_END = 10
# Every process of a stage, also each rank, leaves a mark and then ignores signals: a data stage in
# a call that holds the interpreter's lock, a training that never checks its flag.
SITECUSTOMIZE = """
import ctypes, os, time
from pathlib import Path
from llm.runtime import job

def be_deaf(of):
    (Path(os.environ["MARKS"]) / f"{of.stage}-{os.environ.get('RANK', '')}").touch()
    if of.stage in ("pretrain", "finetune"):
        while True:
            time.sleep(600)
    ctypes.PyDLL(None).sleep(600)

if "MARKS" in os.environ:
    job._refuse_changed_code = be_deaf
"""
PARENT = """
import sys, threading
from pathlib import Path
from llm.config import RuntimeConfig
from llm.runtime.job import Job
from tasks.launch import launch

def start(stage, num_processes):
    folder = Path(sys.argv[1]) / stage
    runtime = RuntimeConfig(device="cpu", num_processes=num_processes)
    job = Job(stage=stage, settings={}, runtime=runtime, out=folder / "out", work=folder / "work")
    launch(job, folder, is_training=False, on_progress=print, should_stop=lambda: False)

for word in sys.argv[2:]:
    stage, _, number = word.partition(":")
    threading.Thread(target=start, args=(stage, int(number or 1))).start()
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the kernel ends them: Linux alone"
)
@pytest.mark.parametrize(
    ("stages", "marks"),
    [
        (
            ["download", "clean", "train_tokenizer", "pack"],
            {"download-", "clean-", "train_tokenizer-", "pack-"},
        ),
        pytest.param(
            ["pretrain:2", "finetune", "evaluate"],
            {"pretrain-0", "pretrain-1", "finetune-", "evaluate-"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["data", "models"],
)
def test_nothing_is_alive_ten_seconds_after_its_parent_was_killed(
    tmp_path: Path, stages: Sequence[str], marks: set[str]
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    (tmp_path / "marks").mkdir()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)]),
        "MARKS": str(tmp_path / "marks"),
        "OMP_NUM_THREADS": "1",
    }
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path), *stages], env=environment
    )
    while {path.name for path in (tmp_path / "marks").iterdir()} != marks:
        assert parent.poll() is None
        psutil.wait_procs([psutil.Process(parent.pid)], timeout=0.1)
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) >= len(marks)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=SECONDS_TO_END)
    for process in alive:
        process.kill()
    assert not alive
