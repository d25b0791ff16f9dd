"""Files that lie elsewhere: moved and read without a moment in which a byte is in no place."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

from llm.artifact import ArtifactWriter, FileRecord, read_manifest
from llm.errors import ArtifactError, ConfigError, Interrupted, PlaceError
from llm.storage.elsewhere import ELSEWHERE, InStore, OnDisk, parse_place, read_elsewhere
from llm.storage.file_cache import ArtifactFiles, FileCache
from llm.storage.spread import bring_back, spread

REPOSITORY = Path(__file__).parents[2]
CONTENT = {
    f"{split}/{number:05}.{kind}.bin": f"{split} {number} {kind} ".encode() * 1000
    for split, count in (("train", 4), ("validation", 1))
    for number in range(count)
    for kind in ("tokens", "pieces")
}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """An artifact of five shards, two files each."""
    return write_rows(tmp_path / "artifact")


@pytest.fixture
def store() -> Iterator[str]:
    """A store in memory, emptied afterwards."""
    yield "memory://rows"
    fsspec.filesystem("memory").store.clear()


def write_rows(folder: Path, stage: str = "pack") -> Path:
    """Write an artifact of CONTENT."""
    writer = ArtifactWriter(folder)
    for name, data in CONTENT.items():
        writer.write_bytes(name, data)
    writer.write_bytes("pack.json", b"{}")
    writer.finish(stage=stage, summary={})
    return folder


def read_all(folder: Path, cache: FileCache | None = None) -> dict[str, bytes]:
    """Read every shard file, wherever it is."""
    files = ArtifactFiles(folder, cache)
    found: dict[str, bytes] = {}
    for name in CONTENT:
        with files.open(name) as file:
            found[name] = file.read()
    return found


def record_of(folder: Path, name: str) -> FileRecord:
    """What the manifest says of a file."""
    return next(record for record in read_manifest(folder).files if record.path == name)


def num_here(folder: Path) -> int:
    """Shard files in the artifact's own folder."""
    return len(list(folder.glob("*/*.bin")))


def test_shards_go_to_disks_by_turns_and_are_read_there(rows: Path, tmp_path: Path) -> None:
    places = [tmp_path / "one", tmp_path / "two"]
    for place in places:
        place.mkdir()
    moved = list(spread(rows, [str(places[0]), places[1].as_uri()]))
    assert [move.shard for move in moved] == [f"train/{n:05}" for n in range(4)] + [
        "validation/00000"
    ]
    assert moved[-1].done_bytes == moved[-1].total_bytes == sum(map(len, CONTENT.values()))
    digest = read_manifest(rows).digest
    names = [sorted(path.name for path in place.rglob("*.bin")) for place in places]
    assert names[0] == sorted(f"0000{n}.{k}.bin" for n in (0, 2, 0) for k in ("tokens", "pieces"))
    assert names[1] == sorted(f"0000{n}.{k}.bin" for n in (1, 3) for k in ("tokens", "pieces"))
    path = places[0] / f"pack-{digest}" / "train/00000.tokens.bin"
    assert read_elsewhere(rows)["train/00000.tokens.bin"] == OnDisk(path)
    assert num_here(rows) == 0 and read_all(rows) == CONTENT
    assert not list(tmp_path.rglob("*.partial"))
    assert list(spread(rows, [str(places[0])]))[-1].done_bytes == moved[-1].total_bytes
    assert len(list(places[1].rglob("*.bin"))) == 4, "what was moved stays where it is"


def test_shards_of_a_store_are_fetched_once_and_brought_back(
    rows: Path, store: str, tmp_path: Path
) -> None:
    list(spread(rows, [store]))
    assert num_here(rows) == 0
    assert set(json.loads((rows / ELSEWHERE).read_text())) == set(CONTENT)
    cache = FileCache(tmp_path / "cache")
    assert read_all(rows, cache) == CONTENT
    kept = [path for path in cache.folder.iterdir() if path.suffix == ""]
    assert {path.name for path in kept} == {record_of(rows, name).sha256 for name in CONTENT}
    with pytest.raises(ConfigError, match="no cache was given"):
        read_all(rows)
    list(bring_back(rows))
    assert num_here(rows) == len(CONTENT) and not (rows / ELSEWHERE).exists()
    assert read_all(rows) == CONTENT
    fsspec.filesystem("memory").store.clear()
    assert read_all(rows, cache) == CONTENT


