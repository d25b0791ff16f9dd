"""Distributed training: launch one rank per device, join them, sum over them.

Each rank is `python -m llm.pretrain JOB.json` with RANK and WORLD_SIZE set, so any launcher that
sets these works, also on several nodes. The one here is for a single machine and opens no port to
others: ranks meet through a file (`FileStore`) and talk over the loopback interface.
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
from llm.runtime.failures import EXIT_INTERRUPTED, error_file, forget_errors
from llm.runtime.job import Job, StageFunction, read_job, run_job
from llm.runtime.termination import (
    PARENT_PID,
    POLL_SECONDS,
    die_with_parent,
    end_processes,
    on_stop_signal,
)

RENDEZVOUS = "FROMSCRATCH_RENDEZVOUS"
LOOPBACK = "lo" if sys.platform.startswith("linux") else "lo0"
SECONDS_TO_FAIL = 20.0  # for the ranks left of a failed group, before they are killed


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Device and number of processes of a training."""

    device: Literal["cpu", "cuda"]
    num_processes: int


def run_training_job(function: StageFunction) -> None:
    """Run a training stage: as a rank, as the only process, or as the launcher of several ranks."""
    # a launcher, torchrun or Slurm as well as the one here, sets RANK
    if "RANK" not in os.environ and len(sys.argv) == 2:
        job = read_job(Path(sys.argv[1]))
        with contextlib.suppress(ConfigError):  # the stage itself reports it
            if (num_processes := choose_placement(job.runtime).num_processes) > 1:
                _exit_like(_launch(job, num_processes))
    try:
        run_job(function, saves_when_stopped=True)
    except SystemExit as end:
        _exit_rank(end.code if isinstance(end.code, int) else 1)
        raise
    except BaseException:
        if torch.distributed.is_initialized():
            traceback.print_exc()  # `_exit_rank` leaves no one else to print it
        _exit_rank(1)
        raise
    _exit_rank(0)


def _exit_rank(code: int) -> None:
    """Exit at once, if this process is a rank; all its results are on the disk."""
    # Gloo's threads now and then abort a process that exits the ordinary way, even after the group
    # was destroyed: "terminate called without an active exception".
    if torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _exit_like(code: int) -> NoReturn:
    """Exit as a rank did, or by the signal that killed it: the parent then starts a new attempt."""
    sys.stderr.flush()
    if code < 0:
        # the handlers of this process would swallow the signal; SIGKILL has none
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def choose_placement(runtime: RuntimeConfig) -> Placement:
    """Choose device and number of processes.

    Raises:
        ConfigError: more GPUs than there are.
    """
    # counting does not initialize CUDA, which the launcher must not: the ranks need the memory
    num_gpus = torch.cuda.device_count() if runtime.device != "cpu" else 0
    if runtime.device == "cuda" and not num_gpus:
        raise ConfigError("runtime.device: found cuda, but torch sees no GPU; use cpu or auto")
    if num_gpus and runtime.num_processes > num_gpus and "RANK" not in os.environ:
        raise ConfigError(
            f"runtime.num_processes: found {runtime.num_processes}, expected at most {num_gpus},"
            " the number of visible GPUs"
        )
    # under a launcher its number of processes counts, which may span several machines
    return Placement(
        device="cuda" if num_gpus else "cpu",
        num_processes=int(os.environ.get("WORLD_SIZE", 0))
        or runtime.num_processes
        or max(1, num_gpus),
    )


