"""Processes that outlive the command which starts them, and how to know them again.

Every one, and whatever it starts in turn, has an id in its environment. That is how all of them and
nothing else can be ended, whoever has their process numbers by then.
"""

import contextlib
import errno
import http.client
import secrets
import socket
import subprocess
import time
import urllib.request
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from llm.errors import FromscratchError

HOST = "127.0.0.1"
ID_VARIABLE = "FROMSCRATCH_SERVICE"
SECONDS_TO_STOP = 15.0  # time for a training to save
SECONDS_BETWEEN_LOOKS = 0.05
LOG_TAIL_LINES = 15
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServiceError(FromscratchError):
    """A server did not start. The message holds the end of its log."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """One detached process: where it answers (0: nowhere), and by what it is known."""

    name: str
    pid: int
    port: int
    id: str
    log: str

    @property
    def is_alive(self) -> bool:
        """Whether the very process that was started still runs."""
        return _has_id(self.pid, self.id)


def start(
    name: str,
    command: Sequence[str],
    variables: Mapping[str, str],
    log: Path,
    *,
    port: int = 0,
    descriptors: Sequence[int] = (),
) -> Service:
    """Start a process that outlives this one, with an id in its environment."""
    service_id = secrets.token_hex(16)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**variables, ID_VARIABLE: service_id},
            pass_fds=descriptors,
            start_new_session=True,
        )
    # a new process has its environment a moment after Popen has returned
    while process.poll() is None and not _has_id(process.pid, service_id):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    process.returncode = 0  # it is to outlive this handle, which would warn of that otherwise
    return Service(name=name, pid=process.pid, port=port, id=service_id, log=str(log))


def stop(ids: Sequence[str]) -> None:
    """End every process that carries one of these ids: ask, wait, then kill."""
    deadline = time.monotonic() + SECONDS_TO_STOP
    asked: set[psutil.Process] = set()
    while processes := _processes_with(ids):
        is_late = time.monotonic() > deadline
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                if is_late:
                    process.kill()
                elif process not in asked:
                    process.terminate()
        asked |= processes
        time.sleep(SECONDS_BETWEEN_LOOKS)


@contextlib.contextmanager
def free_port(port: int, seconds_to_wait: float = 0.0) -> Generator[socket.socket]:
    """Yield a socket that listens on `port`, or on a free one where that is in use. Handed down as
    it is, nobody can take the port: two may bind one, and the first to listen has it.

    A server that was killed holds its port until the last of its threads is gone, a moment after it
    has become a zombie: `seconds_to_wait` gives it that moment.
    """
    deadline = time.monotonic() + seconds_to_wait
    while (listener := _listen(port)) is None:
        if time.monotonic() > deadline:
            port = 0
        else:
            time.sleep(SECONDS_BETWEEN_LOOKS)
    with listener:
        yield listener


def fetch(
    url: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> bytes | None:
    """Return what a server of this machine answers (to a POST where there is a body), asked past
    any proxy; None where it does not.
    """
    request = urllib.request.Request(url, body, dict(headers or {}))
    if body is not None:
        request.add_header("Content-Type", "application/json")
    try:
        with _DIRECT.open(request, timeout=5) as response:
            return response.read()
    except (OSError, http.client.HTTPException):  # urllib's own errors are OSErrors
        return None


def failure(what: str, log: Path) -> ServiceError:
    """Return the error of a process that did not start, with the end of its log."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    tail = "\n".join(f"  {line}" for line in lines[-LOG_TAIL_LINES:]) or "  (nothing)"
    return ServiceError(f"{what} did not start; the end of {log}:\n{tail}")


def _listen(port: int) -> socket.socket | None:
    """Return a socket that listens on `port`, None where that is in use."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
        listener.listen()
    except OSError as error:
        listener.close()
        if port == 0 or error.errno != errno.EADDRINUSE:
            raise
        return None
    return listener


def _processes_with(ids: Sequence[str]) -> set[psutil.Process]:
    return {
        process for process in psutil.process_iter() if any(_has_id(process.pid, i) for i in ids)
    }


def _has_id(pid: int, service_id: str) -> bool:
    try:
        process = psutil.Process(pid)
        is_over = process.status() == psutil.STATUS_ZOMBIE
        return not is_over and process.environ().get(ID_VARIABLE) == service_id
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
