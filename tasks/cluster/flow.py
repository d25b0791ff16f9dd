"""Run a stage's shards on a Dask or Ray cluster: a Prefect flow with one task per shard.

`tasks.cluster.runner` starts this in a separate process, so that a lost cluster takes nothing else
down. `prefect-dask` and `prefect-ray` start the cluster or connect to it. The tasks run here and
send only the paths of shards to the cluster (`tasks.cluster.worker`): tasks on the workers would
need access to Prefect's server, which listens on 127.0.0.1. When the stage stops touching
`wanted.json`, for whatever reason, the flow and all its shards end by themselves.
"""

import contextlib
import importlib
import os
import queue
import secrets
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from prefect import Flow
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, TaskRun
from prefect.flow_engine import run_flow
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelled, Completed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner
from prefect.tasks import Task

from llm.artifact import write_json_atomically
from llm.config import RuntimeConfig
from llm.errors import StageError
from llm.runtime.failures import error_to_json
from llm.runtime.job import Job, is_finished, read_job
from llm.runtime.shards import MAX_ATTEMPTS, Wanted, read_wanted
from llm.runtime.termination import die_with_parent
from tasks.cluster.runner import CLUSTER_ERROR
from tasks.cluster.worker import Lease, ShardKilledError, run_shard
from tasks.prefect_api import PrefectApi
from tasks.stages import step_name

MAX_AT_ONCE = 512  # one thread each
SHARD_POLL_SECONDS = 0.5
CANCEL_POLL_SECONDS = 3.0
SECONDS_TO_CONNECT = 30
RAY_OBJECT_BYTES = 80 * 2**20  # Ray's minimum: no data passes through it

Wait = Callable[[float], None]
"""Waits for a shard; raises the shard's error, or TimeoutError after the given seconds."""
Submit = Callable[[str, str, str], Wait]
"""Submits the arguments of `run_shard` to a cluster."""


@contextlib.contextmanager
def dask_cluster(runtime: RuntimeConfig) -> Generator[Submit]:
    """Connect to Dask, or start a local cluster with a certificate for this process."""
    runner = importlib.import_module("prefect_dask").DaskTaskRunner
    if runtime.cluster_address:
        settings = {"timeout": SECONDS_TO_CONNECT}
        cluster = runner(address=runtime.cluster_address, client_kwargs=settings)
    else:
        local = {
            "n_workers": _num_local_workers(runtime),
            "threads_per_worker": 1,
            "memory_limit": 0,  # Dask would count only its own process
            "security": True,
            "dashboard_address": None,
        }
        cluster = runner(cluster_kwargs=local)
    with cluster:
        client = cluster.client

        def submit(*arguments: str) -> Wait:
            future = client.submit(run_shard, *arguments, pure=False)
            is_done = threading.Event()

            def done(future: object) -> None:
                is_done.set()

            future.add_done_callback(done)

            def wait(seconds: float) -> None:
                if not is_done.wait(seconds):  # Dask's own timeout fails now and then
                    raise TimeoutError
                future.result()

            return wait

        yield submit


