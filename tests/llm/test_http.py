"""Downloads over HTTP: the right bytes or a typed error, whatever the server does."""

import dataclasses
import hashlib
import http.client
import itertools
import random
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data.sources.connections import Resolver, deadline, find_route
from llm.data.sources.http import FetchLimits, fetch_file, file_name, redirect_target
from llm.errors import DataError, DiskFullError
from tests.llm.http_server import Answer, HostileServer, answer, drip, redirect, serve_ranges

BODY = random.Random(1).randbytes(300_000)
OTHER = random.Random(2).randbytes(300_000)
SETTING = "download.corpus.url"
LIMITS = FetchLimits(
    first_wait_seconds=0.001,
    max_wait_seconds=0.01,
    answer_seconds=0.5,
    slow_seconds=0.2,
    min_bytes_per_second=100_000,
    max_undeclared_bytes=3 << 20,
)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def fetch_all(
    answers: list[Answer], partial: Path, expected: bytes = BODY, path: str = "/corpus.txt"
) -> list[str]:
    """Fetch from a server with the given `answers`; return its requests."""
    with HostileServer(answers) as server:
        for _ in fetch_file(server.url + path, sha256(expected), partial, SETTING, LIMITS):
            pass
    assert partial.read_bytes() == expected
    return server.requests


def test_the_bytes_arrive_and_progress_is_reported(tmp_path: Path) -> None:
    with HostileServer([answer(BODY)]) as server:
        steps = list(fetch_file(server.url, sha256(BODY), tmp_path / "p", SETTING, LIMITS))
    assert (tmp_path / "p").read_bytes() == BODY
    assert steps[-1] == (len(BODY), len(BODY))
    assert steps == sorted(steps)


def test_a_body_cut_off_is_continued_by_range_and_only_if_it_is_the_same(tmp_path: Path) -> None:
    first, second = (
        serve_ranges(BODY, etag='"v1"', most_bytes=100_000),
        serve_ranges(BODY, etag='"v1"'),
    )
    requests = fetch_all([first, second], tmp_path / "p")
    assert "Range" not in requests[0]
    assert "Range: bytes=100000-" in requests[1] and 'If-Range: "v1"' in requests[1]


def test_a_killed_fetch_goes_on_where_it_was(tmp_path: Path) -> None:
    partial = tmp_path / "p"
    with HostileServer([serve_ranges(BODY, most_bytes=120_000)]) as server:
        steps = fetch_file(server.url, sha256(BODY), partial, SETTING, LIMITS)
        while next(steps)[0] < 120_000:
            pass
        del steps
    requests = fetch_all([serve_ranges(BODY)], partial)
    assert "Range: bytes=120000-" in requests[0]


