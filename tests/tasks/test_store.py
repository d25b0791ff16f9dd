"""The artifact store: only a verified artifact is a hit; a damaged one is set aside."""

import contextlib
import multiprocessing
import os
import random
import threading
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from llm.artifact import ArtifactWriter
from llm.errors import ArtifactError
from tasks.store import ArtifactStore, KeyParts, KeyRecord


def parts(stage: str = "pack", **settings: int) -> KeyParts:
    """Key parts that differ in settings alone."""
    return KeyParts(
        stage=stage, role="", settings=settings, seed=1, inputs={}, libraries={}, code={"m": "1"}
    )


def publish(store: ArtifactStore, key_parts: KeyParts, **files: bytes) -> Path:
    """Put an artifact with these files into the store under a key."""
    out = store.staging(key_parts) / "out"
    writer = ArtifactWriter(out)
    for name, data in files.items():
        writer.write_bytes(name, data)
    writer.finish(stage=key_parts.stage, summary={})
    artifact = store.publish(key_parts, out)
    store.remember(
        KeyRecord(
            key=key_parts.key, parts=key_parts, digest=artifact.digest, seconds=1.0, made_at="now"
        )
    )
    return artifact.path


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    """An empty store."""
    return ArtifactStore(tmp_path / "artifacts")


def test_published_artifact_is_found_again_by_its_key(store: ArtifactStore) -> None:
    folder = publish(store, parts(a=1), x=b"hello")
    found = store.find(parts(a=1))
    assert found is not None and found[1].path == folder
    assert store.find(parts(a=2)) is None


def test_same_bytes_under_two_keys_lie_there_once(store: ArtifactStore) -> None:
    assert publish(store, parts(a=1), x=b"1") == publish(store, parts(a=2), x=b"1")
    assert len(store.artifacts(["pack"])) == 1


def _publish_at_once(root: Path, number: int, barrier: Barrier) -> None:
    """Publish the same bytes as another process, which is as far when the rename comes."""
    rename = Path.rename

    def meet_and_rename(path: Path, target: Path) -> Path:
        if path.name == "out":
            with contextlib.suppress(threading.BrokenBarrierError):
                barrier.wait(timeout=2)  # in vain where the other waits for the lock
        return rename(path, target)

    Path.rename = meet_and_rename  # type: ignore[method-assign]
    publish(ArtifactStore(root), parts(a=number), x=b"1")


