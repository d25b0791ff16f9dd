"""The processes of a training: `python -m llm.pretrain JOB.json` is one, or starts one per device.

Each rank is the same command with RANK and WORLD_SIZE in its environment, so any launcher that sets
these, on many nodes too, does as well as the one here. This one is for a single machine and opens
no port to others: ranks find each other by a file (`FileStore`) and talk over the loopback
interface.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal, NoReturn, cast

import torch
import torch.distributed
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor

from llm.config import OptimizationConfig, RuntimeConfig
from llm.errors import ConfigError, StageError
from llm.runtime.failures import ERROR, forget_errors
from llm.runtime.job import (
    EXIT_INTERRUPTED,
    PARENT_PID,
    Job,
    StageFunction,
    die_with_parent,
    read_job,
    run_job,
)

RENDEZVOUS = "FROMSCRATCH_RENDEZVOUS"
LOOPBACK = "lo" if sys.platform.startswith("linux") else "lo0"
SECONDS_BETWEEN_LOOKS = 0.05
SECONDS_TO_END = 20.0  # ranks of a failed group get this long before they are killed


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where a training runs: on what, and in how many processes."""

    device: Literal["cpu", "cuda"]
    num_processes: int


def run_training_job(function: StageFunction) -> None:
    """Be the process of a training stage, or, when it wants several and none is started, their
    launcher.
    """
    if "RANK" not in os.environ and len(sys.argv) == 2:
        job = read_job(Path(sys.argv[1]))
        with contextlib.suppress(ConfigError):  # the stage itself reports it
            if (num_processes := place(job.runtime).num_processes) > 1:
                _end_like(_launch(job, num_processes))
    try:
        run_job(function, saves_when_stopped=True)
    except SystemExit as end:
        _end_rank(end.code if isinstance(end.code, int) else 1)
        raise
    except BaseException:
        if torch.distributed.is_initialized():
            traceback.print_exc()
        _end_rank(1)
        raise
    _end_rank(0)


def _end_rank(code: int) -> None:
    """End a rank at once, when this process is one; all it has to leave is on the disk.

    Gloo's threads abort a process that ends in the ordinary way, now and then, even after the
    group was destroyed: "terminate called without an active exception".
    """
    if torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _end_like(code: int) -> NoReturn:
    """End this process as a rank ended: who started it sees a kill as one, and may try again."""
    sys.stderr.flush()
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def place(runtime: RuntimeConfig) -> Placement:
    """Decide device and number of processes.

    Raises:
        ConfigError: GPUs are asked for that are not there.
    """
    num_gpus = torch.cuda.device_count() if runtime.device != "cpu" else 0
    if runtime.device == "cuda" and not num_gpus:
        raise ConfigError("runtime.device: found cuda, but torch sees no GPU; use cpu or auto")
    if num_gpus and runtime.num_processes > num_gpus and "RANK" not in os.environ:
        raise ConfigError(
            f"runtime.num_processes: found {runtime.num_processes}, expected at most {num_gpus},"
            " the number of visible GPUs"
        )
    return Placement(
        device="cuda" if num_gpus else "cpu",
        num_processes=int(os.environ.get("WORLD_SIZE", 0))
        or runtime.num_processes
        or max(1, num_gpus),
    )


