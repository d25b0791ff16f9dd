"""Which requests the guard accepts, and the headers of its responses."""

import asyncio
import os
import re
import socket
from collections.abc import Mapping
from typing import Any, cast

import pytest

from flows.services.guard import LocalOnly, is_own_connection, refusal


def scope(headers: Mapping[str, str]) -> dict[str, Any]:
    encoded = [(name.lower().encode(), text.encode()) for name, text in headers.items()]
    return {"type": "http", "headers": encoded, "client": None, "server": ("127.0.0.1", 4200)}


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "127.0.0.1:4200"},
        {"Host": "localhost:4200"},
        {"Host": "[::1]:4200"},
        {"Host": "localhost:9999"},  # through a tunnel
        {"Host": "127.0.0.1:4200", "Origin": "http://127.0.0.1:4200"},
        {"Host": "127.0.0.1:4200", "Origin": "http://localhost:4200"},
        {"Host": "localhost:9999", "Origin": "http://localhost:9999"},
    ],
)
def test_this_machine_and_the_servers_own_pages_are_accepted(headers: dict[str, str]) -> None:
    assert refusal(scope(headers)) == ""


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Host": ""},
        {"Host": "evil.example"},
        {"Host": "evil.example:4200"},
        {"Host": "127.0.0.1.evil.example:4200"},
        {"Host": "evil.example@127.0.0.1.evil:4200"},
        {"Host": "192.168.1.2:4200"},
        {"Host": "127.0.0.1:4200", "Origin": "null"},
        {"Host": "127.0.0.1:4200", "Origin": ""},
        {"Host": "127.0.0.1:4200", "Origin": "http://evil.example:4200"},
        {"Host": "127.0.0.1:4200", "Origin": "http://127.0.0.1:3000"},
        {"Host": "127.0.0.1:4200", "Origin": "http://localhost"},
        {"Host": "127.0.0.1:4200", "Origin": "file://"},
        {"Host": "[127.0.0.1:4200"},
    ],
)
def test_other_names_and_other_pages_are_refused(headers: dict[str, str]) -> None:
    assert refusal(scope(headers))


def test_an_own_connection_is_recognized_through_a_mapped_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        for family, name in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::ffff:127.0.0.1")):
            with socket.socket(family) as client:
                try:
                    client.connect((name, server.getsockname()[1]))
                except OSError:
                    pytest.skip("no IPv6 here")
                accepted, address = server.accept()
                with accepted:
                    assert is_own_connection(address, server.getsockname())


@pytest.mark.skipif(not hasattr(socket, "AF_NETLINK"), reason="needs Linux's sock_diag")
def test_a_connection_of_another_account_or_of_none_is_not_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        address = client.getsockname()
        if os.getuid() != 0:  # root's connections are let in whoever serves
            monkeypatch.setattr(os, "getuid", lambda: 12345)
            assert not is_own_connection(address, server.getsockname())
            monkeypatch.undo()
        assert is_own_connection(address, server.getsockname())
        client.close()
        assert not is_own_connection(address, server.getsockname())
        assert not is_own_connection(("127.0.0.1", 1), server.getsockname())


def test_every_answer_keeps_pages_to_this_machine_and_out_of_frames() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        own = [(b"Content-Type", b"text/html"), (b"X-Frame-Options", b"SAMEORIGIN")]
        await send({"type": "http.response.start", "status": 200, "headers": own})

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    request = scope({"Host": "127.0.0.1:4200"})
    asyncio.run(LocalOnly(app)(request, cast(Any, None), send))
    headers = dict(sent[0]["headers"])
    assert headers[b"Content-Type"] == b"text/html"
    assert headers[b"x-frame-options"] == b"DENY" and b"X-Frame-Options" not in headers
    policy = headers[b"content-security-policy"].decode()
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy
    hosts = set(re.findall(r"\b(?:https?|wss?)://[^\s;]+", policy))
    assert {host.partition("//")[2] for host in hosts} == {"127.0.0.1:*", "localhost:*"}
    assert "*" not in policy.replace(":*", "")
    (scripts,) = re.findall(r"script-src ([^;]*)", policy)
    assert "unsafe-inline" not in scripts
