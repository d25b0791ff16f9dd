"""Run one shard of a stage on a Dask or Ray worker.

A worker needs `llm`, this module and the artifacts folder under the same path as the stage. It
needs neither Prefect nor access to its server, which listens on 127.0.0.1 only.
"""

import platform
import time
from pathlib import Path

from llm.errors import StageError
from llm.runtime.failures import OUTPUT, how_it_ended, read_failure
from llm.runtime.job import is_finished, read_job
from llm.runtime.shards import JOB, WANTED, read_wanted, shard_work, start_shard
from llm.runtime.termination import end_processes

LEASE_POLL_SECONDS = 0.2
SECONDS_TO_APPEAR = 15.0  # for a file that another machine wrote
SECONDS_UNTIL_EXPIRED = 180.0  # three times as long as NFS may serve stale attributes of a file


class ShardKilledError(StageError):
    """A shard's process was killed from outside; the shard can be retried."""


class Lease:
    """Whether a stage still waits for its shards: it keeps touching `wanted.json`."""

    def __init__(self, folder: Path, wanted_id: str) -> None:
        """Watch `folder` for the request `wanted_id`."""
        self._folder, self._id = folder, wanted_id
        self._touched_at_ns, self._seen_at = 0, time.monotonic()

    @property
    def is_wanted(self) -> bool:
        """Whether the stage waits. This machine's clock measures the age of its last touch."""
        try:
            wanted = read_wanted(self._folder)
            touched_at_ns = (self._folder / WANTED).stat().st_mtime_ns
        except FileNotFoundError:
            return False
        if touched_at_ns != self._touched_at_ns:
            self._touched_at_ns, self._seen_at = touched_at_ns, time.monotonic()
        is_fresh = time.monotonic() - self._seen_at < SECONDS_UNTIL_EXPIRED
        return wanted is not None and wanted.id == self._id and is_fresh


def run_shard(folder: str, name: str, wanted_id: str) -> None:
    """Run the shard `name` of `folder` in a separate process for as long as the stage waits.

    Raises:
        ShardKilledError: the process was killed.
        DataError, ConfigError, ...: the user's error that the shard raised.
        StageError: any other failure, or this machine cannot see the folder.
    """
    lease = Lease(Path(folder), wanted_id)
    work = shard_work(Path(folder), name)
    _wait_for(work / JOB)
    job = read_job(work / JOB)
    if not lease.is_wanted or is_finished(job.out):
        return
    with (work / OUTPUT).open("wb") as output:
        process = start_shard(work, job.stage, output)
    try:
        while process.poll() is None and lease.is_wanted:
            time.sleep(LEASE_POLL_SECONDS)
    finally:
        end_processes([process])
    if is_finished(job.out) or not lease.is_wanted:
        return
    where = f"shard {name} on {platform.node()}"
    # the stage reads the same error from the same file
    failure = read_failure(work, process.returncode, where, prefix=f"{where}: ")
    raise failure or ShardKilledError(f"{where} {how_it_ended(process.returncode)}")


def _wait_for(path: Path) -> None:
    """Wait until a file that another machine wrote is visible here.

    Raises:
        StageError: it does not appear.
    """
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    while not path.exists():
        if time.monotonic() > deadline:
            raise StageError(
                f"{platform.node()} does not see {path}: every machine of the cluster needs the"
                " artifacts under the same path; set runtime.artifacts_dir to a shared folder"
            )
        time.sleep(LEASE_POLL_SECONDS)
