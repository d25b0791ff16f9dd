"""Detached processes, recognized and stopped by an id in their environment.

Child processes inherit the id, so stopping a service ends all it started and nothing else, even
where a process number was reused.
"""

import contextlib
import errno
import secrets
import socket
import subprocess
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from llm.errors import FromscratchError

HOST = "127.0.0.1"
ID_VARIABLE = "FROMSCRATCH_SERVICE"
SERVICE_STOP_SECONDS = 15.0  # time for a training to save
SERVICE_POLL_SECONDS = 0.05
LOG_TAIL_LINES = 15


class ServiceError(FromscratchError):
    """A server did not start. The message holds the end of its log."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """One detached process: its port (0: none), and the id that identifies it."""

    name: str
    pid: int
    port: int
    id: str
    log: str

    @property
    def is_alive(self) -> bool:
        """Whether the process that was started still runs."""
        return _has_id(self.pid, self.id)


def start_service(
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
    # psutil sees the new environment only after exec, a moment after Popen returns
    while process.poll() is None and not _has_id(process.pid, service_id):
        time.sleep(SERVICE_POLL_SECONDS)
    process.returncode = 0  # Popen would warn that the process outlives it
    return Service(name=name, pid=process.pid, port=port, id=service_id, log=str(log))


def stop_services(ids: Sequence[str]) -> None:
    """End every process that carries one of these ids: SIGTERM, wait, then SIGKILL."""
    deadline = time.monotonic() + SERVICE_STOP_SECONDS
    terminated: set[psutil.Process] = set()
    while processes := _processes_with(ids):
        is_late = time.monotonic() > deadline
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                if is_late:
                    process.kill()
                elif process not in terminated:
                    process.terminate()
        terminated |= processes
        time.sleep(SERVICE_POLL_SECONDS)


@contextlib.contextmanager
def listening_socket(port: int, timeout_seconds: float = 0.0) -> Generator[socket.socket]:
    """Yield a socket that listens on `port`, or on any free port if that stays in use.

    The server inherits the socket, so no other program can take the port in between. A killed
    server holds its port until its last thread has ended, a moment after it became a zombie:
    `timeout_seconds` waits for that.
    """
    deadline = time.monotonic() + timeout_seconds
    while (listener := _listen(port)) is None:
        if time.monotonic() > deadline:
            port = 0
        else:
            time.sleep(SERVICE_POLL_SECONDS)
    with listener:
        yield listener


def start_error(name: str, log: Path) -> ServiceError:
    """Return the error of a process that did not start, with the end of its log."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    tail = "\n".join(f"  {line}" for line in lines[-LOG_TAIL_LINES:]) or "  (empty)"
    return ServiceError(f"{name} did not start; the end of {log}:\n{tail}")


def _listen(port: int) -> socket.socket | None:
    """Return a socket that listens on `port`, or None if the port is in use."""
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
        is_zombie = process.status() == psutil.STATUS_ZOMBIE
        return not is_zombie and process.environ().get(ID_VARIABLE) == service_id
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
