"""Artifacts: digests are of bytes alone, and nothing half-written ever looks whole."""

import errno
import hashlib
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm import artifact
from llm.artifact import (
    MANIFEST,
    ArtifactWriter,
    canonical_json,
    digest,
    file_sha256,
    load_artifact,
    read_manifest,
    write_bytes_atomically,
)
from llm.errors import ArtifactError, DiskFullError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)  # fmt: skip


@given(JSON)
def test_canonical_json_reads_back_as_the_same_value(value: object) -> None:
    assert json.loads(canonical_json(value)) == value


@given(st.dictionaries(st.text(), st.integers(), min_size=2))
def test_canonical_json_does_not_depend_on_the_order_of_keys(value: dict[str, int]) -> None:
    assert canonical_json(value) == canonical_json(dict(reversed(value.items())))


@pytest.mark.parametrize(
    "value", [Path("x"), {1, 2}, print, b"bytes", {1: "x"}, math.nan, [math.inf], object()]
)
def test_canonical_json_raises_rather_than_guess(value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        canonical_json(value)


def test_true_and_one_have_different_digests() -> None:
    assert digest([True]) != digest([1]) != digest(["1"])


def _write(folder: Path, **files: bytes) -> str:
    writer = ArtifactWriter(folder)
    for name, data in files.items():
        writer.write_bytes(name, data, is_log=name == "log")
    return writer.finish(stage="pack", summary={"rows": 1}).digest


def test_manifest_holds_size_and_sha256_of_every_file(tmp_path: Path) -> None:
    _write(tmp_path / "a", x=b"hello", y=b"")
    records = {record.path: record for record in read_manifest(tmp_path / "a").files}
    assert records["x"].sha256 == hashlib.sha256(b"hello").hexdigest()
    assert (records["x"].size_bytes, records["y"].size_bytes) == (5, 0)
    assert file_sha256(tmp_path / "a" / "x") == records["x"].sha256


def test_digest_is_of_bytes_and_not_of_logs_or_order(tmp_path: Path) -> None:
    first = _write(tmp_path / "a", x=b"1", y=b"2", log=b"10:00")
    second = _write(tmp_path / "b", log=b"11:00", y=b"2", x=b"1")
    third = _write(tmp_path / "c", x=b"1", y=b"3")
    assert first == second != third


def test_file_is_hashed_as_written_in_any_pieces(tmp_path: Path) -> None:
    writer = ArtifactWriter(tmp_path / "a")
    data = bytes(range(256)) * 10_000
    with writer.open("deep/x") as file:
        for start in range(0, len(data), 7919):
            file.write(data[start : start + 7919])
    manifest = writer.finish(stage="pack", summary={})
    assert manifest.files[0].sha256 == hashlib.sha256(data).hexdigest()
    assert (tmp_path / "a" / "deep" / "x").read_bytes() == data


def test_every_folder_from_a_file_to_the_artifact_is_made_durable_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    fsync = artifact.fsync_folder

    def fsync_and_note(folder: Path) -> None:
        seen.append(folder.relative_to(tmp_path).as_posix())
        fsync(folder)

    monkeypatch.setattr(artifact, "fsync_folder", fsync_and_note)
    writer = ArtifactWriter(tmp_path / "a")
    for name in ("files/data/x/1.txt", "files/data/x/2.txt", "files/3.txt", "4.txt"):
        writer.write_bytes(name, b"1")
    writer.finish(stage="download", summary={})
    assert seen[-1] == "a", "after the manifest's own rename"
    assert sorted(seen) == ["a", "a/files", "a/files/data", "a/files/data/x"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
@pytest.mark.parametrize("num_bytes", [5000, 5_000_000])
def test_full_disk_says_which_file_and_how_many_bytes_are_needed_and_free(
    tmp_path: Path, num_bytes: int
) -> None:
    writer = ArtifactWriter(tmp_path / "a")
    writer.write_bytes("x", b"whole")
    (tmp_path / "a" / "y").symlink_to("/dev/full")
    with pytest.raises(DiskFullError, match=rf"a/y: no space .* free, needed {num_bytes:,} more"):
        writer.write_bytes("y", b"1" * num_bytes)
    assert [record.path for record in writer.finish(stage="pack", summary={}).files] == ["x"]


def test_full_disk_leaves_what_was_there_and_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "x"
    write_bytes_atomically(path, b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DiskFullError, match="needed 3 more"):
        write_bytes_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_folder_without_manifest_is_no_artifact(tmp_path: Path) -> None:
    ArtifactWriter(tmp_path / "a").write_bytes("x", b"1")
    with pytest.raises(ArtifactError, match=r"no manifest\.json"):
        load_artifact(tmp_path / "a")


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"stage": 1}', b"\xff\xfe"])
def test_damaged_manifest_is_a_typed_error(tmp_path: Path, damage: bytes) -> None:
    _write(tmp_path / "a", x=b"1")
    (tmp_path / "a" / MANIFEST).write_bytes(damage)
    with pytest.raises(ArtifactError):
        read_manifest(tmp_path / "a")


def test_manifest_with_an_edited_list_of_files_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "a", x=b"1")
    path = tmp_path / "a" / MANIFEST
    path.write_text(path.read_text().replace('"size_bytes": 1', '"size_bytes": 2'))
    with pytest.raises(ArtifactError, match="does not give its digest"):
        read_manifest(tmp_path / "a")


def test_failed_write_leaves_the_file_out_of_the_manifest(tmp_path: Path) -> None:
    writer = ArtifactWriter(tmp_path / "a")
    with pytest.raises(RuntimeError), writer.open("x") as file:
        file.write(b"half")
        raise RuntimeError
    assert [record.path for record in writer.finish(stage="pack", summary={}).files] == []


def test_atomic_write_replaces_whole(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_bytes_atomically(path, b"old")
    write_bytes_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_atomic_writes_from_many_threads_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "x"

    def write(number: int) -> None:
        for _ in range(20):
            write_bytes_atomically(path, b"%d" % number, is_durable=False)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(write, range(8)))
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]
