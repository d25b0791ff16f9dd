"""A Prefect or MLflow server that accepts requests from the same user on this machine only.

`python -m flows.services.guard prefect ARTIFACTS --fd 3` is one server process. Its settings are
environment variables (flows.services.environments).

Prefect's API runs code as the user who started it. Instead of asking for a password, the server
checks each request:

- `Host` must be a loopback name, against DNS rebinding,
- `Origin`, if present, must be the server's own, against requests from other web pages,
- the TCP connection must belong to the same account, against other users of a shared machine.

A content security policy restricts the pages to this machine and forbids framing them. Prefect's
page would otherwise send usage analytics to its maker regardless of the settings.
"""

import argparse
import fcntl
import json
import os
import platform
import re
import signal
import socket
import struct
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, MutableMapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.tracking.files import correct_locations

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})
NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST = 4, 20, 1  # linux/netlink.h, sock_diag.h
ALL_STATES = NO_COOKIE = 0xFFFFFFFF
TCP_ESTABLISHED = 1
GRACEFUL_SHUTDOWN_SECONDS = 2
# localStorage of MLflow's page, set before its own script runs: the menu for model training instead
# of that for conversations, no telemetry and no banner about it, no assistant that opens by itself
PAGE_SETTINGS = {
    "mlflow.workflowType_v1": "machine_learning",
    "mlflow.settings.telemetry.enabled_v1": False,
    "mlflow.telemetry.info.alert.dismissed_v1": True,
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": True,
}


def _sha256_base64(text: str) -> str:
    return b64encode(sha256(text.encode()).digest()).decode()


PAGE_SCRIPT = "".join(
    f"localStorage.setItem({json.dumps(key)}, {json.dumps(json.dumps(value))});"
    for key, value in PAGE_SETTINGS.items()
)
# Prefect's page calls its API as 127.0.0.1 even when it was opened as localhost. Both pages use
# inline styles, draw from data: and blob: URLs of their own, and compile drawing code at run time
# (pixi.js for the graph of a run, regl for parallel coordinates), hence 'unsafe-eval'.
CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'self'",
        f"script-src 'self' 'unsafe-eval' 'sha256-{_sha256_base64(PAGE_SCRIPT)}'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob: http://127.0.0.1:* http://localhost:* ws://127.0.0.1:*"
        " ws://localhost:*",
        "worker-src 'self' blob:",
        "frame-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    ]
)
PAGE_HEADERS = (
    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode()),
    (b"x-frame-options", b"DENY"),
)


