"""Ending processes: stop signals, ask-then-kill, and ending with the parent process."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType

from llm.runtime.failures import EXIT_INTERRUPTED

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # batch systems send SIGUSR1
POLL_SECONDS = 0.02
SECONDS_TO_SAVE = 60.0  # for a training that is asked to stop: it writes a checkpoint
SECONDS_TO_END = 5.0  # for a process with nothing to save
SECONDS_TO_SAVE_ALONE = 5.0  # once the parent is gone; the last checkpoint is there anyway
PARENT_PID = "FROMSCRATCH_PARENT_PID"  # set by the parent of a process that ends with it
PARENT_POLL_SECONDS = 0.5
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def on_stop_signal(handler: Callable[[int, FrameType | None], None]) -> None:
    """Have `handler` called for each signal that asks this process to stop."""
    for number in STOP_SIGNALS:
        signal.signal(number, handler)


def end_processes(
    processes: Sequence[subprocess.Popen[bytes]],
    seconds: float = SECONDS_TO_END,
    *,
    with_groups: bool = False,
) -> None:
    """Ask all that still run to end, and kill those that do after `seconds`. All have ended then.

    `with_groups`: each leads a process group, which gets the same signals.
    """
    for process in processes:
        if process.poll() is None:
            _send(process, signal.SIGTERM, with_groups)
    deadline = time.monotonic() + seconds
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        # a group may outlive its leader
        if with_groups or process.poll() is None:
            _send(process, signal.SIGKILL, with_groups)
        process.wait()


def die_with_parent(*, saves_first: bool = False) -> None:
    """Have the kernel end this process when its parent is gone (Linux).

    By SIGKILL. With `saves_first` by SIGTERM, and by SIGKILL SECONDS_TO_SAVE_ALONE later.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    # SIGKILL, since a signal handler in Python waits for a library's call of minutes to return
    number = signal.SIGTERM if saves_first else signal.SIGKILL
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
    if saves_first:
        watcher = threading.Thread(
            target=_outlive, args=(parent,), name="parent-watch", daemon=True
        )
        watcher.start()
    expected = os.environ.get(PARENT_PID)
    if expected is not None and os.getppid() != int(expected):
        sys.exit(EXIT_INTERRUPTED)  # the parent was gone before the kernel was asked


def _outlive(parent: int) -> None:
    """End this process, with the group it leads, a while after its parent is gone."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_SECONDS)
    time.sleep(SECONDS_TO_SAVE_ALONE)
    if os.getpgrp() == os.getpid():  # its ranks would wait as long again
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _send(process: subprocess.Popen[bytes], number: signal.Signals, with_group: bool) -> None:
    if not with_group:
        process.send_signal(number)
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
