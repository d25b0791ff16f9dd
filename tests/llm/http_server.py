"""A local HTTP server with scripted responses, one per connection."""

import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType

Answer = Callable[[socket.socket, str], None]
"""Sends a response, given the connection and the request head; the server closes it."""


class HostileServer:
    """Gives each connection the next answer, repeating the last. Records the requests."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        self.requests: list[str] = []
        self._answers = answers
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> "HostileServer":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(timeout=10)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, suppress(OSError):  # the client may disconnect
                head = b""
                while b"\r\n\r\n" not in head and (more := connection.recv(65536)):
                    head += more
                self.requests.append(head.decode())
                index = min(len(self.requests), len(self._answers)) - 1
                self._answers[index](connection, self.requests[-1])


def answer(
    body: bytes,
    status: str = "200 OK",
    *headers: str,
    declared_bytes: int | None = -1,
) -> Answer:
    """Send `body`; -1 declares its true length, None declares none."""

    def send(connection: socket.socket, request: str) -> None:
        length = len(body) if declared_bytes == -1 else declared_bytes
        lines = [f"HTTP/1.1 {status}", *headers, "Connection: close"]
        lines += [f"Content-Length: {length}"] if length is not None else []
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)

    return send


def serve_ranges(
    body: bytes, *, etag: str = "", most_bytes: int | None = None, is_if_range_obeyed: bool = True
) -> Answer:
    """Serve `body` correctly, but truncate each response after `most_bytes`."""

    def send(connection: socket.socket, request: str) -> None:
        asked = re.search(r"Range: bytes=(\d+)-", request)
        known = re.search(r"If-Range: (\S+)", request)
        mark = [f"ETag: {etag}"] if etag else []
        is_current = known is None or known[1] == etag or not is_if_range_obeyed
        if asked and is_current:
            start = int(asked[1])
            part = f"Content-Range: bytes {start}-{len(body) - 1}/{len(body)}"
            rest, status = body[start:], "206 Partial Content"
        else:
            rest, status, part = body, "200 OK", "Accept-Ranges: bytes"
        sent = rest[:most_bytes] if most_bytes is not None else rest
        answer(sent, status, part, *mark, declared_bytes=len(rest))(connection, request)

    return send


def redirect(location: str) -> Answer:
    """Redirect to another URL."""
    return answer(b"", "302 Found", f"Location: {location}")


def drip(head: bytes) -> Answer:
    """Send `head`, then single bytes for two seconds."""

    def send(connection: socket.socket, request: str) -> None:
        connection.sendall(head)
        until = time.monotonic() + 2
        while time.monotonic() < until:
            connection.sendall(b"x")
            time.sleep(0.02)

    return send
