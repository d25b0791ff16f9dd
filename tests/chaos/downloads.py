"""Servers that are flaky or hostile (promise 13).

Each case downloads 300 kB as a stage does, from a server of its own. It must end in the right
sha256, or in a typed error with nothing kept under a final name.
"""

import gzip
import hashlib
import itertools
import random
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from llm.artifact import ArtifactWriter, load_artifact
from llm.data.sources.http import FetchLimits
from llm.download import download
from llm.errors import DataError, DiskFullError
from llm.runtime.job import Job, finish, is_finished
from tests.chaos.counting import Case
from tests.llm.cleaning import run_clean
from tests.llm.http_server import Answer, HostileServer, answer, drip, redirect, serve_ranges

BODY = random.Random(1).randbytes(300_000)
OTHER = random.Random(2).randbytes(300_000)
BOMB_BYTES = 70 << 20
LIMITS = FetchLimits(
    first_wait_seconds=0.001,
    max_wait_seconds=0.01,
    answer_seconds=0.3,
    slow_seconds=0.1,
    min_bytes_per_second=100_000,
    max_undeclared_bytes=3 << 20,
)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Right:
    """The download succeeds, with one request containing each of `asked`."""

    answers: Sequence[Answer]
    asked: Sequence[str] = ()
    before: bytes = b""
    """The partial file of an earlier, killed attempt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """It raises an error of this type whose message contains `saying`."""

    answers: Sequence[Answer]
    error: type[Exception] = DataError
    saying: str = ""


def no_answer(connection: socket.socket, request: str) -> None:
    """Close at once."""


def say(data: bytes) -> Answer:
    """Send these bytes."""
    return lambda connection, request: connection.sendall(data)


def endless(connection: socket.socket, request: str) -> None:
    """Send an endless body without a length."""
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    for _ in itertools.repeat(None, 1000):
        connection.sendall(bytes(1 << 20))


def chunked(*parts: bytes, is_broken: bool = False) -> Answer:
    """Send a body in chunks, the last truncated if `is_broken`."""
    data = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    data = data[: len(data) // 2] if is_broken else data + b"0\r\n\r\n"
    return answer(data, "200 OK", "Transfer-Encoding: chunked", declared_bytes=None)


def cut(size_bytes: int, body: bytes = BODY, etag: str = "") -> Answer:
    """Serve `body` by ranges, each response truncated."""
    return serve_ranges(body, etag=etag, most_bytes=size_bytes)


GOOD = serve_ranges(BODY)
NEVER_RANGES = answer(BODY)
PART = "206 Partial Content"

RIGHT = {
    "a good server": Right(answers=[NEVER_RANGES]),
    "cut off, continued": Right(
        answers=[cut(100_000, etag='"1"'), serve_ranges(BODY, etag='"1"')],
        asked=["GET ", "Range: bytes=100000-\r\nIf-Range: \"1\""],
    ),
    "cut off, continued without ETag": Right(
        answers=[cut(100_000), GOOD], asked=["GET ", "Range: bytes=100000-"]
    ),
    "cut off three times": Right(
        answers=[cut(80_000)],
        asked=["GET ", "bytes=80000-", "bytes=160000-", "bytes=240000-"],
    ),
    "cut off in the first byte": Right(answers=[cut(0), GOOD]),
    "cut off, then no ranges": Right(answers=[cut(100_000), NEVER_RANGES]),
    "cut off, then another part": Right(
        answers=[cut(100_000), answer(BODY, PART, "Content-Range: bytes 0-299999/300000"), GOOD]
    ),
    "cut off, then a part that says nothing": Right(
        answers=[cut(100_000), answer(BODY[100_000:], PART, "Content-Range: x"), GOOD]
    ),
    "cut off, then 416": Right(answers=[cut(100_000), answer(b"", "416 No"), GOOD]),
    "cut off, then 500": Right(answers=[cut(100_000), answer(b"", "500 Broken"), GOOD]),
    "cut off, then wrong bytes in the range": Right(
        answers=[cut(100_000), serve_ranges(OTHER), NEVER_RANGES]
    ),
    "changes between parts, new ETag": Right(
        answers=[cut(100_000, OTHER, '"1"'), serve_ranges(BODY, etag='"2"')]
    ),
    "changes between parts, new ETag, If-Range ignored": Right(
        answers=[
            cut(100_000, OTHER, '"1"'),
            serve_ranges(BODY, etag='"2"', is_if_range_obeyed=False),
        ]
    ),
    "changes between parts, weak ETag": Right(
        answers=[cut(100_000, OTHER, 'W/"1"'), serve_ranges(BODY, etag='W/"2"')]
    ),
    "changes between parts, no ETag": Right(answers=[cut(100_000, OTHER), GOOD]),
    "drips, then good": Right(answers=[drip(HEAD), NEVER_RANGES]),
    "drips its head, then good": Right(answers=[drip(b"HTTP/1.1 200 OK\r\nSlow: "), GOOD]),
    "503 with Retry-After": Right(answers=[answer(b"", "503 Busy", "Retry-After: 9999"), GOOD]),
    "429 with a date": Right(
        answers=[answer(b"", "429 No", "Retry-After: Wed, 21 Oct 2015 07:28:00 GMT"), GOOD]
    ),
    "416 to no range": Right(answers=[answer(b"", "416 No"), GOOD]),
    "206 to no range": Right(answers=[answer(BODY, PART), GOOD]),
    "closes at once": Right(answers=[no_answer, GOOD]),
    "speaks no HTTP": Right(answers=[say(b"hello\r\n\r\n"), GOOD]),
    "200 headers": Right(answers=[say(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200), GOOD]),
    "a head that breaks off": Right(answers=[say(b"HTTP/1.1 200 OK\r\nContent-"), GOOD]),
    "a chunk that breaks off": Right(answers=[chunked(BODY, is_broken=True), GOOD]),
    "a chunk of no size": Right(
        answers=[answer(b"zz\r\n", "200 OK", "Transfer-Encoding: chunked", declared_bytes=None),
                 GOOD]
    ),
    "in chunks": Right(answers=[chunked(BODY[:1000], BODY[1000:])]),
    "of undeclared length": Right(answers=[answer(BODY, declared_bytes=None)]),
    "of undeclared length, cut off": Right(
        answers=[answer(BODY[:1000], declared_bytes=None), NEVER_RANGES]
    ),
    "redirected": Right(answers=[redirect("/there?a=b"), GOOD], asked=["GET ", "GET /there?a=b"]),
    "redirected ten times": Right(answers=[*[redirect("/again")] * 10, GOOD]),
    "goes on after a kill": Right(
        answers=[GOOD], before=BODY[:120_000], asked=["Range: bytes=120000-"]
    ),
    "finds other bytes after a kill": Right(
        answers=[GOOD, NEVER_RANGES], before=OTHER[:120_000]
    ),
    "finds too much after a kill": Right(
        answers=[answer(b"", "416 No"), GOOD], before=BODY + b"more"
    ),
    "finds all after a kill": Right(answers=[], before=BODY),
}  # fmt: skip

REFUSED = {
    "other bytes": Refused(answers=[answer(OTHER)], saying="nothing was kept"),
    "other bytes of undeclared length": Refused(answers=[answer(OTHER, declared_bytes=None)]),
    "one byte more": Refused(answers=[answer(BODY + b"x")]),
    "one byte less": Refused(answers=[answer(BODY[:-1])]),
    "declared one byte shorter": Refused(answers=[answer(BODY, declared_bytes=len(BODY) - 1)]),
    "nothing": Refused(answers=[answer(b"")]),
    "other bytes each time": Refused(
        answers=[cut(100_000), serve_ranges(OTHER), answer(OTHER, declared_bytes=None)]
    ),
    "always shorter than declared": Refused(
        answers=[answer(BODY[:1000], declared_bytes=len(BODY)), answer(b"", "503 Busy")],
        error=ConnectionError, saying="1,000 bytes are kept",
    ),
    "always 503": Refused(answers=[answer(b"", "503 Busy")], error=ConnectionError),
    "drips its head for ever": Refused(
        answers=[drip(b"HTTP/1.1 200 OK\r\nSlow: ")], error=ConnectionError
    ),
    "404": Refused(answers=[answer(b"", "404 Not Found")], saying="answered 404"),
    "403": Refused(answers=[answer(b"", "403 Forbidden")], saying="answered 403"),
    "204": Refused(answers=[answer(b"", "204 No Content")], saying="answered 204"),
    "an endless body": Refused(answers=[endless], saying="more than 3,145,728 bytes"),
    "more than the disk": Refused(
        answers=[answer(b"x", declared_bytes=1 << 60)], saying="bytes are needed",
        error=DiskFullError,
    ),
    "compressed on the way": Refused(
        answers=[answer(gzip.compress(BODY), "200 OK", "Content-Encoding: gzip")],
        saying="compressed as gzip",
    ),
    "redirected for ever": Refused(answers=[redirect("/round")], saying="more than 10 redirects"),
    **{
        f"redirected to {location}": Refused(answers=[redirect(location)])
        for location in (
            "file:///etc/passwd", "ftp://127.0.0.1/x", "data:text/plain,x", "gopher://127.0.0.1/",
            "http:///etc/passwd", "http://127.0.0.1:99999/", "http://[bad",
        )
    },
}  # fmt: skip


def try_right(folder: Path, case: Right) -> None:
    """Download and compare bytes and requests."""
    requests = run_download(folder, case.answers, BODY, case.before)
    assert load_artifact(folder / "out").path.joinpath("files/corpus.txt").read_bytes() == BODY
    for request, asked in zip(requests, case.asked, strict=False):
        assert asked in request, request
    assert len(requests) >= len(case.asked)


def try_refused(folder: Path, case: Refused) -> None:
    """Expect the download to fail."""
    try:
        run_download(folder, case.answers, BODY)
    except (DataError, DiskFullError, ConnectionError) as error:
        assert isinstance(error, case.error) and case.saying in str(error), error
        assert "download.corpus.url" in str(error)
    else:
        raise AssertionError("it was taken")
    assert not is_finished(folder / "out"), "published"
    assert not [one for one in (folder / "out").rglob("*") if one.is_file()], "kept by its name"


def try_bomb(folder: Path) -> None:
    """Download the right bytes, which decompress to far more when they are cleaned."""
    bomb = gzip.compress(bytes(BOMB_BYTES), mtime=0)
    run_download(folder, [answer(bomb)], bomb, name="corpus.txt.gz")
    try:
        run_clean(folder / "clean", {"corpus.txt.gz": bomb})
    except DataError as error:
        assert "decompress to more than" in str(error)
    else:
        raise AssertionError("it was decompressed")


def run_download(
    folder: Path,
    answers: Sequence[Answer],
    expected: bytes,
    before: bytes = b"",
    name: str = "corpus.txt",
) -> list[str]:
    """Run the stage against a server that gives `answers`; return the requests it got."""
    sha256 = hashlib.sha256(expected).hexdigest()
    job = Job(stage="download", role="corpus", settings={})
    job.out, job.work = folder / "out", folder / "work"
    job.work.mkdir()
    if before:
        (job.work / f"{sha256[:16]}.partial").write_bytes(before)
    patient = mock.patch("llm.data.sources.http.FetchLimits", lambda: LIMITS)
    with HostileServer(answers) as server, patient, mock.patch.dict("os.environ", no_proxy="*"):
        job.settings = {"kind": "url", "url": f"{server.url}/{name}", "sha256": sha256}
        writer = ArtifactWriter(job.out)
        finish(job, writer, download(job, writer))
    return server.requests


def _case(function: Callable[..., None], case: Right | Refused) -> Case:
    return lambda folder: function(folder, case)


DOWNLOAD_CASES: dict[str, Case] = {
    **{f"right: {name}": _case(try_right, case) for name, case in RIGHT.items()},
    **{f"refused: {name}": _case(try_refused, case) for name, case in REFUSED.items()},
    "refused: a bomb, by clean": try_bomb,
}
