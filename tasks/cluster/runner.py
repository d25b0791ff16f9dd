"""Run a stage's shards on a cluster: start `tasks.cluster.flow` when the stage waits for them."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from llm.config import RuntimeConfig
from llm.errors import ConfigError, FromscratchError, StageError
from llm.runtime.failures import error_from_json, error_to_json, how_it_ended
from llm.runtime.job import Job, child_environment
from llm.runtime.shards import WANTED, read_wanted

CLUSTER_ERROR = "cluster_error.json"
LOG = "cluster.log"
SECONDS_TO_FINISH = 20.0  # to shut down a local cluster
EXTRAS = {"dask": "prefect_dask", "ray": "prefect_ray"}


def missing_runner(runtime: RuntimeConfig) -> str:
    """Return an error if the library of the configured cluster is missing, or an empty string."""
    kind = runtime.shard_runner
    if kind == "processes" or importlib.util.find_spec(EXTRAS[kind]) is not None:
        return ""
    return (
        f"runtime.shard_runner: found {kind}, which needs {EXTRAS[kind].replace('_', '-')};"
        f" `pip install 'fromscratch[{kind}]'`, or take processes"
    )


class ShardRunner:
    """Starts `python -m tasks.cluster.flow` when a stage needs shards; stops it with the stage."""

    def __init__(self, job: Job, job_path: Path) -> None:
        """Prepare for the stage of `job`, whose job file is `job_path`.

        Raises:
            ConfigError: the library of the cluster is not installed.
        """
        self._job, self._path = job, job_path
        self._folder = job.work / "shards"
        self._process: subprocess.Popen[bytes] | None = None
        self._done_id = ""
        self._is_used = job.runtime.shard_runner != "processes"
        if problem := missing_runner(job.runtime):
            raise ConfigError(problem)
        for stale in (WANTED, CLUSTER_ERROR):  # left by a killed stage
            (self._folder / stale).unlink(missing_ok=True)

    def poll(self) -> None:
        """Start the process if the stage has begun to wait, and check whether it failed.

        Raises:
            DataError, ConfigError, ...: the user's error that a shard raised.
            StageError: the cluster failed.
        """
        if not self._is_used:
            return
        if self._process is not None and self._process.poll() is not None:
            if self._process.returncode != 0 and (self._folder / WANTED).exists():
                raise self._failure(self._process.returncode)
            self._process = None
        if self._process is None:
            wanted = read_wanted(self._folder)
            if wanted is not None and wanted.id != self._done_id:
                self._done_id = wanted.id
                self._process = self._start()

    def close(self) -> None:
        """Wait for the process, which ends when the stage needs no shards; then kill it."""
        if self._process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(SECONDS_TO_FINISH)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        from prefect.runtime import task_run  # already imported by the flow that builds the stage

        environment = {
            **child_environment(),
            "PYTHONUNBUFFERED": "1",
            "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",
            "FROMSCRATCH_TASK_RUN_ID": str(task_run.id or ""),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        with (self._folder / LOG).open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "tasks.cluster.flow", str(self._path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def _failure(self, code: int) -> FromscratchError:
        where = self._job.runtime.cluster_address or "a cluster on this machine"
        try:
            found = json.loads((self._folder / CLUSTER_ERROR).read_bytes())
        except FileNotFoundError:
            found = error_to_json(StageError(f"its process {how_it_ended(code)}"))
        kind = type(error_from_json(found, self._job.stage))
        return kind(
            f"{self._job.stage}: shards failed on {self._job.runtime.shard_runner}, {where}:"
            f" {found['message']}\nsee {self._folder / LOG}"
        )
