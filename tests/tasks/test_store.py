"""The store: a hit is a hit only when every byte was seen to be whole; damage is set aside."""

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
from llm.errors import ArtifactError, PlaceError
from llm.storage.elsewhere import InStore, read_elsewhere
from llm.storage.spread import spread
from tasks.store import KeyParts, KeyRecord, Store


def parts(stage: str = "pack", **settings: int) -> KeyParts:
    """Key parts that differ in settings alone."""
    return KeyParts(
        stage=stage, role="", settings=settings, seed=1, inputs={}, libraries={}, code={"m": "1"}
    )


def publish(store: Store, key_parts: KeyParts, **files: bytes) -> Path:
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
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(tmp_path / "artifacts")


def test_published_artifact_is_found_again_by_its_key(store: Store) -> None:
    folder = publish(store, parts(a=1), x=b"hello")
    found = store.find(parts(a=1))
    assert found is not None and found[1].path == folder
    assert store.find(parts(a=2)) is None


def test_same_bytes_under_two_keys_lie_there_once(store: Store) -> None:
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
    publish(Store(root), parts(a=number), x=b"1")


def test_same_bytes_published_by_two_processes_at_once_lie_there_once(store: Store) -> None:
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
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = publish(store, parts(a=1), x=b"hello")
    (folder / "x").write_bytes(b"jello")
    verify = Store.verify

    def verify_while_another_makes_it_again(self: Store, path: Path) -> None:
        try:
            verify(self, path)
        except ArtifactError:
            monkeypatch.setattr(Store, "verify", verify)
            publish(store, parts(a=2), x=b"hello")
            raise

    monkeypatch.setattr(Store, "verify", verify_while_another_makes_it_again)
    assert store.find(parts(a=1)) is None
    assert len(list((store.root / "damaged").iterdir())) == 1
    assert (folder / "x").read_bytes() == b"hello"
    assert store.find(parts(a=1)) is not None


@pytest.mark.parametrize("seed", range(40))
def test_any_damage_is_found_and_set_aside_with_its_reason(store: Store, seed: int) -> None:
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


def test_a_file_with_its_old_stamp_is_not_read_again_unless_asked(store: Store) -> None:
    folder = publish(store, parts(), x=b"hello")
    status = (folder / "x").stat()
    with (folder / "x").open("r+b") as file:
        file.write(b"j")
    os.utime(folder / "x", ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ArtifactError):  # the change time betrays it
        store.verify(folder)


def test_thorough_verification_reads_everything(store: Store, tmp_path: Path) -> None:
    folder = publish(store, parts(), x=b"hello")
    with (folder / "x").open("r+b") as file:
        file.write(b"j")
    store._write_stamps(folder)  # as if a disk had rotted below the file system
    store.verify(folder)
    with pytest.raises(ArtifactError, match="sha256"):
        store.verify(folder, is_thorough=True)


def test_a_copied_store_is_hashed_once_and_then_hits(store: Store, tmp_path: Path) -> None:
    publish(store, parts(), x=b"hello")
    store.root.rename(tmp_path / "moved")
    moved = Store(tmp_path / "moved")
    assert moved.find(parts()) is not None


def test_unreadable_record_counts_as_none(store: Store) -> None:
    publish(store, parts(), x=b"1")
    (store.root / "keys" / "pack" / f"{parts().key}.json").write_text("{")
    assert store.find(parts()) is None
    assert store.records("pack") == []


def test_sweep_removes_the_staging_of_what_is_published_and_nothing_else(store: Store) -> None:
    publish(store, parts(a=1), x=b"1")
    unfinished = store.staging(parts(a=2))
    (unfinished / "work").mkdir(parents=True)
    store.sweep()
    assert not store.staging(parts(a=1)).exists()
    assert unfinished.exists()


def _hold(root: Path, ready: object) -> None:
    with Store(root).lock("x"):
        ready.set()  # type: ignore[attr-defined]
        time.sleep(60)


def test_lock_of_a_killed_holder_is_free_at_once(store: Store) -> None:
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


def publish_shards(store: Store) -> Path:
    """Put rows of two shards into the store."""
    return publish(store, parts(), **{"train/0.tokens.bin": b"0" * 99, "train/1.tokens.bin": b"1"})


def test_what_lies_on_another_disk_is_a_hit_and_its_damage_is_found(
    store: Store, tmp_path: Path
) -> None:
    folder = publish_shards(store)
    list(spread(folder, [str(tmp_path)]))
    assert store.find(parts()) is not None and store.find(parts()) is not None
    store.verify(folder, is_thorough=True)
    place = read_elsewhere(folder)["train/0.tokens.bin"]
    Path(str(place)).write_bytes(b"0" * 98 + b"1")
    assert store.find(parts()) is None, "damaged, and set aside"
    (reason,) = (store.root / "damaged").glob("*/REASON.txt")
    assert str(place) in reason.read_text()


def test_a_disk_that_is_not_mounted_does_not_have_rows_packed_again(
    store: Store, tmp_path: Path
) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    folder = publish_shards(store)
    list(spread(folder, [str(place)]))
    place.rename(tmp_path / "unmounted")
    with pytest.raises(PlaceError, match="mount its disk"):
        store.find(parts())
    assert folder.is_dir()
    (tmp_path / "unmounted").rename(place)
    assert store.find(parts()) is not None


def test_what_lies_in_a_store_is_trusted_until_it_is_looked_at(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = publish_shards(store)
    list(spread(folder, ["memory://test_store"]))
    with monkeypatch.context() as patch:
        patch.setattr(InStore, "size_bytes", lambda self: pytest.fail("asked"))
        assert store.find(parts()) is not None
    store.verify(folder, is_thorough=True)
    monkeypatch.setattr(InStore, "size_bytes", lambda self: 5)
    with pytest.raises(ArtifactError, match="5 bytes, expected 99"):
        store.verify(folder, is_thorough=True)


def test_rows_made_again_replace_those_whose_disk_is_gone(store: Store, tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    list(spread(publish_shards(store), [str(place)]))
    place.rename(tmp_path / "gone")
    folder = publish_shards(store)
    assert not read_elsewhere(folder)
    store.verify(folder, is_thorough=True)


def test_a_file_that_is_moved_while_it_is_verified_is_no_damage(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = publish_shards(store)
    read = read_elsewhere
    reads: list[Path] = []

    def read_and_move(path: Path) -> object:
        found = read(path)
        reads.append(path)
        if len(reads) == 1:
            list(spread(folder, [str(tmp_path)]))
        return found

    monkeypatch.setattr("tasks.store.read_elsewhere", read_and_move)
    store.verify(folder)
    assert len(reads) > 1
