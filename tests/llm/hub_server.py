"""A Hugging Face hub on 127.0.0.1 with one dataset: enough of its API for the real clients."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

from llm.artifact import Json
from llm.runtime.job import Job, write_job

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "owner/name"


class HubServer:
    """Serves `files`, path to bytes, at COMMIT and at the branch `main`; those over
    `lfs_bytes` are known by their sha256, as on the hub. Keeps the requests.
    """

    def __init__(self, files: dict[str, bytes], *, token: str = "", lfs_bytes: int = 1000) -> None:
        self.files = files
        self.commit = COMMIT
        self.token = token
        self.lfs_bytes = lfs_bytes
        self.served: dict[str, bytes] = {}
        """Bytes that differ from the listing, by path."""
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_POST = do_GET

            def log_message(self, format: str, *arguments: object) -> None:
                hub.requests.append(format % arguments)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        path = urllib.parse.unquote(urllib.parse.urlsplit(request.path).path)
        form = request.rfile.read(int(request.headers.get("Content-Length") or 0)).decode()
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return send(request, 401, b"{}", **{"X-Error-Message": "Who are you?"})
        if not re.match(rf"/(api/)?datasets/{NAME}(/|$)", path):
            return send(request, 404, b"{}", **{"X-Error-Code": "RepoNotFound"})
        kind, revision, inside = re.fullmatch(
            rf"/(?:api/)?datasets/{NAME}(?:/([\w-]+))?(?:/([^/]+))?(?:/(.+))?", path
        ).groups()  # type: ignore[union-attr]
        if revision not in (None, "main", self.commit):
            return send(request, 404, b"{}", **{"X-Error-Code": "RevisionNotFound"})
        if kind == "resolve":
            return self._send_file(request, inside)
        if kind == "tree":
            entries = self._tree(inside or "")
        elif kind == "paths-info":
            entries = [self._entry(one) for one in urllib.parse.parse_qs(form)["paths"]]
        else:
            siblings = [{"rfilename": one} for one in self.files]
            found = {"_id": "1", "id": NAME, "sha": self.commit, "siblings": siblings}
            return send_json(request, found | {"private": False, "tags": [], "downloads": 0})
        return send_json(request, entries)

    def _tree(self, folder: str) -> list[object]:
        prefix = f"{folder}/" if folder else ""
        inside = [one.removeprefix(prefix) for one in self.files if one.startswith(prefix)]
        folders = sorted({one.split("/")[0] for one in inside if "/" in one})
        entries: list[object] = [
            {"type": "directory", "path": prefix + one, "oid": "0" * 40, "size": 0}
            for one in folders
        ]
        return entries + [self._entry(prefix + one) for one in inside if "/" not in one]

    def _entry(self, path: str) -> dict[str, object]:
        data = self.files[path]
        blob_id = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry: dict[str, object] = {"type": "file", "path": path, "oid": blob_id, "size": len(data)}
        if len(data) > self.lfs_bytes:
            sha256 = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 100}
        return entry

    def _send_file(self, request: BaseHTTPRequestHandler, path: str) -> None:
        if path not in self.files:
            return send(request, 404, b"", **{"X-Error-Code": "EntryNotFound"})
        data = self.served.get(path, self.files[path])
        marks = {"X-Repo-Commit": self.commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if asked is None:
            return send(request, 200, data, **marks)
        start, end = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
        marks["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        return send(request, 206, data[start:end], **marks)


def send_json(request: BaseHTTPRequestHandler, value: object) -> None:
    """Answer with JSON."""
    send(request, 200, json.dumps(value).encode(), **{"Content-Type": "application/json"})


def send(request: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    """Answer with a body."""
    request.send_response(status)
    for name, value in ({"Content-Length": str(len(body))} | headers).items():
        request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)


def download(
    folder: Path,
    hub: HubServer,
    *,
    role: str = "corpus",
    token: str = "",
    planned: str = "",
    **settings: Json,
) -> subprocess.CompletedProcess[str]:
    """Run the stage in its own process, which reads the environment."""
    chosen: dict[str, Json] = {"kind": "hub", "hub_name": NAME, "hub_revision": COMMIT, **settings}
    job = Job(stage="download", role=role, settings=chosen)
    job.out, job.work = folder / "out", folder / "work"
    job.input_digests = {"source": planned} if planned else {}
    folder.mkdir(exist_ok=True)
    write_job(folder / "job.json", job)
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_TOKEN": token,
        "no_proxy": "*", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "llm.download", str(folder / "job.json")]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