def make_accelerator(runtime: RuntimeConfig, config: OptimizationConfig) -> Accelerator:
    """Join the other processes, if any, and say on what and in which precision to train.

    Raises:
        ConfigError: the machine has not what `runtime` asks for.
        StageError: Accelerate sees another number of processes than there should be.
    """
    placement = place(runtime)
    is_cpu = placement.device == "cpu"
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", placement.num_processes))
    torch.set_num_threads(runtime.num_threads or _threads_per_process(local_processes))
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]  # they would decide over precision and gradients beside the settings
    _use_fixed_order(runtime, placement.device)
    if not is_cpu:
        _prepare_gpu(config)
    if "RANK" in os.environ and not torch.distributed.is_initialized():
        place_to_meet = os.environ.get(RENDEZVOUS)
        torch.distributed.init_process_group(
            # what the host wants to know of other hosts does not wait for what the GPUs do
            "gloo" if is_cpu else "cpu:gloo,cuda:nccl",
            init_method=f"file://{place_to_meet}" if place_to_meet else "env://",
            rank=int(os.environ["RANK"]),
            world_size=placement.num_processes,
        )
    accelerator = Accelerator(
        cpu=is_cpu,
        mixed_precision="no",  # the loop itself says what is computed in which: llm.model.precision
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    if accelerator.num_processes != placement.num_processes:
        raise StageError(
            f"Accelerate found {accelerator.num_processes} process(es), expected"
            f" {placement.num_processes}; start them with RANK, WORLD_SIZE and LOCAL_RANK set, or"
            " leave runtime.num_processes at 0"
        )
    return accelerator


def sum_over_processes(accelerator: Accelerator, *numbers: float | Tensor) -> list[float]:
    """Return each number summed over all processes, by one message from host to host."""
    known = [float(number) for number in numbers]
    if accelerator.num_processes == 1:
        return known
    summed = torch.tensor(known, dtype=torch.float64)
    torch.distributed.all_reduce(summed)
    return summed.tolist()


def sum_on_devices(accelerator: Accelerator, number: Tensor) -> Tensor:
    """Return a number on the device summed over all processes, without waiting for it."""
    if accelerator.num_processes == 1:
        return number
    return cast(Tensor, accelerator.reduce(number, reduction="sum"))


def _use_fixed_order(runtime: RuntimeConfig, device: Literal["cpu", "cuda"]) -> None:
    """Have torch take only kernels that add in a fixed order, or any, as the settings say."""
    is_on = {"always": True, "never": False, "auto": device == "cpu"}[runtime.deterministic]
    if device == "cuda" or runtime.compile == "always":
        torch.use_deterministic_algorithms(is_on)  # the compiler's choices as well
    else:  # the same without importing the compiler, which takes 2 s
        torch.set_deterministic_debug_mode("error" if is_on else "default")
    if is_on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        # that would also fill every new tensor, to show bugs, at a kernel each
        vars(torch.utils)["deterministic"].fill_uninitialized_memory = False


def _prepare_gpu(config: OptimizationConfig) -> None:
    """Take this process's GPU."""
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if config.precision == "bf16" and not torch.cuda.is_bf16_supported():
        raise ConfigError("precision: found bf16, which this GPU does not have; use fp16 or fp32")


def _threads_per_process(num_processes: int) -> int:
    has_affinity = hasattr(os, "sched_getaffinity")
    num_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, num_cores // num_processes)


def _launch(job: Job, num_processes: int) -> int:
    """Start the ranks, pass signals on, and return the exit code of the first that failed, or 0.

    All have ended then. The code of one that a signal killed is minus the signal's number.
    """
    die_with_parent(saves_first=True)
    job.work.mkdir(parents=True, exist_ok=True)
    forget_errors(job.work)
    for leftover in job.work.glob("rendezvous-*"):
        leftover.unlink()
    rendezvous = job.work.resolve() / f"rendezvous-{uuid.uuid4().hex}"
    ranks: list[subprocess.Popen[bytes]] = []
    is_stopping = False

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal is_stopping
        is_stopping = True
        for process in ranks:
            process.terminate()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, pass_on)
    command = [sys.executable, "-m", f"llm.{job.stage}", sys.argv[1]]
    try:
        for rank in range(num_processes):
            environment = _rank_environment(job, rank, num_processes, rendezvous)
            ranks.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL))
        rank, code = _wait(ranks)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
        rendezvous.unlink(missing_ok=True)
    if code == -signal.SIGTERM and is_stopping:
        return EXIT_INTERRUPTED  # so early that the rank did not listen to signals yet
    own_error = job.work / (f"rank-{rank}-{ERROR}" if rank else ERROR)
    if code < 0 and not own_error.exists():
        forget_errors(job.work)  # the others complain of the one that is gone
        name = signal.Signals(-code).name
        print(f"{job.stage}: rank {rank} of {num_processes} was killed by {name}", file=sys.stderr)
    return code


def _rank_environment(job: Job, rank: int, num_processes: int, rendezvous: Path) -> dict[str, str]:
    threads = job.runtime.num_threads or _threads_per_process(num_processes)
    return os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": LOOPBACK,
        "NCCL_SOCKET_IFNAME": LOOPBACK,
        RENDEZVOUS: str(rendezvous),
        PARENT_PID: str(os.getpid()),
    }


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> tuple[int, int]:
    """Wait for all ranks and return the first that failed, with its exit code; (0, 0) if none did.

    When one fails the others are ended, since they would wait for it for ever.
    """
    while True:
        codes = [process.poll() for process in ranks]
        failed = [(rank, code) for rank, code in enumerate(codes) if code]
        if failed:
            break
        if None not in codes:
            return 0, 0
        time.sleep(SECONDS_BETWEEN_LOOKS)
    for process in ranks:
        process.terminate()
    give_up_at = time.monotonic() + SECONDS_TO_END
    for process in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(0.0, give_up_at - time.monotonic()))
    # one that was killed comes before those that failed because it was gone
    return min(failed, key=lambda rank_and_code: rank_and_code[1] > 0)
