"""Connections over http(s): each name looked up once, a proxy where there is one, a deadline.

Nothing but http and https is spoken.
"""

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


class Names:
    """The addresses of hosts, each asked for once: what was checked is what is connected to."""

    def __init__(self) -> None:
        self._found: dict[str, list[tuple[socket.AddressFamily, tuple[str, int]]]] = {}

    def addresses(self, host: str) -> list[tuple[socket.AddressFamily, tuple[str, int]]]:
        """Return family and address, none for a host that nobody knows, or a proxy alone."""
        if host not in self._found:
            try:
                entries = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
            except (OSError, ValueError):
                entries = []
            self._found[host] = [(entry[0], cast(tuple[str, int], entry[4])) for entry in entries]
        return self._found[host]

    def are_internal(self, host: str) -> bool:
        """Tell whether a host is this machine or one in its private network."""
        found = {address[0].partition("%")[0] for _, address in self.addresses(host)}
        return any(not ipaddress.ip_address(address).is_global for address in found)

    def connect(self, host: str, port: int, seconds: float) -> socket.socket:
        """Connect to the first address of `host` that answers.

        Raises:
            OSError: none does.
        """
        failure = OSError(f"no address of {host} is known")
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
    """How to ask for an address: of its own server, or of a proxy."""

    connection: http.client.HTTPConnection
    """Of the server, in name; where a proxy is between, of the proxy."""
    target: str
    """What to ask for."""
    headers: dict[str, str]
    """For the proxy."""
    tls: ssl.SSLContext | None
    is_direct: bool

    def connect(self, names: Names, seconds: float) -> None:
        """Connect to an address of the server that was looked up before; to a proxy by its name."""
        if not self.is_direct:
            return  # http.client does; which address the name has is the proxy's to know
        host, port = self.connection.host, self.connection.port
        self.connection.sock = names.connect(host, port, seconds)
        if self.tls is not None:
            self.connection.sock = self.tls.wrap_socket(self.connection.sock, server_hostname=host)


def find_route(url: str, setting: str, seconds: float) -> Route:
    """Return how to ask for `url`, with a time-out of `seconds` for each answer.

    Raises:
        DataError: it is no address, or one of neither http nor https; names `setting`.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname, parts.port
        (host or "").encode("idna")
    except ValueError as error:  # UnicodeError is one
        raise DataError(f"{setting}: {shown(url)}: no valid address: {error}") from error
    if parts.scheme not in ("http", "https") or not host:
        raise DataError(
            f"{setting}: led to {shown(url)}; only http:// and https:// addresses are followed"
        )
    target = urllib.parse.quote(parts.path or "/", safe=PATH_CHARACTERS)
    target += f"?{urllib.parse.quote(parts.query, safe=PATH_CHARACTERS)}" if parts.query else ""
    proxy = urllib.request.getproxies().get(parts.scheme)
    is_direct = proxy is None or bool(urllib.request.proxy_bypass(host))
    via = urllib.parse.urlsplit(proxy if proxy and "//" in proxy else f"//{proxy}")
    login = f"{urllib.parse.unquote(via.username or '')}:{urllib.parse.unquote(via.password or '')}"
    authorization = f"Basic {base64.b64encode(login.encode()).decode()}"
    headers = {"Proxy-Authorization": authorization} if via.username and not is_direct else {}
    if port is None:  # without one http.client takes the end of an IPv6 address for it
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
    """Break `connection` when the block takes longer: a time-out starts anew with each byte."""

    is_over = threading.Event()

    def break_off() -> None:
        is_over.set()
        with contextlib.suppress(AttributeError, OSError):  # not connected, or closed by now
            connection.sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, break_off)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if is_over.is_set():  # http.client takes a head that breaks off for a whole one
        raise TimeoutError(f"not answered within {seconds:g} seconds")


def shown(url: str) -> str:
    """Return the address without login and query, which may hold a secret."""
    return re.sub(r"//[^/]*@", "//", re.split(r"[?#]", url, maxsplit=1)[0])
