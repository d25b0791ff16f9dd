"""A stage's process: errors arrive, its group ends with its parent, and restarts resume it."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from llm.config import RuntimeConfig
from llm.errors import (
    ArtifactError,
    ConfigError,
    DataError,
    DiskFullError,
    Interrupted,
    StageError,
    TransientError,
)
from llm.runtime.job import Job
from tasks import launch as launch_module
from tasks.launch import Progress, launch


@pytest.fixture
def restarts() -> list[str]:
    """Why the stage was started again, each time it was."""
    return []


@pytest.fixture
def run_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarts: list[str]
) -> Callable[..., list[Progress]]:
    """Run a stage whose body is given as text; return the progress it made."""

    def run(
        body: str, *, should_stop: Callable[[], bool] = lambda: False, **runtime: int
    ) -> list[Progress]:
        script = tmp_path / "stage.py"
        script.write_text(
            "import os, signal, time, json, sys\nfrom pathlib import Path\n"
            "from llm.runtime.job import run_job\nfrom llm.errors import *\n"
            "def clean(job, writer):\n"
            + textwrap.indent(textwrap.dedent(body), "    ")
            + "\n    writer.write_bytes('x', b'1')\n    return {}\n"
            "run_job(clean)\n"
        )
        monkeypatch.setattr(
            launch_module, "command", lambda stage, path: [sys.executable, str(script), str(path)]
        )
        job = Job(
            stage="clean",
            settings={},
            runtime=RuntimeConfig(**runtime),
            out=tmp_path / "staging" / "out",
            work=tmp_path / "staging" / "work",
        )
        seen: list[Progress] = []
        launch(
            job,
            tmp_path / "staging",
            is_training=True,
            on_progress=seen.append,
            should_stop=should_stop,
            on_restart=restarts.append,
        )
        return seen

    return run


def test_finished_stage_leaves_an_artifact_and_its_progress_is_seen(
    run_stage: Callable[..., list[Progress]], tmp_path: Path
) -> None:
    seen = run_stage("""
        for i in range(5):
            job.report_progress(i, 5, "rows")
            time.sleep(0.25)
    """)
    assert seen and seen[-1].total == 5 and seen[-1].unit == "rows"
    assert (tmp_path / "staging" / "out" / "manifest.json").is_file()


@pytest.mark.parametrize("kind", [ArtifactError, ConfigError, DataError, DiskFullError, StageError])
def test_user_error_arrives_as_it_was_raised_and_without_a_traceback(
    kind: type[Exception], run_stage: Callable[..., None]
) -> None:
    with pytest.raises(kind) as caught:
        run_stage(f"raise {kind.__name__}('corpus.txt:3: no text there')")
    assert type(caught.value) is kind
    assert str(caught.value) == "clean: corpus.txt:3: no text there"


def test_stage_that_exits_without_an_error_file_is_not_restarted(
    run_stage: Callable[..., None], restarts: list[str]
) -> None:
    with pytest.raises(StageError, match=r"clean exited with 3\n(?s:.*)last words(?s:.*)reproduce"):
        run_stage("print('last words', flush=True); os._exit(3)")
    assert not restarts


def test_bug_arrives_with_its_own_traceback_and_how_to_reproduce_it(
    run_stage: Callable[..., None],
) -> None:
    with pytest.raises(StageError) as caught:
        run_stage("return {}['missing']")
    message = str(caught.value)
    assert "KeyError: 'missing'" in message and "return {}['missing']" in message
    assert "reproduce: " in message and "job.json" in message


def test_network_failure_is_a_transient_error(run_stage: Callable[..., None]) -> None:
    with pytest.raises(TransientError):
        run_stage("raise ConnectionResetError('cut')")


def test_stage_killed_by_a_signal_is_restarted_with_the_reason(
    run_stage: Callable[..., None], tmp_path: Path, restarts: list[str]
) -> None:
    run_stage("""
        mark = job.work / "was_here"
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert (tmp_path / "staging" / "out" / "manifest.json").is_file()
    assert restarts == ["was killed by SIGKILL (which the kernel sends when memory runs out)"]


def test_stage_killed_each_time_is_an_error_that_names_the_signal(
    run_stage: Callable[..., None],
) -> None:
    with pytest.raises(StageError, match="SIGKILL"):
        run_stage("os.kill(os.getpid(), signal.SIGKILL)", max_restarts=1)


def test_stop_reaches_the_child_which_saves_first(
    run_stage: Callable[..., None], tmp_path: Path
) -> None:
    stop = threading.Event()
    threading.Timer(1.5, stop.set).start()
    with pytest.raises(Interrupted):
        run_stage(
            """
            from llm.errors import Interrupted
            try:
                while True:
                    job.report_progress(0, 0, "rows")
                    time.sleep(0.01)
            except Interrupted:
                (job.work / "saved").touch()
                raise
            """,
            should_stop=stop.is_set,
        )
    assert (tmp_path / "staging" / "work" / "saved").exists()


@pytest.mark.parametrize(
    "hangs", ["time.sleep(600)", "while True: job.raise_if_stopping()"], ids=["deaf", "obeys"]
)
def test_hung_stage_is_stopped_and_restarted_with_the_reason(
    hangs: str,
    run_stage: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    restarts: list[str],
) -> None:
    monkeypatch.setattr(launch_module, "SECONDS_TO_SAVE", 0.5 if "sleep" in hangs else 60)
    run_stage(
        f"""
        mark = job.work / "was_here"
        if not mark.exists():
            mark.touch()
            {hangs}
        """,
        stall_seconds=2,
        max_restarts=9,  # on a loaded machine a start takes longer, too
    )
    assert (tmp_path / "staging" / "out" / "manifest.json").is_file()
    assert restarts and all("no progress for 2 seconds" in why for why in restarts)


def test_stage_that_hangs_each_time_is_an_error_that_names_the_setting(
    run_stage: Callable[..., None],
) -> None:
    with pytest.raises(StageError, match=r"runtime\.stall_seconds.*after 2 attempts"):
        run_stage("while True: job.raise_if_stopping()", stall_seconds=1, max_restarts=1)


def test_code_changed_after_the_key_was_taken_is_refused(tmp_path: Path) -> None:
    job = Job(
        stage="clean",
        settings={},
        code={"llm.clean": "of another time"},
        out=tmp_path / "out",
        work=tmp_path / "work",
    )
    with pytest.raises(StageError, match=r"the code of .*llm\.clean.* changed"):
        launch(
            job,
            tmp_path,
            is_training=False,
            on_progress=lambda progress: None,
            should_stop=lambda: False,
        )


def test_child_is_gone_when_its_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "stage.py"
    script.write_text(
        "import time\nfrom llm.runtime.job import run_job\n"
        "def clean(job, writer):\n"
        "    while True:\n        job.report_progress(0, 0, 'rows')\n        time.sleep(0.01)\n"
        "run_job(clean)\n"
    )
    parent = tmp_path / "parent.py"
    parent.write_text(
        "import sys\nfrom pathlib import Path\n"
        "from llm.runtime.job import Job\nfrom tasks import launch\n"
        f"launch.command = lambda stage, path: [sys.executable, {str(script)!r}, str(path)]\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "job = Job(stage='clean', settings={}, out=folder / 'out', work=folder / 'work')\n"
        "launch.launch(job, folder, is_training=False, on_progress=lambda p: None,"
        " should_stop=lambda: False)\n"
    )
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2]))
    process = subprocess.Popen([sys.executable, str(parent)], env=environment)
    deadline = time.monotonic() + 30
    while not (tmp_path / "work" / "progress.json").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive
