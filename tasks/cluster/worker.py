"""What a cluster does: one shard of a stage, on the worker that this is called on.

A worker needs `llm` and this module, and sees the artifacts under the same path as the stage. It
needs no Prefect, and no way to its server, which listens on 127.0.0.1 alone.
"""

import platform
import time
from pathlib import Path

from llm.errors import StageError
from llm.runtime.failures import OUTPUT, how_it_ended, read_failure
from llm.runtime.job import is_finished, read_job
from llm.runtime.shards import JOB, WANTED, read_wanted, shard_work, start_shard
from llm.runtime.termination import end_processes

SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_TO_SEE = 15.0  # for a file that another machine wrote
SECONDS_WITHOUT_SIGN = 180.0  # three times as long as NFS may show an old state of a file


class ShardKilledError(StageError):
    """The process of a shard was ended from outside; another may do it."""


class Lease:
    """Tells whether a stage waits for its shards: its `wanted.json` is there and touched."""

    def __init__(self, folder: Path, wanted_id: str) -> None:
        """Look at the shards in `folder`, wanted under this id."""
        self._folder, self._id = folder, wanted_id
        self._signed_at_ns, self._seen_at = 0, time.monotonic()

    @property
    def is_wanted(self) -> bool:
        """Whether the stage waits. How old its last sign is is told by this machine's clock."""
        try:
            wanted = read_wanted(self._folder)
            signed_at_ns = (self._folder / WANTED).stat().st_mtime_ns
        except FileNotFoundError:
            return False
        if signed_at_ns != self._signed_at_ns:
            self._signed_at_ns, self._seen_at = signed_at_ns, time.monotonic()
        is_fresh = time.monotonic() - self._seen_at < SECONDS_WITHOUT_SIGN
        return wanted is not None and wanted.id == self._id and is_fresh


def do_shard(folder: str, name: str, wanted_id: str) -> None:
    """Do the shard `name` of those in `folder` in a process of its own, while the stage waits.

    Raises:
        ShardKilledError: its process was killed.
        DataError, ConfigError, ...: what the shard raised for the user.
        StageError: it failed otherwise, or this machine does not see the folder.
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
            time.sleep(SECONDS_BETWEEN_LOOKS)
    finally:
        end_processes([process])
    if is_finished(job.out) or not lease.is_wanted:
        return
    where = f"shard {name} on {platform.node()}"
    # the stage reads the same from its file and raises it too
    failure = read_failure(work, process.returncode, where, prefix=f"{where}: ")
    raise failure or ShardKilledError(f"{where} {how_it_ended(process.returncode)}")


def _wait_for(path: Path) -> None:
    """Wait until this machine sees a file that another wrote.

    Raises:
        StageError: it does not.
    """
    deadline = time.monotonic() + SECONDS_TO_SEE
    while not path.exists():
        if time.monotonic() > deadline:
            raise StageError(
                f"{platform.node()} does not see {path}: all machines of a cluster need the"
                " artifacts under the same path; set runtime.artifacts_dir to a folder they share"
            )
        time.sleep(SECONDS_BETWEEN_LOOKS)