def test_a_whole_partial_file_needs_no_network(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(BODY)
    url = "http://127.0.0.1:9/"
    assert list(fetch_file(url, sha256(BODY), tmp_path / "p", SETTING, LIMITS)) == []


@pytest.mark.parametrize("is_if_range_obeyed", [True, False])
@pytest.mark.parametrize("etags", [('"v1"', '"v2"'), ("", ""), ('W/"v1"', 'W/"v2"')])
def test_a_file_that_changes_mid_way_is_fetched_anew(
    tmp_path: Path, etags: tuple[str, str], is_if_range_obeyed: bool
) -> None:
    old = serve_ranges(OTHER, etag=etags[0], most_bytes=100_000)
    new = serve_ranges(BODY, etag=etags[1], is_if_range_obeyed=is_if_range_obeyed)
    fetch_all([old, new], tmp_path / "p")


@pytest.mark.parametrize(
    "wrong",
    [
        answer(OTHER),
        answer(BODY, declared_bytes=len(BODY) - 1),
        answer(BODY + b"x"),
        answer(b""),
        answer(OTHER, declared_bytes=None),
    ],
    ids=["other", "declared shorter", "longer", "empty", "other, undeclared"],
)
def test_wrong_bytes_are_an_error_and_nothing_is_kept(tmp_path: Path, wrong: Answer) -> None:
    with pytest.raises(DataError, match=rf"{SETTING}: .* sha256 \w+, expected {sha256(BODY)}"):
        fetch_all([wrong], tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_body_always_shorter_than_declared_is_a_network_failure(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match="5 times in a row; 1,000 bytes are kept"):
        fetch_all([answer(BODY[:1000], declared_bytes=len(BODY)), answer(b"", "503 Busy")],
                  tmp_path / "p")  # fmt: skip


def test_tries_are_not_used_up_while_the_body_grows(tmp_path: Path) -> None:
    body = BODY * 30  # 9 MB in parts of 1.1 MB: more parts than tries
    requests = fetch_all([serve_ranges(body, most_bytes=1_100_000)], tmp_path / "p", body)
    assert len(requests) == 9


@pytest.mark.parametrize(
    "location",
    [
        "file:///etc/passwd", "ftp://127.0.0.1/x", "data:text/plain,x", "gopher://127.0.0.1/",
        "//", "http://", "http://[bad", "http://127.0.0.1:99999/", "http:///etc/passwd",
    ],
)  # fmt: skip
def test_a_redirect_anywhere_but_to_http_is_refused(tmp_path: Path, location: str) -> None:
    with pytest.raises(DataError, match=SETTING):
        fetch_all([redirect(location)], tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_redirects_are_followed_but_not_for_ever(tmp_path: Path) -> None:
    requests = fetch_all([redirect("/there?a=b"), answer(BODY)], tmp_path / "p")
    assert requests[1].startswith("GET /there?a=b HTTP/1.1")
    with pytest.raises(DataError, match="more than 10 redirects"):
        fetch_all([redirect("/round")], tmp_path / "q")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True), ("127.1", True), ("2130706433", True), ("0x7f.1", True),
        ("localhost", True), ("0.0.0.0", True), ("10.1.2.3", True), ("172.16.0.1", True),
        ("192.168.0.1", True), ("169.254.169.254", True), ("100.64.0.1", True), ("::1", True),
        ("fe80::1", True), ("fd00::1", True), ("::ffff:127.0.0.1", True),
        ("8.8.8.8", False), ("2001:4860:4860::8888", False),
    ],
)  # fmt: skip
def test_this_machine_and_its_network_are_known_however_they_are_written(
    host: str, expected: bool
) -> None:
    assert Resolver().is_internal(host) == expected


@pytest.mark.parametrize(
    ("first", "url", "location", "is_refused"),
    [
        ("https://8.8.8.8/a", "https://8.8.8.8/a", "http://8.8.8.8/a", True),
        ("http://8.8.8.8/a", "https://8.8.4.4/a", "http://8.8.8.8/a", True),
        ("http://8.8.8.8/a", "http://8.8.8.8/a", "https://8.8.4.4/a", False),
        ("http://8.8.8.8/a", "http://8.8.8.8/a", "http://127.0.0.1/a", True),
        ("http://8.8.8.8/a", "http://8.8.8.8/a", "//localhost/a", True),
        ("http://8.8.8.8/a", "http://8.8.8.8/a", "http://169.254.169.254/latest", True),
        ("http://8.8.8.8/a", "http://8.8.4.4/a", "http://[::1]/a", True),
        ("http://10.0.0.1/a", "http://10.0.0.1/a", "http://10.0.0.2/a", False),
        ("http://127.0.0.1/a", "http://127.0.0.1/a", "http://8.8.8.8/a", False),
        ("http://127.0.0.1/a", "http://8.8.8.8/a", "http://127.0.0.1:9/a", False),
        ("http://8.8.8.8/a", "http://8.8.8.8/a", "/b", False),
    ],
)
def test_a_redirect_neither_leaves_https_nor_leads_into_a_private_network(
    first: str, url: str, location: str, is_refused: bool
) -> None:
    if is_refused:
        with pytest.raises(DataError, match=rf"{SETTING}: http.* redirects "):
            redirect_target(url, location, first, SETTING, Resolver())
    else:
        assert redirect_target(url, location, first, SETTING, Resolver()).startswith("http")