class LocalOnly:
    """ASGI middleware that refuses foreign requests and adds the content security policy."""

    def __init__(self, app: "ASGIApp", on_started: Callable[[], None] = lambda: None) -> None:
        """Wrap `app`; `on_started` is called when it is ready."""
        self._app = app
        self._on_started = on_started

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Serve one request, or refuse it with 403."""

        async def send_lifespan(message: MutableMapping[str, Any]) -> None:
            await send(message)
            if message["type"] == "lifespan.startup.complete":
                self._on_started()

        async def send_with_policy(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                names = {name for name, _ in PAGE_HEADERS}
                own = [header for header in message["headers"] if header[0].lower() not in names]
                message["headers"] = [*own, *PAGE_HEADERS]
            await send(message)

        if scope["type"] == "lifespan":
            await self._app(scope, receive, send_lifespan)
        elif not (reason := refusal(scope)):
            await self._app(scope, receive, send_with_policy)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            body = f"refused: {reason}\n".encode()
            headers = [(b"content-type", b"text/plain; charset=utf-8")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": body})


def refusal(scope: "Scope") -> str:
    """Return the reason to refuse a request, or ""."""
    headers = dict(scope["headers"])
    name, port = _name_and_port(headers.get(b"host", b""))
    if name not in LOOPBACK_NAMES:
        return "use the address 127.0.0.1 or localhost"
    if b"origin" in headers:
        page_name, page_port = _name_and_port(headers[b"origin"].rpartition(b"//")[2])
        if page_name not in LOOPBACK_NAMES or page_port != port:
            return "the request comes from a page of another server"
    if scope["client"] is not None and not is_own_connection(scope["client"], scope["server"]):
        return "the request comes from another account of this machine"
    return ""


def is_own_connection(client: tuple[str, int], server: tuple[str, int]) -> bool:
    """Ask the kernel whether a loopback connection belongs to this account or to root.

    Only an established connection counts, because closed ones are listed as root's. Returns True if
    the kernel cannot answer (macOS) or does not see the clients (Windows around WSL).
    Source: sock_diag(7), inet_diag.h.
    """
    if not hasattr(socket, "AF_NETLINK") or "microsoft" in platform.release().lower():
        return True
    addresses = (socket.inet_aton(client[0]), socket.inet_aton(server[0]))
    connection = struct.pack(">HH", client[1], server[1]) + struct.pack("16s16s", *addresses)
    body = struct.pack("=BBBBI", socket.AF_INET, socket.IPPROTO_TCP, 0, 0, ALL_STATES)
    body += connection + struct.pack("=III", 0, NO_COOKIE, NO_COOKIE)
    header = struct.pack("=IHHII", 16 + len(body), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, 1, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_SOCK_DIAG) as kernel:
            kernel.sendto(header + body, (0, 0))
            answer = kernel.recv(4096)
    except OSError:
        return True  # this kernel lacks the sock_diag module
    if struct.unpack_from("=IH", answer)[1] != SOCK_DIAG_BY_FAMILY:
        return False  # the connection no longer exists
    state, owner = answer[17], struct.unpack_from("=I", answer, 16 + 64)[0]
    return state == TCP_ESTABLISHED and owner in (0, os.getuid())


def main() -> None:
    """Serve on the inherited socket until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m flows.services.guard")
    parser.add_argument("server", choices=["prefect", "mlflow"])
    parser.add_argument("artifacts", type=Path)
    parser.add_argument(
        "--fd", type=int, required=True, help="file descriptor of a listening socket"
    )
    parser.add_argument(
        "--temporary", action="store_true", help="stop at the end of standard input"
    )
    options = parser.parse_args()
    if options.temporary:
        threading.Thread(target=_end_with_parent, daemon=True).start()

    import uvicorn

    if options.server == "prefect":
        unlock = _lock(options.artifacts / "prefect")
        app = LocalOnly(_prefect_app(is_temporary=options.temporary), unlock)
    else:
        app = LocalOnly(_mlflow_app(options.artifacts))
    config = uvicorn.Config(
        app,
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # X-Forwarded-For must not replace the client's address
        timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_SECONDS,
    )
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=options.fd)])


def _name_and_port(address: bytes) -> tuple[str, str]:
    """Split `name:port`, where an IPv6 name is in brackets; ("", "") if malformed."""
    found = re.fullmatch(r"(\[[0-9a-f:]+\]|[^\[\]:@/]*)(?::(\d*))?", address.decode("latin-1"))
    return (found[1].strip("[]").lower(), found[2] or "") if found else ("", "")


def _prefect_app(*, is_temporary: bool) -> "ASGIApp":
    """Return Prefect's server; a temporary one has no scheduler or other background services."""
    from prefect.server.api.server import create_app

    return create_app(ephemeral=is_temporary, final=True)


def _mlflow_app(artifacts_dir: Path) -> "ASGIApp":
    """Return MLflow's server, with its database opened and corrected at start-up.

    Its assistant, which runs shell commands for any caller, is turned off.
    """
    import mlflow.server
    from mlflow.server.fastapi_app import app
    from mlflow.server.handlers import initialize_backend_stores
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, PlainTextResponse
    from starlette.routing import Route

    pages = Path(mlflow.server.__file__).parent / mlflow.server.REL_STATIC_DIR
    index = (pages / "index.html").read_text(encoding="utf-8")
    index = index.replace("<head>", f"<head><script>{PAGE_SCRIPT}</script>", 1)

    async def show_index(request: Request) -> HTMLResponse:
        return HTMLResponse(index)

    async def refuse(request: Request) -> PlainTextResponse:
        return PlainTextResponse("the assistant is turned off\n", status_code=404)

    correct_locations(artifacts_dir)
    initialize_backend_stores()
    methods = ["GET", "POST", "PUT", "PATCH", "DELETE"]
    assistant = "/{prefix:path}/3.0/mlflow/assistant/{rest:path}"
    app.router.routes[:0] = [Route("/", show_index), Route(assistant, refuse, methods=methods)]
    return app


def _lock(home: Path) -> Callable[[], None]:
    """Take the lock for migrating the database in `home`; return the function that releases it."""
    home.mkdir(parents=True, exist_ok=True)
    file = (home / "start.lock").open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file.close


def _end_with_parent() -> None:
    """Stop when the parent's end of the pipe is closed, which the kernel does even on SIGKILL."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2 * GRACEFUL_SHUTDOWN_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    main()
