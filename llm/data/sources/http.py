"""Fetch a file of known sha256 over HTTP(S), with retries and resumption by range requests.

A partial file survives kills, and the next attempt requests the remainder. Redirects stay on http
and https. Progress is yielded to the caller.
"""

import contextlib
import http.client
import json
import os
import re
import shutil
import ssl
import time
import urllib.parse
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from llm.artifact import file_sha256, write_json_atomically
from llm.data.sources.connections import Resolver, deadline, find_route, shown
from llm.errors import DataError, DiskFullError
from llm.runtime.disk import refuse_full_disk

FETCH_BLOCK_BYTES = 1 << 20
REDIRECTS = (301, 302, 303, 307, 308)
RETRYABLE = (408, 425, 429, 500, 502, 503, 504)
MAX_REDIRECTS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchLimits:
    """Timeouts and retries."""

    max_tries: int = 5
    """Consecutive attempts that advance by less than 1 MiB."""
    answer_seconds: float = 30.0
    """Timeout to connect, for the response head, and between two parts of the body."""
    first_wait_seconds: float = 1.0
    """Before the second attempt; doubles with each further one."""
    max_wait_seconds: float = 60.0
    """Upper limit, also of Retry-After."""
    min_bytes_per_second: int = 1024
    """A body slower than this over `slow_seconds` is abandoned and resumed."""
    slow_seconds: float = 60.0
    max_undeclared_bytes: int = 64 << 30
    """Limit of a body without Content-Length."""


class _Fault(Exception):
    """A failed attempt that can be retried after `wait_seconds` (Retry-After)."""

    def __init__(self, reason: str, wait_seconds: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds


def fetch_file(
    url: str,
    sha256: str,
    partial: Path,
    setting: str,
    limits: FetchLimits | None = None,
    *,
    authorization: str = "",
    digest_of: Callable[[Path], str] = file_sha256,
) -> Iterator[tuple[int, int]]:
    """Download `url` to the file `partial`, yielding (bytes so far, total bytes or 0).

    When the iterator ends, `partial` is complete and its `digest_of` is `sha256`. `authorization`
    is sent to the origin of `url` alone, never to one it redirects to.

    Raises:
        DataError: wrong bytes, or an unusable URL or response; names `setting`.
        ConnectionError: the network or the server failed `max_tries` times in a row.
    """
    limits = limits or FetchLimits()
    if partial.is_file() and digest_of(partial) == sha256:
        return
    num_failures, most_bytes, has_restarted = 0, _size(partial), False
    while True:
        resumed_at_bytes = _size(partial)
        try:
            total_bytes = 0
            for done_bytes, total_bytes in _fetch_rest(
                url, partial, setting, limits, authorization
            ):
                yield done_bytes, total_bytes
            found = digest_of(partial)
            if found == sha256:
                return
            partial.unlink()
            is_sure = resumed_at_bytes == 0 and total_bytes > 0  # one response of known length
            if is_sure or has_restarted:
                raise DataError(
                    f"{setting}: {shown(url)} gave bytes with the sha256 {found}, expected"
                    f" {sha256}; nothing was kept. Check the URL, or set {setting}'s sha256"
                    " if the new bytes are correct"
                )
            has_restarted = True
            raise _Fault("the received parts do not make the file")
        except _Fault as fault:
            num_failures += 1
            if (size_bytes := _size(partial)) >= most_bytes + FETCH_BLOCK_BYTES:
                num_failures, most_bytes = 1, size_bytes
            if num_failures >= limits.max_tries:
                raise ConnectionError(
                    f"{setting}: {shown(url)}: {fault}, {num_failures} times in a row;"
                    f" {size_bytes:,} bytes are kept and the next run resumes from there"
                ) from fault
            wait_seconds = limits.first_wait_seconds * 2 ** (num_failures - 1)
            wait_seconds = min(max(wait_seconds, fault.wait_seconds), limits.max_wait_seconds)
            yield from _wait(wait_seconds, size_bytes)


def file_name(url: str) -> str:
    """Return the last part of the URL's path as a plain file name."""
    last = urllib.parse.unquote(urllib.parse.urlsplit(url).path).rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._-]", "_", last).lstrip(".") or "file"


def _fetch_rest(
    url: str, partial: Path, setting: str, limits: FetchLimits, authorization: str
) -> Iterator[tuple[int, int]]:
    """Request what `partial` lacks and append it; start over if it cannot be resumed."""
    marks = partial.with_name(f"{partial.name}.etag.json")
    offset_bytes = _size(partial)
    etag = json.loads(marks.read_bytes())["etag"] if offset_bytes and marks.is_file() else ""
    headers = {"Accept-Encoding": "identity", "User-Agent": "fromscratch", "Connection": "close"}
    if authorization:
        headers["Authorization"] = authorization
    if offset_bytes:
        headers["Range"] = f"bytes={offset_bytes}-"
        if etag:
            headers["If-Range"] = etag
    with _open(url, headers, setting, limits) as response:
        new_etag = response.headers.get("ETag", "")
        if response.status == 206 and offset_bytes:
            begins = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            if begins is None or int(begins[1]) != offset_bytes or (etag and new_etag != etag):
                partial.unlink()
                raise _Fault("the server sent another range than requested")
        elif response.status == 200:
            offset_bytes = 0
            is_strong = new_etag.startswith('"')
            write_json_atomically(marks, {"etag": new_etag if is_strong else ""}, is_durable=False)
        else:
            partial.unlink(missing_ok=True)
            raise _Fault(
                f"the server answered {response.status} to {headers.get('Range', 'no range')}"
            )
        declared = response.length
        total_bytes = offset_bytes + declared if declared is not None else 0
        _refuse_full_disk(partial, declared or 0, total_bytes, setting)
        with (
            refuse_full_disk(partial, declared),
            partial.open("ab" if offset_bytes else "wb") as file,
        ):
            for done_bytes in _copy_body(response, file, offset_bytes, declared, setting, limits):
                yield done_bytes, total_bytes


