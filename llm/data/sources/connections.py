"""HTTP(S) connections with cached name resolution, proxies and a deadline."""

import base64
import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import urllib.parse
import urllib.request
from collections.abc import Generator
from dataclasses import dataclass
from typing import cast

from llm.errors import DataError

PATH_CHARACTERS = "/%:@!$&'()*+,;=~?"


class Resolver:
    """Resolves each host once, so that the address that was checked is the one connected to."""

    def __init__(self) -> None:
        self._found: dict[str, list[tuple[socket.AddressFamily, tuple[str, int]]]] = {}

    def addresses(self, host: str) -> list[tuple[socket.AddressFamily, tuple[str, int]]]:
        """Return (family, address) pairs; none for a host that cannot be resolved here."""
        if host not in self._found:
            try:
                entries = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
            except (OSError, ValueError):
                entries = []
            self._found[host] = [(entry[0], cast(tuple[str, int], entry[4])) for entry in entries]
        return self._found[host]

    def is_internal(self, host: str) -> bool:
        """Return whether a host is this machine or in its private network."""
        found = {address[0].partition("%")[0] for _, address in self.addresses(host)}
        return any(not ipaddress.ip_address(address).is_global for address in found)

    def connect(self, host: str, port: int, seconds: float) -> socket.socket:
        """Connect to the first address of `host` that answers.

        Raises:
            OSError: none does.
        """
        failure = OSError(f"cannot resolve {host}")
        for family, address in self.addresses(host):
            connection = socket.socket(family, socket.SOCK_STREAM)
            try:
                connection.settimeout(seconds)
                connection.connect((address[0], port, *address[2:]))
                return connection
            except OSError as error:
                connection.close()
                failure = error
        raise failure


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """How to request a URL: from its own server or through a proxy."""

    connection: http.client.HTTPConnection
    """To the proxy, if there is one."""
    target: str
    """Request target."""
    headers: dict[str, str]
    """Sent to the proxy."""
    tls: ssl.SSLContext | None
    is_direct: bool

    def connect(self, resolver: Resolver, seconds: float) -> None:
        """Connect to a resolved address of the server."""
        if not self.is_direct:
            return  # http.client connects to the proxy, which resolves the name
        host, port = self.connection.host, self.connection.port
        self.connection.sock = resolver.connect(host, port, seconds)
        if self.tls is not None:
            self.connection.sock = self.tls.wrap_socket(self.connection.sock, server_hostname=host)


def find_route(url: str, setting: str, seconds: float) -> Route:
    """Return how to request `url`, with a timeout of `seconds` for each response.

    Raises:
        DataError: not a valid http or https URL; names `setting`.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port
        (host or "").encode("idna")
    except ValueError as error:  # UnicodeError is one
        raise DataError(f"{setting}: {shown(url)}: invalid URL: {error}") from error
    if parts.scheme not in ("http", "https") or not host:
        raise DataError(
            f"{setting}: led to {shown(url)}; only http:// and https:// URLs are followed"
        )
    target = urllib.parse.quote(parts.path or "/", safe=PATH_CHARACTERS)
    target += f"?{urllib.parse.quote(parts.query, safe=PATH_CHARACTERS)}" if parts.query else ""
    proxy = urllib.request.getproxies().get(parts.scheme)
    is_direct = proxy is None or bool(urllib.request.proxy_bypass(host))
    via = urllib.parse.urlsplit(proxy if proxy and "//" in proxy else f"//{proxy}")
    login = f"{urllib.parse.unquote(via.username or '')}:{urllib.parse.unquote(via.password or '')}"
    authorization = f"Basic {base64.b64encode(login.encode()).decode()}"
    headers = {"Proxy-Authorization": authorization} if via.username and not is_direct else {}
    if port is None:  # http.client would parse the end of an IPv6 address as a port
        port = http.client.HTTPS_PORT if parts.scheme == "https" else http.client.HTTP_PORT
    first_host, first_port = (host, port) if is_direct else (via.hostname or "", via.port)
    if parts.scheme == "http":
        return Route(
            connection=http.client.HTTPConnection(first_host, first_port, timeout=seconds),
            target=target if is_direct else f"http://{parts.netloc}{target}",
            headers=headers,
            tls=None,
            is_direct=is_direct,
        )
    tls = ssl.create_default_context()
    connection = http.client.HTTPSConnection(first_host, first_port, timeout=seconds, context=tls)
    if not is_direct:
        connection.set_tunnel(host, port, headers)
    return Route(connection=connection, target=target, headers={}, tls=tls, is_direct=is_direct)


@contextlib.contextmanager
def deadline(connection: http.client.HTTPConnection, seconds: float) -> Generator[None]:
    """Break `connection` if the block takes longer; a socket timeout restarts with each byte."""

    is_over = threading.Event()

    def break_off() -> None:
        is_over.set()
        with contextlib.suppress(AttributeError, OSError):  # not connected, or closed already
            connection.sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, break_off)
    timer.daemon = True
    timer.start()
    error = None
    try:
        yield
    except OSError as found:  # bytes after the break reset the connection
        if not is_over.is_set():
            raise
        error = found
    finally:
        timer.cancel()
    if is_over.is_set():  # http.client accepts a truncated response head
        raise TimeoutError(f"not answered within {seconds:g} seconds") from error


def shown(url: str) -> str:
    """Return the URL without login and query, which may hold secrets."""
    return re.sub(r"//[^/]*@", "//", re.split(r"[?#]", url, maxsplit=1)[0])
