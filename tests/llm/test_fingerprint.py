"""Fingerprints: of bytes and names, not paths, and never of a changed file's old bytes."""

import os
import shutil
import time
from pathlib import Path

import pytest

from llm.config import SourceConfig
from llm.data.sources import fingerprint as sources
from llm.data.sources.fingerprint import fingerprint, list_files
from llm.errors import DataError
from tests.llm.hub_server import COMMIT, NAME, HubServer


def files(path: Path | str) -> SourceConfig:
    return SourceConfig(kind="files", path=str(path))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in {"a.txt": "A", "b/c.md": "C", "b/d.jsonl": "{}", "e.png": "E"}.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "data"


def test_a_folder_is_its_readable_files_by_name(folder: Path) -> None:
    (folder / ".git").mkdir()
    (folder / ".git/x.txt").write_text("hidden")
    (folder / ".y.txt").write_text("hidden")
    found = list_files(files(folder), "corpus")
    assert [name for name, _ in found.files] == ["a.txt", "b/c.md", "b/d.jsonl"]
    assert found.num_ignored == 1
    assert [name for name, _ in list_files(files(folder), "chats").files] == ["b/d.jsonl"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.txt", ["a.txt"]),
        ("**/*.md", ["b/c.md"]),
        ("b/*", ["c.md", "d.jsonl"]),
        ("?/c.*", ["b/c.md"]),
    ],
)
def test_a_glob_gives_names_below_its_fixed_part(
    folder: Path, pattern: str, names: list[str]
) -> None:
    found = list_files(files(folder / pattern), "corpus")
    assert [name for name, _ in found.files] == names


@pytest.mark.parametrize(
    ("path", "role", "message"),
    [
        ("missing.txt", "corpus", "does not exist"),
        ("*.nothing", "corpus", "none of the 0 files"),
        ("e.png", "corpus", r"e\.png is unknown, expected \.txt"),
        ("a.txt", "chats", r"a\.txt is unknown, expected \.jsonl"),
        ("*.txt", "chats", "none of the 1 files"),
    ],
)
def test_an_unreadable_source_is_an_error_naming_the_setting(
    folder: Path, path: str, role: str, message: str
) -> None:
    with pytest.raises(DataError, match=rf"download\.{role}\.path: .*{message}"):
        fingerprint(files(folder / path), role, None)


def test_a_link_to_nothing_is_an_error_and_not_left_out(folder: Path) -> None:
    (folder / "gone.txt").symlink_to("nowhere")
    for path in (folder, folder / "*.txt"):
        with pytest.raises(DataError, match=r"download\.corpus\.path: .*gone\.txt"):
            fingerprint(files(path), "corpus", None)


def test_special_files_are_never_opened(folder: Path) -> None:
    os.mkfifo(folder / "pipe.txt")
    names = [name for name, _ in list_files(files(folder), "corpus").files]
    assert names == ["a.txt", "b/c.md", "b/d.jsonl"]


def test_the_path_does_not_count_but_names_bytes_and_role_do(folder: Path, tmp_path: Path) -> None:
    before = fingerprint(files(folder), "corpus", None)
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert fingerprint(files(moved), "corpus", None) == before
    assert fingerprint(files(f"{folder}/"), "corpus", None) == before
    (moved / "a.txt").rename(moved / "b.txt")
    renamed = fingerprint(files(moved), "corpus", None)
    (moved / "b.txt").write_text("B")
    changed = fingerprint(files(moved), "corpus", None)
    chats = fingerprint(files(folder), "chats", None)
    assert len({before, renamed, changed, chats}) == 4


def test_an_unchanged_file_is_not_read_again_and_a_changed_one_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "NANOSECONDS_UNTIL_CACHED", -1)
    read: list[Path] = []
    monkeypatch.setattr(sources, "file_sha256", lambda path: (read.append(path), "0" * 64)[1])  # type: ignore[func-returns-value]
    cache_file = tmp_path / "cache/files.json"
    first = fingerprint(files(folder), "corpus", cache_file)
    assert len(read) == 3
    assert fingerprint(files(folder), "corpus", cache_file) == first
    assert len(read) == 3
    status = (folder / "a.txt").stat()
    (folder / "a.txt").write_text("B")  # same size, with its old time restored
    os.utime(folder / "a.txt", ns=(status.st_atime_ns, status.st_mtime_ns))
    fingerprint(files(folder), "corpus", cache_file)
    assert read[3:] == [folder / "a.txt"]


def test_a_file_changed_a_moment_ago_is_not_remembered(folder: Path, tmp_path: Path) -> None:
    fingerprint(files(folder), "corpus", tmp_path / "cache.json")
    assert not (tmp_path / "cache.json").exists()


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"x": 3}', '{"x": [1, 2]}', "\0"])
def test_a_damaged_cache_costs_time_only(folder: Path, tmp_path: Path, damage: str) -> None:
    (tmp_path / "cache.json").write_text(damage)
    expected = fingerprint(files(folder), "corpus", None)
    assert fingerprint(files(folder), "corpus", tmp_path / "cache.json") == expected


def test_the_standard_library_is_remembered(tmp_path: Path) -> None:
    source = SourceConfig(kind="stdlib")
    first = fingerprint(source, "corpus", tmp_path / "cache.json")
    assert first != fingerprint(source, "chats", tmp_path / "cache.json")
    assert first == fingerprint(source, "corpus", tmp_path / "cache.json")
    assert (tmp_path / "cache.json").stat().st_mtime <= time.time()


def test_urls_and_hub_datasets_count_by_sha256_and_commit() -> None:
    url = SourceConfig(kind="url", url="https://a/b.txt", sha256="0" * 64)
    mirror = SourceConfig(kind="url", url="https://c/b.txt", sha256="0" * 64)
    other = SourceConfig(kind="url", url="https://a/b.txt", sha256="1" * 64)
    assert fingerprint(url, "corpus", None) == fingerprint(mirror, "corpus", None)
    assert fingerprint(url, "corpus", None) != fingerprint(other, "corpus", None)
    hub = [
        SourceConfig(kind="hub", hub_name=name, hub_revision=revision * 40)
        for name, revision in [("a/b", "0"), ("a/c", "0"), ("a/b", "1")]
    ]
    assert len({fingerprint(source, "corpus", None) for source in hub}) == 3


def test_a_branch_of_the_hub_counts_by_the_commit_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("no_proxy", "*")
    with HubServer({"a.jsonl": b"{}"}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        branch = SourceConfig(kind="hub", hub_name=NAME, hub_revision="main")
        pinned = SourceConfig(kind="hub", hub_name=NAME, hub_revision=COMMIT)
        before = fingerprint(branch, "corpus", None)
        assert before == fingerprint(pinned, "corpus", None)
        hub.commit = "f" * 40
        assert fingerprint(branch, "corpus", None) != before
        gone = SourceConfig(kind="hub", hub_name=NAME, hub_revision="gone")
        with pytest.raises(DataError, match=r"download\.corpus: the dataset owner/name at gone"):
            fingerprint(gone, "corpus", None)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"cannot be reached.*hub_revision to a commit"):
        fingerprint(branch, "corpus", None)