class Network:
    """Host names that resolve differently each time, and public addresses served locally.

    `connected` lists the addresses of the requested connections.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **answers: list[str]) -> None:
        self.connected: list[str] = []
        self.served: dict[str, str] = {}
        connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo

        def look_up(host: str, port: int, *rest: Any, **more: Any) -> Any:
            found = answers.get(host.partition(".")[0], [host])
            address = found.pop(0) if len(found) > 1 else found[0]
            if not address:
                raise socket.gaierror(-2, "Name or service not known")
            return getaddrinfo(address, port, *rest, **more)

        def connect_here(self_: socket.socket, address: tuple[str, int]) -> None:
            self.connected.append(address[0])
            served = self.served.get(address[0])
            here = ("127.0.0.1", int(served.rpartition(":")[2])) if served else address
            connect(self_, here)

        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        monkeypatch.setattr(socket.socket, "connect", connect_here)


@pytest.mark.parametrize(
    "answers", [["8.8.4.4", "127.0.0.1"], ["", "127.0.0.1"], ["8.8.4.4", "::1"]]
)
def test_a_name_that_changes_its_address_after_the_check_leads_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: list[str]
) -> None:
    network = Network(monkeypatch, first=["8.8.8.8"], second=answers)
    with HostileServer([answer(OTHER)]) as private, HostileServer([answer(BODY)]) as public:
        port = private.url.rpartition(":")[2]
        with HostileServer([redirect(f"http://second.example:{port}/x")]) as first:
            network.served = {"8.8.8.8": first.url, "8.8.4.4": public.url}
            steps = fetch_file("http://first.example/x", sha256(BODY), tmp_path / "p", SETTING,
                          dataclasses.replace(LIMITS, max_tries=1))  # fmt: skip
            if answers[0]:
                list(steps)
                assert f"Host: second.example:{port}" in public.requests[0]
            else:
                with pytest.raises(ConnectionError, match="cannot resolve second"):
                    list(steps)
    assert private.requests == [] and set(network.connected) <= {"8.8.8.8", "8.8.4.4"}
    assert "Host: first.example\r\n" in first.requests[0]


def test_a_redirect_to_the_same_name_goes_to_the_same_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Network(monkeypatch, first=["8.8.8.8", "127.0.0.1"])
    with HostileServer([answer(OTHER)]) as private:
        port = private.url.rpartition(":")[2]
        away = redirect(f"http://first.example:{port}/x")
        with HostileServer([away, answer(BODY)]) as first:
            network.served = {"8.8.8.8": first.url}
            list(
                fetch_file("http://first.example/x", sha256(BODY), tmp_path / "p", SETTING, LIMITS)
            )
    assert private.requests == [] and set(network.connected) == {"8.8.8.8"}


def test_a_name_with_one_private_address_of_two_is_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Network(monkeypatch, first=["8.8.8.8"])
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in
             ("8.8.4.4", "10.0.0.1")]  # fmt: skip
    known = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *a, **k: found if "two" in host else known(host, *a, **k),
    )
    with HostileServer([redirect("http://two.example/x")]) as first:
        network.served = {"8.8.8.8": first.url}
        with pytest.raises(DataError, match=r"redirects into the private network, to http://two"):
            list(
                fetch_file("http://first.example/x", sha256(BODY), tmp_path / "p", SETTING, LIMITS)
            )


def test_tls_names_the_server_and_trusts_no_certificate_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Network(monkeypatch, first=["8.8.8.8"])
    hello: list[bytes] = []

    def serve(listener: socket.socket) -> None:
        with listener.accept()[0] as connection:
            hello.append(connection.recv(65536))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        network.served = {"8.8.8.8": f":{listener.getsockname()[1]}"}
        thread = threading.Thread(target=serve, args=[listener])
        thread.start()
        with pytest.raises(ConnectionError, match="no response"):
            limits = dataclasses.replace(LIMITS, max_tries=1)
            list(
                fetch_file("https://first.example/x", sha256(BODY), tmp_path / "p", SETTING, limits)
            )
        thread.join()
    assert b"first.example" in hello[0]  # server_name, RFC 6066, is not encrypted
    route = find_route("https://first.example/x", SETTING, 1.0)
    assert route.tls is not None and route.tls.check_hostname


def test_an_address_of_ipv6_needs_no_port() -> None:
    for scheme, port in (("http", 80), ("https", 443)):
        connection = find_route(f"{scheme}://[::1]/x", SETTING, 1.0).connection
        assert (connection.host, connection.port) == ("::1", port)


def test_authorization_is_sent_to_the_first_server_alone(tmp_path: Path) -> None:
    with HostileServer([answer(BODY)]) as other:
        address = other.url.replace("127.0.0.1", "localhost")
        with HostileServer([redirect("/again"), redirect(f"{address}/x")]) as server:
            url, partial = server.url, tmp_path / "p"
            list(
                fetch_file(
                    url, sha256(BODY), partial, SETTING, LIMITS, authorization="Bearer secret"
                )
            )
    assert all("Authorization: Bearer secret" in request for request in server.requests)
    assert "Authorization" not in other.requests[0]


def test_an_endless_body_is_cut_off(tmp_path: Path) -> None:
    def send(connection: socket.socket, request: str) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in itertools.repeat(None, 1000):
            connection.sendall(bytes(1 << 20))

    with pytest.raises(DataError, match=r"and more than 3,145,728 bytes"):
        fetch_all([send], tmp_path / "p")


@pytest.mark.parametrize(
    "head", [b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n", b"HTTP/1.1 200 OK\r\nSlow: "]
)
def test_a_server_that_drips_is_given_up(tmp_path: Path, head: bytes) -> None:
    fetch_all([drip(head), serve_ranges(BODY, is_if_range_obeyed=False)], tmp_path / "p")


def test_a_server_that_drips_its_head_for_ever_is_a_network_failure(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match=r"not answered within 0.5 seconds"):
        fetch_all([drip(b"HTTP/1.1 200 OK\r\nSlow: ")], tmp_path / "p")


def test_a_reset_after_the_deadline_is_a_timeout_too() -> None:
    connection = http.client.HTTPConnection("127.0.0.1", 9)
    with (
        pytest.raises(TimeoutError, match=r"not answered within 0.01 seconds"),
        deadline(connection, 0.01),
    ):
        time.sleep(0.2)  # the timer breaks the connection
        raise ConnectionResetError("Connection reset by peer")


def test_a_head_that_breaks_off_is_tried_again(tmp_path: Path) -> None:
    fetch_all(
        [lambda connection, _: connection.sendall(b"HTTP/1.1 200 OK\r\nContent-"), answer(BODY)],
        tmp_path / "p",
    )


@pytest.mark.parametrize(
    "fault",
    [
        answer(b"", "503 Busy", "Retry-After: 1"),
        answer(b"", "429 Too Many Requests", "Retry-After: Wed, 21 Oct 2015 07:28:00 GMT"),
        answer(b"", "416 Range Not Satisfiable"),
        answer(BODY, "206 Partial Content"),
        lambda connection, request: None,
        lambda connection, request: connection.sendall(b"no http at all\r\n\r\n"),
        lambda connection, request: connection.sendall(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200),
        answer(b"ff\r\nbroken", "200 OK", "Transfer-Encoding: chunked", declared_bytes=None),
        answer(b"zz\r\nbroken", "200 OK", "Transfer-Encoding: chunked", declared_bytes=None),
    ],
)  # fmt: skip
def test_a_passing_fault_is_tried_again_and_a_lasting_one_is_a_network_failure(
    tmp_path: Path, fault: Answer
) -> None:
    fetch_all([fault, answer(BODY)], tmp_path / "p")
    with pytest.raises(ConnectionError, match=SETTING):
        fetch_all([fault], tmp_path / "q")


@pytest.mark.parametrize("size_bytes", [1, 300_000, 400_000])
def test_a_partial_file_the_server_cannot_continue_is_started_anew(
    tmp_path: Path, size_bytes: int
) -> None:
    (tmp_path / "p").write_bytes(OTHER[:size_bytes] + bytes(max(0, size_bytes - len(OTHER))))
    other_part = answer(BODY, "206 Partial Content", "Content-Range: bytes 0-299999/300000")
    fetch_all([other_part, answer(b"", "416 No"), answer(BODY)], tmp_path / "p")


@pytest.mark.parametrize("status", ["404 Not Found", "403 Forbidden", "204 No Content", "304 Same"])
def test_a_refusal_is_an_error_at_once(tmp_path: Path, status: str) -> None:
    with pytest.raises(DataError, match=f"answered {status}"):
        fetch_all([answer(b"", status)], tmp_path / "p")


def test_compressed_bytes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="compressed as gzip"):
        fetch_all([answer(BODY, "200 OK", "Content-Encoding: gzip")], tmp_path / "p")


def test_a_chunked_body_is_read(tmp_path: Path) -> None:
    chunked = b"".join(
        b"%x\r\n%s\r\n" % (len(part), part) for part in (BODY[:1000], BODY[1000:], b"")
    )
    fetch_all([answer(chunked, "200 OK", "Transfer-Encoding: chunked", declared_bytes=None)],
              tmp_path / "p")  # fmt: skip


def test_no_server_is_a_network_failure_and_the_login_is_not_shown(tmp_path: Path) -> None:
    url = "http://me:secret@127.0.0.1:9/x?token=secret"
    with pytest.raises(ConnectionError) as failure:
        list(fetch_file(url, sha256(BODY), tmp_path / "p", SETTING, LIMITS))
    assert "http://127.0.0.1:9/x:" in str(failure.value)
    assert "secret" not in str(failure.value)


def test_a_file_larger_than_the_disk_is_refused_before_it_comes(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match=r"bytes are needed .* free"):
        fetch_all([answer(b"x", declared_bytes=1 << 60)], tmp_path / "p")


def test_a_proxy_is_asked_for_the_whole_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("no_proxy")
    with HostileServer([answer(BODY)]) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.replace("//", "//me:pass@"))
        url = "http://example.invalid/corpus.txt"
        list(fetch_file(url, sha256(BODY), tmp_path / "p", SETTING, LIMITS))
    assert proxy.requests[0].startswith(f"GET {url} HTTP/1.1")
    assert "Proxy-Authorization: Basic bWU6cGFzcw==" in proxy.requests[0]


MISBEHAVIORS = st.one_of(
    st.builds(
        serve_ranges,
        st.sampled_from([BODY, OTHER]),
        etag=st.sampled_from(["", '"v1"', '"v2"']),
        most_bytes=st.integers(0, len(BODY)),
        is_if_range_obeyed=st.booleans(),
    ),
    st.builds(
        answer,
        st.sampled_from([BODY, OTHER, BODY[:1000], b""]),
        st.sampled_from(["200 OK", "206 Partial Content", "416 No", "500 Broken", "404 No"]),
        declared_bytes=st.sampled_from([-1, None, 0, 1000, len(BODY), 10**6]),
    ),
    st.sampled_from([redirect("/"), redirect("file:///etc/passwd")]),
)


@given(st.lists(MISBEHAVIORS, min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_the_end_is_the_right_bytes_or_a_typed_failure(answers: list[Answer]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        partial = Path(folder, "p")
        try:
            fetch_all(answers, partial)
        except (DataError, ConnectionError) as failure:
            assert SETTING in str(failure)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("http://a/b/corpus.jsonl?x=/y.txt", "corpus.jsonl"),
        ("http://a/..%2f..%2fetc/%2e%2e%2fpasswd.txt", "passwd.txt"),
        ("http://a/b%00c%0a.txt", "b_c_.txt"),
        ("http://a/.hidden.txt", "hidden.txt"),
        ("http://a/..", "file"),
        ("http://a", "file"),
    ],
)
def test_a_file_name_stays_in_its_folder(url: str, name: str) -> None:
    assert file_name(url) == name
