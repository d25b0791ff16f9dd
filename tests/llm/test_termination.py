"""Ending processes: asked first, killed after a while, and with a group nothing of it is left."""

import os
import signal
import subprocess
import sys
import time

import pytest

from llm.runtime.termination import POLL_SECONDS, STOP_SIGNALS, end_processes, on_stop_signal

OBEDIENT = "import time; print(flush=True); time.sleep(600)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {OBEDIENT}"
LEADER = (
    f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {STUBBORN!r}]); {OBEDIENT}"
)


def start(code: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    with process.stdout as output:
        output.readline()
    return process


def test_processes_are_asked_and_those_that_do_not_listen_are_killed() -> None:
    ended, obedient, stubborn = start("print()"), start(OBEDIENT), start(STUBBORN)
    ended.wait()
    end_processes([ended, obedient, stubborn], 0.2)
    codes = [process.returncode for process in (ended, obedient, stubborn)]
    assert codes == [0, -signal.SIGTERM, -signal.SIGKILL]


def test_nothing_is_left_of_a_group_whose_leader_ended_when_asked() -> None:
    leader = start(LEADER)
    end_processes([leader], with_groups=True)
    assert leader.returncode == -signal.SIGTERM
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(leader.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(POLL_SECONDS)
    pytest.fail("the group outlived its leader")


def test_a_handler_gets_every_stop_signal() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    received: list[int] = []
    try:
        on_stop_signal(lambda number, frame: received.append(number))
        for number in STOP_SIGNALS:
            signal.raise_signal(number)
    finally:
        for number, handler in zip(STOP_SIGNALS, before, strict=True):
            signal.signal(number, handler)
    assert received == list(STOP_SIGNALS)