KILL = """
import os, signal, sys
from pathlib import Path
import llm.storage.spread, llm.storage.elsewhere
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
write, point = llm.storage.spread.write_elsewhere, sys.argv[3]
if point == "while copying": llm.storage.elsewhere.shutil.copyfileobj = die
if point == "after copy": llm.storage.elsewhere.OnDisk.write = lambda *a, w=llm.storage.elsewhere.OnDisk.write: (w(*a), die())
if point == "before record": llm.storage.spread.write_elsewhere = die
if point == "after record": llm.storage.spread.write_elsewhere = lambda *a: (write(*a), die())
if point == "while removing":
    unlink = Path.unlink
    Path.unlink = lambda self, **k: (unlink(self, **k), die() if self.suffix == ".bin" else None)
list(llm.storage.spread.spread(Path(sys.argv[1]), [sys.argv[2]]))
"""  # noqa: E501


@pytest.mark.parametrize(
    "point", ["while copying", "after copy", "before record", "after record", "while removing"]
)
def test_a_kill_anywhere_leaves_the_artifact_whole_and_the_next_try_goes_on(
    rows: Path, tmp_path: Path, point: str
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    for _ in range(2):  # killed twice, the second time with a kill behind it
        command = [sys.executable, "-c", KILL, str(rows), str(place), point]
        assert subprocess.run(command, cwd=REPOSITORY).returncode == -signal.SIGKILL
        assert read_all(rows) == CONTENT
    list(spread(rows, [str(place)]))
    assert num_here(rows) == 0 and read_all(rows) == CONTENT
    assert not list(place.rglob("*.partial"))


def test_a_copy_that_an_earlier_try_cut_short_is_made_again(rows: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    list(spread(rows, [str(place)]))
    name = "train/00001.tokens.bin"
    (rows / name).write_bytes(CONTENT[name])  # a kill between record and removal
    there = place / f"pack-{read_manifest(rows).digest}" / name
    there.write_bytes(b"short")
    list(spread(rows, [str(place)]))
    assert there.read_bytes() == CONTENT[name] and not (rows / name).exists()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("s3://key:secret@bucket/rows", "holds a user name"),
        ("https://host/rows?signature=secret", "holds a user name"),
        ("simplecache::memory://rows", "one store"),
        ("gopher://host/rows", "Protocol not known"),
    ],
)
def test_a_place_that_is_none_is_refused_and_no_secret_shown(
    rows: Path, text: str, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        list(spread(rows, [text]))
    assert "secret" not in str(caught.value)
    assert num_here(rows) == len(CONTENT) and not (rows / ELSEWHERE).exists()


def test_a_store_without_its_library_says_what_to_install(rows: Path) -> None:
    missing = {"s3": "s3fs", "gs": "gcsfs", "abfs": "adlfs"}
    for scheme, library in missing.items():
        try:
            __import__(library)
        except ImportError:
            with pytest.raises(ConfigError, match=f"[Ii]nstall {library}"):
                list(spread(rows, [f"{scheme}://bucket/rows"]))


def test_what_is_no_packed_artifact_and_the_same_place_twice_are_refused(
    rows: Path, tmp_path: Path, store: str
) -> None:
    with pytest.raises(ConfigError, match="an artifact of clean, expected rows of pack"):
        list(spread(write_rows(tmp_path / "other", "clean"), [store]))
    with pytest.raises(ConfigError, match="twice"):
        list(spread(rows, [store, f"{store}/"]))
    with pytest.raises(PlaceError, match="no such folder; mount its disk"):
        list(spread(rows, [str(tmp_path / "nowhere")]))


FULL = """
import resource, signal, sys
from pathlib import Path
from llm.errors import PlaceError
from llm.storage.spread import spread
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (17_500, 17_500))
try: list(spread(Path(sys.argv[1]), [sys.argv[2]]))
except PlaceError as error: sys.exit(str(error))
"""


def test_a_place_that_fills_up_keeps_what_it_has(rows: Path, tmp_path: Path) -> None:
    """The kernel refuses files of validation, which are larger than the others."""
    place = tmp_path / "place"
    place.mkdir()
    command = [sys.executable, "-c", FULL, str(rows), str(place)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1 and "no room for" in done.stderr
    assert "Traceback" not in done.stderr
    assert num_here(rows) == 2 and read_all(rows) == CONTENT
    assert not list(place.rglob("*.partial"))


def test_a_place_too_small_is_found_before_anything_is_copied(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil_usage(free=100)
    monkeypatch.setattr("llm.storage.spread.shutil.disk_usage", usage)
    with pytest.raises(PlaceError, match="100 bytes free, expected"):
        list(spread(rows, [str(tmp_path)]))
    assert num_here(rows) == len(CONTENT)


def shutil_usage(free: int) -> Callable[[Path], Any]:
    """A disk with so many bytes free."""
    return lambda path: type("Usage", (), {"free": free})


def damage(store: str, rows: Path, name: str, data: bytes | None) -> None:
    """Change what a store in memory has of a file."""
    path = f"/rows/pack-{read_manifest(rows).digest}/{name}"
    memory = fsspec.filesystem("memory")
    if data is None:
        memory.rm(path)
    else:
        memory.pipe_file(path, data)


def test_a_damaged_file_of_a_store_is_named_after_a_second_try(
    rows: Path, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(spread(rows, [store]))
    name = "train/00002.tokens.bin"
    damage(store, rows, name, CONTENT[name][:-1] + b"?")
    tries: list[str] = []
    blocks = InStore.blocks
    monkeypatch.setattr(InStore, "blocks", lambda self: (tries.append(self.url), blocks(self))[1])
    cache = FileCache(tmp_path / "cache")
    with pytest.raises(ArtifactError, match="and so twice") as caught:
        read_all(rows, cache)
    assert name in str(caught.value) and store in str(caught.value)
    assert sum(url.endswith(name) for url in tries) == 2
    assert not (cache.folder / record_of(rows, name).sha256).exists()
    assert not list(cache.folder.glob("*.partial"))
    damage(store, rows, name, CONTENT[name])
    assert read_all(rows, cache) == CONTENT


def test_a_fault_that_passes_is_not_noticed(
    rows: Path, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(spread(rows, [store]))
    blocks, tries = InStore.blocks, [0]

    def fail_at_first(self: InStore) -> Iterator[bytes]:
        tries[0] += 1
        if tries[0] == 1:
            raise PlaceError("not now")
        return blocks(self)

    monkeypatch.setattr(InStore, "blocks", fail_at_first)
    assert read_all(rows, FileCache(tmp_path / "cache")) == CONTENT


@pytest.mark.parametrize("kind", ["disk", "store"])
def test_a_missing_file_is_named_with_its_place(
    rows: Path, store: str, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "place").mkdir()
    list(spread(rows, [store if kind == "store" else str(tmp_path / "place")]))
    name = "train/00003.pieces.bin"
    if kind == "store":
        damage(store, rows, name, None)
    else:
        Path(str(read_elsewhere(rows)[name])).unlink()
    with pytest.raises(PlaceError, match=name) as caught:
        read_all(rows, FileCache(tmp_path / "cache"))
    assert "delete the folder of its artifact" in str(caught.value)


def test_a_store_that_cannot_be_reached_is_one_error(rows: Path, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    name = "train/00000.tokens.bin"
    (rows / name).unlink()
    (rows / ELSEWHERE).write_text(json.dumps({name: "http://127.0.0.1:9/tokens"}))
    with pytest.raises(PlaceError, match=r"not there \(Cannot connect to host 127\.0\.0\.1:9"):
        read_all(rows, FileCache(tmp_path / "cache"))


def test_a_damaged_record_is_named(rows: Path) -> None:
    for text in ("[]", "{", '{"a": "s3://key:secret@bucket"}'):
        (rows / ELSEWHERE).write_text(text)
        with pytest.raises(ArtifactError, match=r"elsewhere\.json: damaged"):
            ArtifactFiles(rows)


def test_the_cache_keeps_what_was_opened_last_and_what_is_in_use(
    rows: Path, store: str, tmp_path: Path
) -> None:
    list(spread(rows, [store]))
    names = [name for name in CONTENT if name.startswith("train") and "tokens" in name]
    sizes = {name: len(CONTENT[name]) for name in names}
    cache = FileCache(tmp_path / "cache", max_bytes=2 * sizes[names[0]])
    files = ArtifactFiles(rows, cache)

    def kept() -> set[str]:
        return {n for n in names if (cache.folder / record_of(rows, n).sha256).exists()}

    for place, name in enumerate(names[:2]):
        files.open(name).close()
        os.utime(cache.folder / record_of(rows, name).sha256, (place, place))
    assert kept() == set(names[:2])
    with pytest.raises(ConfigError, match=r"runtime\.cache_bytes: found 30,000, expected at least"):
        files.open(names[2])
    assert kept() == set(names[:2]), "both are in use"
    mapped = files.open(names[0])
    os.utime(cache.folder / record_of(rows, names[0]).sha256, (9, 9))
    for name in names[:2]:
        cache.release(record_of(rows, name))
    files.open(names[2]).close()
    assert kept() == {names[0], names[2]}, "the other was opened longer ago"
    cache.release(record_of(rows, names[2]))
    files.open(names[3]).close()
    assert names[0] not in kept()
    assert mapped.read() == CONTENT[names[0]], "what is open is read on"
    mapped.close()


def test_fetching_brings_all_at_once_reports_and_can_be_ended(
    rows: Path, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(spread(rows, [store]))
    total = sum(map(len, CONTENT.values()))
    reports: list[tuple[int, int]] = []
    files = ArtifactFiles(rows, FileCache(tmp_path / "cache"))
    files.fetch(list(CONTENT), lambda done, of: reports.append((done, of)))
    assert reports[-1] == (total, total) and reports == sorted(reports)
    fsspec.filesystem("memory").store.clear()
    assert read_all(rows, FileCache(tmp_path / "cache")) == CONTENT
    with pytest.raises(ConfigError, match=f"expected at least {total:,}"):
        ArtifactFiles(rows, FileCache(tmp_path / "c", 9)).fetch(list(CONTENT), lambda *_: None)

    def endless(self: InStore) -> Iterator[bytes]:
        while True:
            yield b"x"

    def stop(*_: int) -> None:
        raise Interrupted("asked to stop")

    monkeypatch.setattr(InStore, "blocks", endless)
    with pytest.raises(Interrupted, match="asked to stop"):
        ArtifactFiles(rows, FileCache(tmp_path / "d")).fetch(list(CONTENT), stop)
    assert not list((tmp_path / "d").glob("*.partial"))
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]


def test_places_are_read_as_they_are_written() -> None:
    for text in ("s3://bucket/a b", "hf://datasets/me/rows@main/x", "gs://bucket"):
        assert parse_place(text) == InStore(text) and str(parse_place(text)) == text
    assert parse_place("/mnt/a:b") == parse_place("file:///mnt/a:b") == OnDisk(Path("/mnt/a:b"))
    assert parse_place("rows") == OnDisk(Path.cwd() / "rows")
    assert parse_place("s3://bucket/") == InStore("s3://bucket")


class CountingServer:
    """Serves one body by ranges, slowly, and counts how often."""

    def __init__(self, body: bytes) -> None:
        self.num_bodies = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.send_response(200)
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()

            def do_GET(self) -> None:
                outer.num_bodies += 1
                time.sleep(0.5)  # long enough for the other process to come
                self.send_response(206 if "Range" in self.headers else 200)
                self.send_header("Content-Range", f"bytes 0-{len(body) - 1}/{len(body)}")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Keep the tests' output clean."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> "CountingServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


READ = """
import sys
from pathlib import Path
from llm.storage.file_cache import ArtifactFiles, FileCache
files = ArtifactFiles(Path(sys.argv[1]), FileCache(Path(sys.argv[2])))
print(len(files.open("train/00000.tokens.bin").read()))
"""


def test_two_processes_that_want_one_file_fetch_it_once(rows: Path, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    name = "train/00000.tokens.bin"
    with CountingServer(CONTENT[name]) as server:
        (rows / name).unlink()
        (rows / ELSEWHERE).write_text(json.dumps({name: f"{server.url}/tokens"}))
        command = [sys.executable, "-c", READ, str(rows), str(tmp_path / "cache")]
        readers = [
            subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE) for _ in range(2)
        ]
        outputs = [reader.communicate(timeout=60)[0] for reader in readers]
    assert [int(output) for output in outputs] == [len(CONTENT[name])] * 2
    assert server.num_bodies == 1