@contextlib.contextmanager
def ray_cluster(runtime: RuntimeConfig) -> Generator[Submit]:
    """Connect to Ray, or start a local cluster with a token for this process."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as temporary:
        settings: dict[str, Any] = {"log_to_driver": False}
        if not runtime.cluster_address:
            settings |= {
                "num_cpus": _num_local_workers(runtime),
                "include_dashboard": False,
                "object_store_memory": RAY_OBJECT_BYTES,
                "_temp_dir": temporary,
            }
            # read when Ray is imported; the last makes it listen on 127.0.0.1 only, as on a Mac
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        runner = importlib.import_module("prefect_ray").RayTaskRunner
        ray = importlib.import_module("ray")
        with runner(address=runtime.cluster_address or None, init_kwargs=settings):
            remote = ray.remote(run_shard)

            def submit(*arguments: str) -> Wait:
                reference = remote.remote(*arguments)

                def wait(seconds: float) -> None:
                    try:
                        ray.get(reference, timeout=seconds)
                    except ray.exceptions.RayTaskError as error:
                        raise error.cause from error  # the worker's own error

                return wait

            yield submit


CLUSTERS = {"dask": dask_cluster, "ray": ray_cluster}


def shards_flow(job: Job, wanted: Wanted, submit: Submit) -> Flow[[], State[Any]]:
    """Return the flow that runs a stage's shards, `runtime.shard_workers` at a time."""
    folder = job.work / "shards"
    lease, is_over = Lease(folder, wanted.id), threading.Event()
    num_at_once = min(job.runtime.shard_workers or MAX_AT_ONCE, len(wanted.names))
    shard = _as_task(folder, wanted, submit, is_over)
    threads = ThreadPoolTaskRunner(max_workers=num_at_once)

    def do_all() -> State[Any]:
        is_canceled = _cancel_watch()
        waiting, left = deque(wanted.names), len(wanted.names)
        ended: queue.SimpleQueue[PrefectFuture[Any]] = queue.SimpleQueue()
        try:
            while left:
                while waiting and left - len(waiting) < num_at_once:
                    future = shard.submit(waiting.popleft())
                    future.add_done_callback(ended.put)
                with contextlib.suppress(queue.Empty):
                    ended.get(timeout=SHARD_POLL_SECONDS).result()
                    left -= 1
                if not lease.is_wanted and not _are_finished(folder, wanted):
                    return Cancelled(message="the stage that needs them has ended")
                if is_canceled():
                    raise StageError("the run of the shards was canceled in Prefect")
        finally:
            is_over.set()
        return Completed(message=f"{len(wanted.names)} shards")

    return Flow(
        fn=do_all,
        name="shards",
        description="The shards of one stage on a cluster",
        task_runner=cast(TaskRunner[PrefectFuture[Any]], threads),
        persist_result=False,
    )


def _as_task(
    folder: Path, wanted: Wanted, submit: Submit, is_over: threading.Event
) -> Task[[str], State[Any]]:
    """Return the Prefect task that runs one shard on the cluster."""

    def shard(name: str) -> State[Any]:
        wait = submit(str(folder), name, wanted.id)
        while not is_over.is_set():
            try:
                wait(SHARD_POLL_SECONDS)
            except TimeoutError:
                continue
            return Completed()
        return Cancelled(message="the stage no longer waits for it")

    return Task(
        fn=shard,
        task_run_name="{name}",
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=MAX_ATTEMPTS - 1,
        retry_condition_fn=_was_killed,
    )


def main() -> None:
    """Run the shards that a stage waits for; its job file is the first argument."""
    die_with_parent()
    job = read_job(Path(sys.argv[1]))
    wanted = read_wanted(job.work / "shards")
    if wanted is None:
        return
    try:
        with CLUSTERS[job.runtime.shard_runner](job.runtime) as submit:
            _run(job, shards_flow(job, wanted, submit))
    except BaseException as error:
        traceback.print_exc()
        write_json_atomically(job.work / "shards" / CLUSTER_ERROR, error_to_json(error))
        raise SystemExit(1) from None


def _run(job: Job, flow: Flow[[], State[Any]]) -> None:
    """Run the flow as a child of the task run that builds the stage."""
    parent = os.environ.get("FROMSCRATCH_TASK_RUN_ID")
    with get_client(sync_client=True) as client:
        run = client.create_flow_run(
            flow,
            name=f"{step_name(job.stage, job.role)} shards",
            parent_task_run_id=UUID(parent) if parent else None,
            tags=[job.stage],
        )
    end = cast(State[Any], run_flow(flow, flow_run=run, return_type="state"))
    if not end.is_cancelled():
        end.result()


def _are_finished(folder: Path, wanted: Wanted) -> bool:
    return all(is_finished(folder / name) for name in wanted.names)


def _num_local_workers(runtime: RuntimeConfig) -> int:
    return runtime.shard_workers or len(os.sched_getaffinity(0))


def _was_killed(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    return isinstance(state.result(raise_on_failure=False), ShardKilledError)


def _cancel_watch() -> Callable[[], bool]:
    """Return a function that tells whether this flow run was canceled, polling Prefect."""
    run_id, next_at = str(flow_run.id), time.monotonic()
    api = PrefectApi(PREFECT_API_URL.value() or "")

    def is_canceled() -> bool:
        nonlocal next_at
        if time.monotonic() < next_at:
            return False
        next_at = time.monotonic() + CANCEL_POLL_SECONDS
        with contextlib.suppress(OSError, ValueError):  # ValueError: Prefect has no API URL
            return api.is_canceled(run_id)
        return False

    return is_canceled


if __name__ == "__main__":
    main()