def make_accelerator(runtime: RuntimeConfig, config: OptimizationConfig) -> Accelerator:
    """Join the other processes, if any, and set up this one's device and threads.

    Raises:
        ConfigError: the machine lacks a device or precision of the settings.
        StageError: Accelerate found another number of processes.
    """
    placement = choose_placement(runtime)
    is_cpu = placement.device == "cpu"
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", placement.num_processes))
    # torch would take all cores in each process, and they would slow each other down
    torch.set_num_threads(runtime.num_threads or _threads_per_process(local_processes))
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]  # Accelerate would take precision and accumulation from them
    _use_fixed_order(runtime, placement.device)
    if not is_cpu:
        _prepare_gpu(config)
    if "RANK" in os.environ and not torch.distributed.is_initialized():
        rendezvous = os.environ.get(RENDEZVOUS)
        torch.distributed.init_process_group(
            # gloo beside NCCL: messages between hosts then do not wait for the GPUs' queues
            "gloo" if is_cpu else "cpu:gloo,cuda:nccl",
            init_method=f"file://{rendezvous}" if rendezvous else "env://",
            rank=int(os.environ["RANK"]),
            world_size=placement.num_processes,
        )
    accelerator = Accelerator(
        cpu=is_cpu,
        mixed_precision="no",  # the loop sets autocast itself: llm.model.precision
        # gradients are views of DDP's buckets, which saves a copy of all of them
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    # Accelerate reads the environment too; a launcher that sets half of it must not go unnoticed
    if accelerator.num_processes != placement.num_processes:
        raise StageError(
            f"Accelerate found {accelerator.num_processes} process(es), expected"
            f" {placement.num_processes}; start them with RANK, WORLD_SIZE and LOCAL_RANK set, or"
            " leave runtime.num_processes at 0"
        )
    return accelerator


def sum_over_processes(accelerator: Accelerator, *numbers: float | Tensor) -> list[float]:
    """Return each number summed over all processes, in one message between hosts."""
    # no GPU tensor comes here inside the loop: `float` would wait for the device
    known = [float(number) for number in numbers]
    if accelerator.num_processes == 1:
        return known
    summed = torch.tensor(known, dtype=torch.float64)  # counts of tokens: exact up to 2^53
    torch.distributed.all_reduce(summed)
    return summed.tolist()


def sum_on_devices(accelerator: Accelerator, number: Tensor) -> Tensor:
    """Return a number summed over all processes, on the device, without waiting for it."""
    if accelerator.num_processes == 1:
        return number
    return cast(Tensor, accelerator.reduce(number, reduction="sum"))


def _use_fixed_order(runtime: RuntimeConfig, device: Literal["cpu", "cuda"]) -> None:
    """Restrict torch to deterministic kernels, or not, as the settings say."""
    is_on = {"always": True, "never": False, "auto": device == "cpu"}[runtime.deterministic]
    if device == "cuda" or runtime.compile == "always":
        torch.use_deterministic_algorithms(is_on)  # includes the choices of the compiler
    else:  # the same, without importing the compiler, which takes 2 s
        torch.set_deterministic_debug_mode("error" if is_on else "default")
    if is_on:
        # cuBLAS is deterministic only with a fixed workspace (its manual, Results Reproducibility)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # torch would also fill every new tensor with NaN to expose bugs, at a kernel each
        vars(torch.utils)["deterministic"].fill_uninitialized_memory = False


def _prepare_gpu(config: OptimizationConfig) -> None:
    """Select this process's GPU."""
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if config.precision == "bf16" and not torch.cuda.is_bf16_supported():
        raise ConfigError("precision: found bf16, which this GPU does not have; use fp16 or fp32")


def _threads_per_process(num_processes: int) -> int:
    # a container or a batch system often allows fewer cores than the machine has
    has_affinity = hasattr(os, "sched_getaffinity")
    num_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, num_cores // num_processes)


def _launch(job: Job, num_processes: int) -> int:
    """Run the ranks to their end and return the exit code of the first that failed, or 0.

    A negative code is the signal that killed the rank. Stop signals are passed on to all ranks.
    """
    die_with_parent(saves_first=True)
    job.work.mkdir(parents=True, exist_ok=True)
    # an old error would be taken for the reason of the next failure
    forget_errors(job.work)
    for leftover in job.work.glob("rendezvous-*"):
        leftover.unlink()
    # a new name each time: a FileStore left by a killed group would hang the next one
    rendezvous = job.work.resolve() / f"rendezvous-{uuid.uuid4().hex}"
    ranks: list[subprocess.Popen[bytes]] = []
    is_stopping = False

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal is_stopping
        is_stopping = True
        for process in ranks:
            process.terminate()

    on_stop_signal(pass_on)
    command = [sys.executable, "-m", f"llm.{job.stage}", sys.argv[1]]
    try:
        for rank in range(num_processes):
            environment = _rank_environment(job, rank, num_processes, rendezvous)
            # the output goes to the launcher's own, which its parent keeps in output.log
            ranks.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL))
        rank, code = _wait(ranks)
    finally:
        end_processes(ranks, 0.0)
        rendezvous.unlink(missing_ok=True)
    if code == -signal.SIGTERM and is_stopping:
        return EXIT_INTERRUPTED  # so early that the rank had no signal handler yet
    if code < 0 and not (job.work / error_file(rank)).exists():
        forget_errors(job.work)  # those of the other ranks: they lost their connection to this one
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
        # read when torch is imported, before the settings are
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": LOOPBACK,
        "NCCL_SOCKET_IFNAME": LOOPBACK,
        RENDEZVOUS: str(rendezvous),
        PARENT_PID: str(os.getpid()),
    }


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> tuple[int, int]:
    """Wait for all ranks; return the first that failed with its exit code, or (0, 0)."""
    while True:
        codes = [process.poll() for process in ranks]
        failed = [(rank, code) for rank, code in enumerate(codes) if code]
        if failed:
            break
        if None not in codes:  # all ended, none failed
            return 0, 0
        time.sleep(POLL_SECONDS)
    # the others would wait for the failed one in their next collective, for gloo's 30 minutes
    end_processes(ranks, SECONDS_TO_FAIL)
    # one killed by a signal comes first: ranks that exited with an error may have lost it
    return min(failed, key=lambda rank_and_code: rank_and_code[1] > 0)