def test_same_bytes_published_by_two_processes_at_once_lie_there_once(store: ArtifactStore) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    processes = [
        context.Process(target=_publish_at_once, args=(store.root, number, barrier))
        for number in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(store.artifacts(["pack"])) == 1
    assert store.find(parts(a=0)) is not None and store.find(parts(a=1)) is not None


def test_damage_that_two_see_at_once_is_set_aside_once_and_what_was_made_again_stays(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = publish(store, parts(a=1), x=b"hello")
    (folder / "x").write_bytes(b"jello")
    verify = ArtifactStore.verify

    def verify_while_another_makes_it_again(self: ArtifactStore, path: Path) -> None:
        try:
            verify(self, path)
        except ArtifactError:
            monkeypatch.setattr(ArtifactStore, "verify", verify)
            publish(store, parts(a=2), x=b"hello")
            raise

    monkeypatch.setattr(ArtifactStore, "verify", verify_while_another_makes_it_again)
    assert store.find(parts(a=1)) is None
    assert len(list((store.root / "damaged").iterdir())) == 1
    assert (folder / "x").read_bytes() == b"hello"
    assert store.find(parts(a=1)) is not None


@pytest.mark.parametrize("seed", range(40))
def test_any_damage_is_found_and_set_aside_with_its_reason(store: ArtifactStore, seed: int) -> None:
    rng = random.Random(seed)
    folder = publish(store, parts(), x=rng.randbytes(5000), y=rng.randbytes(50))
    path = folder / rng.choice(["x", "y", "manifest.json"])
    data = bytearray(path.read_bytes())
    damage = rng.choice(["flip", "truncate", "delete", "swap", "append"])
    if damage == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif damage == "truncate":
        del data[rng.randrange(len(data)) :]
    elif damage == "append":
        data += b"x"
    elif damage == "swap":
        data.reverse()
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(data)
    assert store.find(parts()) is None
    assert not folder.exists()
    (aside,) = (store.root / "damaged").iterdir()
    assert (aside / "REASON.txt").read_text().strip()


def test_a_file_with_its_old_stamp_is_not_read_again_unless_asked(store: ArtifactStore) -> None:
    folder = publish(store, parts(), x=b"hello")
    status = (folder / "x").stat()
    with (folder / "x").open("r+b") as file:
        file.write(b"j")
    os.utime(folder / "x", ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ArtifactError):  # the change time betrays it
        store.verify(folder)


def test_thorough_verification_reads_everything(store: ArtifactStore, tmp_path: Path) -> None:
    folder = publish(store, parts(), x=b"hello")
    with (folder / "x").open("r+b") as file:
        file.write(b"j")
    store._write_stamps(folder)  # as if a disk had rotted below the file system
    store.verify(folder)
    with pytest.raises(ArtifactError, match="sha256"):
        store.verify(folder, is_thorough=True)


def test_a_copied_store_is_hashed_once_and_then_hits(store: ArtifactStore, tmp_path: Path) -> None:
    publish(store, parts(), x=b"hello")
    store.root.rename(tmp_path / "moved")
    moved = ArtifactStore(tmp_path / "moved")
    assert moved.find(parts()) is not None


def test_unreadable_record_counts_as_none(store: ArtifactStore) -> None:
    publish(store, parts(), x=b"1")
    (store.root / "keys" / "pack" / f"{parts().key}.json").write_text("{")
    assert store.find(parts()) is None
    assert store.records("pack") == []


def test_sweep_removes_the_staging_of_what_is_published_and_nothing_else(
    store: ArtifactStore,
) -> None:
    publish(store, parts(a=1), x=b"1")
    unfinished = store.staging(parts(a=2))
    (unfinished / "work").mkdir(parents=True)
    store.sweep()
    assert not store.staging(parts(a=1)).exists()
    assert unfinished.exists()


def _hold(root: Path, ready: object) -> None:
    with ArtifactStore(root).lock("x"):
        ready.set()  # type: ignore[attr-defined]
        time.sleep(60)


def test_lock_of_a_killed_holder_is_free_at_once(store: ArtifactStore) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=_hold, args=(store.root, ready))
    holder.start()
    assert ready.wait(30)
    with pytest.raises(BlockingIOError), store.lock("x", is_waiting=False):
        pass
    holder.kill()
    holder.join()
    killed_at = time.monotonic()
    with store.lock("x"):
        assert time.monotonic() - killed_at < 2.0


@pytest.fixture
def linked(store: ArtifactStore, tmp_path: Path) -> Path:
    """A published artifact of two files whose folder is a relative link to another disk."""
    folder = publish(store, parts(), **{"train/0.tokens.bin": b"0" * 99, "x": b"1"})
    folder.rename(tmp_path / "disk")
    folder.symlink_to(Path("../../disk"))
    return folder


def test_linked_artifact_folder_is_a_hit_and_its_damage_is_found(
    store: ArtifactStore, linked: Path, tmp_path: Path
) -> None:
    found = store.find(parts())
    assert found is not None and found[1].path == linked
    assert store.artifacts(["pack"]) == [linked]
    store.verify(linked, is_thorough=True)
    (tmp_path / "disk" / "train" / "0.tokens.bin").write_bytes(b"0" * 98 + b"1")
    assert store.find(parts()) is None
    assert not linked.is_symlink(), "damaged, and set aside"
    assert "0.tokens.bin: sha256" in (tmp_path / "disk" / "REASON.txt").read_text()


def test_link_to_an_unmounted_disk_is_an_error_and_not_built_again(
    store: ArtifactStore, linked: Path, tmp_path: Path
) -> None:
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    with pytest.raises(ArtifactError, match="mount its disk"):
        store.find(parts())
    assert linked.is_symlink()
    (tmp_path / "unmounted").rename(tmp_path / "disk")
    assert store.find(parts()) is not None


def test_artifact_built_again_replaces_a_deleted_link(store: ArtifactStore, linked: Path) -> None:
    linked.unlink()
    assert store.find(parts()) is None
    folder = publish(store, parts(), **{"train/0.tokens.bin": b"0" * 99, "x": b"1"})
    assert folder == linked and not folder.is_symlink()
    store.verify(folder, is_thorough=True)