def _copy_body(
    response: http.client.HTTPResponse,
    file: IO[bytes],
    offset_bytes: int,
    declared_bytes: int | None,
    setting: str,
    limits: FetchLimits,
) -> Iterator[int]:
    """Append the body to `file`, yielding the file's size."""
    done_bytes, window_bytes, window_ends_at = 0, 0, time.monotonic() + limits.slow_seconds
    while declared_bytes is None or done_bytes < declared_bytes:
        try:
            block = response.read1(FETCH_BLOCK_BYTES)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _Fault(
                f"the connection broke after {offset_bytes + done_bytes:,} bytes:"
                f" {error or type(error).__name__}"
            ) from error
        if not block and declared_bytes is not None:
            raise _Fault(f"the body ended after {done_bytes:,} of {declared_bytes:,} bytes")
        if not block:
            return
        file.write(block)
        done_bytes += len(block)
        window_bytes += len(block)
        if offset_bytes + done_bytes > limits.max_undeclared_bytes and declared_bytes is None:
            file.truncate(0)
            raise DataError(
                f"{setting}: the server sent no Content-Length and more than"
                f" {limits.max_undeclared_bytes:,} bytes; download it yourself and set kind=files"
            )
        if (now := time.monotonic()) >= window_ends_at:
            if window_bytes < limits.min_bytes_per_second * limits.slow_seconds:
                raise _Fault(
                    f"only {window_bytes:,} bytes arrived in {limits.slow_seconds:g} seconds"
                )
            window_bytes, window_ends_at = 0, now + limits.slow_seconds
        yield offset_bytes + done_bytes


@contextlib.contextmanager
def _open(
    url: str, headers: dict[str, str], setting: str, limits: FetchLimits
) -> Generator[http.client.HTTPResponse]:
    """Request `url`, follow redirects, and yield the response: 200, 206 or 416."""
    first_url, resolver = url, Resolver()
    for _ in range(MAX_REDIRECTS + 1):
        route = find_route(url, setting, limits.answer_seconds)
        connection = route.connection
        try:
            with deadline(connection, limits.answer_seconds):
                route.connect(resolver, limits.answer_seconds)
                connection.request("GET", route.target, headers={**headers, **route.headers})
                response = connection.getresponse()
        except ssl.SSLCertVerificationError as error:
            raise DataError(
                f"{setting}: {shown(url)}: the server's certificate is not trusted"
                f" ({error.verify_message}); correct the URL or this machine's certificates"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise _Fault(f"no response: {error or type(error).__name__}") from error
        try:
            if response.status not in REDIRECTS:
                _refuse_useless(response, url, setting)
                yield response
                return
            location = response.headers.get("Location", "")
            url = redirect_target(url, location, first_url, setting, resolver)
            if _origin(url) != _origin(first_url):
                headers.pop("Authorization", None)
        finally:
            response.close()
            connection.close()
    raise DataError(f"{setting}: more than {MAX_REDIRECTS} redirects, the last to {shown(url)}")


def redirect_target(
    url: str, location: str, first_url: str, setting: str, resolver: Resolver
) -> str:
    """Return the URL that `url` redirects to.

    Raises:
        DataError: an invalid URL; from https to http, where responses can be tampered with; or from
        the public network into the private one, whose data may not be public.
    """
    try:
        target = urllib.parse.urljoin(url, location)
        before, after, first = map(urllib.parse.urlsplit, (url, target, first_url))
        hosts = after.hostname or "", first.hostname or ""
    except ValueError as error:
        raise DataError(f"{setting}: {shown(url)} redirects to an invalid URL") from error
    if before.scheme == "https" and after.scheme == "http":
        raise DataError(
            f"{setting}: {shown(url)} redirects from https to {shown(target)}; set a URL"
            " that stays on https"
        )
    if (
        hosts[0] != hosts[1]
        and resolver.is_internal(hosts[0])
        and not resolver.is_internal(hosts[1])
    ):
        raise DataError(
            f"{setting}: {shown(url)} redirects into the private network, to {shown(target)};"
            " set that URL itself if you trust it"
        )
    return target


def _origin(url: str) -> tuple[str, str]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.netloc


def _refuse_useless(response: http.client.HTTPResponse, url: str, setting: str) -> None:
    """Raise unless the response has a usable body."""
    status = f"{response.status} {response.reason}".strip()
    if response.status in RETRYABLE:
        patience = response.headers.get("Retry-After", "")
        raise _Fault(
            f"the server answered {status}", float(patience) if patience.isdecimal() else 0
        )
    if response.status not in (200, 206, 416):
        raise DataError(f"{setting}: {shown(url)} answered {status}; check the URL")
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise DataError(
            f"{setting}: {shown(url)} sends its bytes compressed as {encoding}, although"
            " identity was requested; download the file yourself and set kind=files"
        )


def _refuse_full_disk(partial: Path, missing: int, total_bytes: int, setting: str) -> None:
    needed, free = missing + total_bytes, shutil.disk_usage(partial.parent).free
    if needed > free:
        raise DiskFullError(
            f"{setting}: {needed:,} bytes are needed to download and store the file, and"
            f" {partial.parent} has {free:,} free; free some or set runtime.artifacts_dir"
        )


def _wait(seconds: float, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Wait, yielding often so that the caller can stop."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        yield size_bytes, 0
        time.sleep(min(left, 0.2))


def _size(path: Path) -> int:
    return os.path.getsize(path) if path.is_file() else 0  # noqa: PTH202
