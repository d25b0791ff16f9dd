"""Run a Prefect or MLflow server that only the same user on this machine can reach.

`python -m flows.services.guard prefect ARTIFACTS --fd 3` is one server process.

Prefect's API runs code as the user who started it, so it matters who may call. A password would
have to be typed into the pages; instead every request must

- name this machine's loopback in `Host`: no web page can reach the server under a name of its own,
- come from no page but the server's own (`Origin`): no other page can send it requests,
- come from a connection of the same account: other accounts of a shared machine are turned away.

In return the pages may load and ask nothing but this machine, and no other page may frame them:
Prefect's would send what is done on them to its maker's analytics, whatever its settings say.

The settings are read from the environment that `flows.services.servers` makes.
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
SECONDS_TO_STOP = 2
# What MLflow's page finds in the browser's localStorage before its own script runs: the menu of
# model training in place of that of conversations, no usage data and no banner about it, and an
# assistant that does not open by itself.
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
# Prefect's page calls its API as 127.0.0.1, also where it was opened as localhost. Both pages write
# styles into their elements, draw from data: and blob: addresses they make themselves, and compile
# what they draw with (pixi.js the graph of a run, regl parallel coordinates).
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
    """Turns away what does not come from this machine, this account and the server's own pages, and
    gives the pages a policy that keeps them to this machine.
    """

    def __init__(self, app: "ASGIApp", on_started: Callable[[], None] = lambda: None) -> None:
        """Guard `app`, and call `on_started` when it is ready."""
        self._app = app
        self._on_started = on_started

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Serve one request, or refuse it with 403."""

        async def send_and_tell(message: MutableMapping[str, Any]) -> None:
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
            await self._app(scope, receive, send_and_tell)
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
    """Say why a request is refused, or nothing."""
    headers = dict(scope["headers"])
    name, port = _name_and_port(headers.get(b"host", b""))
    if name not in LOOPBACK_NAMES:
        return "open this server as 127.0.0.1 or localhost"
    if b"origin" in headers:
        page_name, page_port = _name_and_port(headers[b"origin"].rpartition(b"//")[2])
        if page_name not in LOOPBACK_NAMES or page_port != port:
            return "a page of another server sent this"
    if scope["client"] is not None and not is_own_connection(scope["client"], scope["server"]):
        return "another account of this machine sent this"
    return ""


def is_own_connection(client: tuple[str, int], server: tuple[str, int]) -> bool:
    """Tell whether a loopback connection belongs to this account or to root, by the kernel's word.

    Only an open connection counts: one that its owner closed is listed as root's. Where the kernel
    has no word on it (macOS), or clients are outside it (Windows around WSL), all are taken.
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
        return True  # a kernel without the module: it answers nobody's questions
    if struct.unpack_from("=IH", answer)[1] != SOCK_DIAG_BY_FAMILY:
        return False  # no such connection, any more
    state, owner = answer[17], struct.unpack_from("=I", answer, 16 + 64)[0]
    return state == TCP_ESTABLISHED and owner in (0, os.getuid())


def main() -> None:
    """Serve on the listening socket that was handed down, until told to stop."""
    parser = argparse.ArgumentParser(prog="python -m flows.services.guard")
    parser.add_argument("server", choices=["prefect", "mlflow"])
    parser.add_argument("artifacts", type=Path)
    parser.add_argument("--fd", type=int, required=True, help="descriptor of a bound socket")
    parser.add_argument("--temporary", action="store_true", help="end when standard input ends")
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
        proxy_headers=False,  # a header must not say where a connection comes from
        timeout_graceful_shutdown=SECONDS_TO_STOP,
    )
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=options.fd)])


def _name_and_port(address: bytes) -> tuple[str, str]:
    """Split `name:port`; an IPv6 name stands in brackets."""
    found = re.fullmatch(r"(\[[0-9a-f:]+\]|[^\[\]:@/]*)(?::(\d*))?", address.decode("latin-1"))
    return (found[1].strip("[]").lower(), found[2] or "") if found else ("", "")


def _prefect_app(*, is_temporary: bool) -> "ASGIApp":
    """Make Prefect's server; a temporary one without schedules and other long-term services."""
    from prefect.server.api.server import create_app

    return create_app(ephemeral=is_temporary, final=True)


def _mlflow_app(artifacts_dir: Path) -> "ASGIApp":
    """Make MLflow's server, its database opened and corrected now and not with the first page.

    Its assistant runs shell commands for whoever asks. Here it does not exist.
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
    """Wait until no other server migrates the database in `home`; return how to let the next."""
    home.mkdir(parents=True, exist_ok=True)
    file = (home / "start.lock").open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file.close


def _end_with_parent() -> None:
    """Stop when the other end of standard input is closed: the kernel does that even on SIGKILL."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2 * SECONDS_TO_STOP)
    os._exit(1)


if __name__ == "__main__":
    main()
