"""Open the files of an artifact wherever they lie; those of stores are fetched into a cache first.

    <cache>/<sha256>          a file, whole and checked
    <cache>/<sha256>.partial  one being fetched
    <cache>/<sha256>.lock     a kernel lock: however many processes want a file, one fetches it

A file of the cache is used by any number of artifacts and processes. Where there is no room for
another, those that were opened longest ago are removed. A process that has one open or mapped reads
on, as Linux keeps a removed file until it is closed; its room is free only then.
"""

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO

from llm.artifact import FileRecord, HashingFile, read_manifest
from llm.config import RuntimeConfig
from llm.errors import ArtifactError, ConfigError, Interrupted, PlaceError
from llm.storage.elsewhere import InStore, OnDisk, Place, disk_failure, read_elsewhere

NUM_TRIES = 2
FILES_AT_ONCE = 4  # one stream from a store rarely fills a line
SECONDS_BETWEEN_LOOKS = 0.05
SHA256_HEX_CHARACTERS = 64


@dataclass(slots=True)
class FileCache:
    """Files of stores, kept on this machine's disk."""

    folder: Path
    max_bytes: int = 0
    """Of all files together, as far as this process can say; 0 sets no limit."""
    _in_use: dict[str, int] = field(default_factory=dict[str, int])
    """Bytes of each file opened through this object: it is not removed."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def open(
        self, place: InStore, record: FileRecord, keep_on: Callable[[int], None] = lambda _: None
    ) -> IO[bytes]:
        """Return the file, open; it is fetched when it is not here yet.

        `keep_on` is called again and again meanwhile with the bytes that have come; what it raises
        ends the fetching.

        Raises:
            ConfigError: what is in use leaves no room for it. PlaceError: the store failed, or the
            disk is full. ArtifactError: the store has other bytes.
        """
        path = self.folder / record.sha256
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock"), lambda: keep_on(0)):
            if not (path.is_file() and path.stat().st_size == record.size_bytes):
                self._make_room(record)
                try:
                    fetch(place, record, path, keep_on)
                except BaseException:
                    self.release(record)
                    raise
            os.utime(path)  # opened last: removed last
            self._in_use[record.sha256] = record.size_bytes
            return path.open("rb")

    def release(self, record: FileRecord) -> None:
        """Let a file be removed when its room is needed."""
        self._in_use.pop(record.sha256, None)

    def _make_room(self, record: FileRecord) -> None:
        """Remove files opened long ago until there is room for one more."""
        if not self.max_bytes:
            return
        with self._lock:
            self._in_use[record.sha256] = record.size_bytes
            if (needed := sum(self._in_use.values())) > self.max_bytes:
                self.release(record)
                raise too_small(self.max_bytes, needed)
            files = [
                (status.st_mtime_ns, status.st_size, path)
                for path in self.folder.iterdir()
                if len(path.name) == SHA256_HEX_CHARACTERS and (status := _status(path))
            ]
            # of those in use some may be on their way still
            sizes = {path.name: size for _, size, path in files} | self._in_use
            excess = sum(sizes.values()) - self.max_bytes
            for _, size, path in sorted(files):
                if excess > 0 and path.name not in self._in_use and _remove(path):
                    excess -= size


class ArtifactFiles:
    """The files of one artifact, wherever they lie."""

    def __init__(self, folder: Path, cache: FileCache | None = None) -> None:
        """Take the artifact in `folder`; `cache` is for files that are in a store."""
        self._folder, self._cache = folder, cache
        self._elsewhere = read_elsewhere(folder)

    def open(self, name: str, keep_on: Callable[[int], None] = lambda _: None) -> IO[bytes]:
        """Return a file, open for reading.

        Raises:
            FileNotFoundError: it is not in the folder, nor recorded to be elsewhere.
            ConfigError, PlaceError, ArtifactError: as `FileCache.open`.
        """
        path = self._folder / name
        if not path.exists() and name not in self._elsewhere:
            self._elsewhere = read_elsewhere(self._folder)  # it may have been moved just now
        place = None if path.exists() else self._elsewhere.get(name)
        if isinstance(place, InStore):
            if self._cache is None:
                raise ConfigError(f"{place}: is in a store, and no cache was given to read it")
            return self._cache.open(place, self._records[name], keep_on)
        if isinstance(place, OnDisk):
            place.size_bytes()  # says what to do when it is not there
            path = place.path
        return path.open("rb")

    def fetch(self, names: Sequence[str], report: Callable[[int, int], None]) -> None:
        """Bring all these files of stores here, several at once.

        `report` is told again and again how many bytes have come, and of how many; what it raises
        ends the fetching.

        Raises:
            ConfigError: the cache is smaller than all of them. Others as `open`.
        """
        wanted = [name for name in names if isinstance(self._elsewhere.get(name), InStore)]
        wanted = [name for name in wanted if not (self._folder / name).exists()]
        if not wanted:
            return
        total = sum(self._records[name].size_bytes for name in wanted)
        if self._cache is not None and 0 < self._cache.max_bytes < total:
            raise too_small(self._cache.max_bytes, total)
        is_ending, come = threading.Event(), dict.fromkeys(wanted, 0)

        def get(name: str) -> None:
            def keep_on(num_bytes: int) -> None:
                come[name] = max(come[name], num_bytes)
                if is_ending.is_set():
                    raise Interrupted("the fetching was ended")

            self.open(name, keep_on).close()
            come[name] = self._records[name].size_bytes

        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            futures = [pool.submit(get, name) for name in wanted]
            try:
                for future in futures:
                    while wait([future], SECONDS_BETWEEN_LOOKS).not_done:
                        report(sum(come.values()), total)
                    future.result()
            except BaseException:
                is_ending.set()
                pool.shutdown(cancel_futures=True)
                raise
        report(total, total)

    @cached_property
    def _records(self) -> dict[str, FileRecord]:
        return {record.path: record for record in read_manifest(self._folder).files}


def file_cache(runtime: RuntimeConfig) -> FileCache:
    """Return the cache of this machine."""
    folder = runtime.cache_dir or Path(runtime.artifacts_dir) / "cache"
    return FileCache(Path(folder).absolute(), runtime.cache_bytes)


def fetch(
    place: Place,
    record: FileRecord,
    path: Path,
    keep_on: Callable[[int], None] = lambda _: None,
) -> None:
    """Copy the file at `place` to `path`, where it stands only once it is whole and checked.

    A store that fails, or gives other bytes, is asked once more.

    Raises:
        PlaceError: the store failed, or the disk here is full. ArtifactError: other bytes came.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, found = path.with_name(f"{path.name}.partial"), ""
    try:
        for number in range(1, NUM_TRIES + 1):
            try:
                found = _copy(place, partial, keep_on)
            except PlaceError:
                if number == NUM_TRIES:
                    raise
                continue
            if found == record.sha256:
                partial.replace(path)
                return
    except OSError as error:
        raise disk_failure(path, error, record.size_bytes) from error
    finally:
        partial.unlink(missing_ok=True)
    raise ArtifactError(
        f"{place}: {record.path} has the sha256 {found}, expected {record.sha256}, and so twice;"
        " put a whole copy there, or delete the artifact, which is then made again"
    )


def too_small(max_bytes: int, needed: int) -> ConfigError:
    """Return the error of a cache that cannot hold what is read at once."""
    return ConfigError(
        f"runtime.cache_bytes: found {max_bytes:,}, expected at least {needed:,}: rows of all"
        " these files are read in one shuffled order"
    )


def _copy(place: Place, target: Path, keep_on: Callable[[int], None]) -> str:
    """Write the bytes at `place` to `target`, durably, and return their sha256."""
    with HashingFile(target) as file:
        for block in place.blocks():
            file.write(block)
            keep_on(file.size_bytes)
        return file.finish()


@contextlib.contextmanager
def _locked(path: Path, on_wait: Callable[[], None]) -> Generator[None]:
    """Hold a lock that the kernel frees when its holder dies."""
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                on_wait()
                time.sleep(SECONDS_BETWEEN_LOOKS)
        yield


def _remove(path: Path) -> bool:
    """Remove a file of the cache, unless a process is just opening it."""
    with path.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink(missing_ok=True)
        return True


def _status(path: Path) -> os.stat_result | None:
    """Return a file's status, or None if another process has just removed it."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None
