"""Files of an artifact that lie elsewhere: on another disk, or in a store that fsspec speaks to.

`elsewhere.json` in the artifact's folder says where, by name: an absolute path or a URL. It is no
part of the artifact: sizes and sha256 are in the manifest, wherever the bytes are. What a store
wants to know of its user (keys, tokens) comes from the environment, as fsspec's file systems read
it, and is never part of a URL here.
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from llm.artifact import FileRecord, HashingFile, fsync_folder, write_json_atomically
from llm.errors import ArtifactError, ConfigError, PlaceError

ELSEWHERE = "elsewhere.json"
BLOCK_BYTES = 8 << 20  # each is a request to the store
ADVICE = "bring it back, or delete the folder of its artifact, which is then made again"


@dataclass(frozen=True, slots=True)
class OnDisk:
    """A file or folder on a disk of this machine: its files are read in place."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def below(self, name: str) -> "OnDisk":
        """Return the place of a file in this folder."""
        return OnDisk(self.path / name)

    def size_bytes(self) -> int:
        """Return its size.

        Raises:
            PlaceError: it is not there.
        """
        try:
            return self.path.stat().st_size
        except OSError as error:
            raise PlaceError(
                f"{self}: missing ({error.strerror}); mount its disk, {ADVICE}"
            ) from error

    def blocks(self) -> Iterator[bytes]:
        """Yield its bytes, from first to last.

        Raises:
            PlaceError: it cannot be read.
        """
        self.size_bytes()
        try:
            with self.path.open("rb") as file:
                while block := file.read(BLOCK_BYTES):
                    yield block
        except OSError as error:
            raise PlaceError(f"{self}: cannot be read ({error.strerror})") from error

    def write(self, source: Path, record: FileRecord) -> None:
        """Copy `source` here, durably; nothing stands under this name before it is whole.

        Raises:
            PlaceError: the disk is full, or cannot be written. ArtifactError: `source` is damaged.
        """
        partial = self.path.with_name(f".{self.path.name}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with HashingFile(partial) as file:
                with source.open("rb") as original:
                    shutil.copyfileobj(original, file, BLOCK_BYTES)
                found = file.finish()  # of the bytes as they were written
            if found == record.sha256:
                partial.replace(self.path)
                for folder in self.path.parents[:3]:  # those that may be new
                    fsync_folder(folder)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise disk_failure(self.path, error, record.size_bytes) from error
        if found != record.sha256:
            partial.unlink()
            raise ArtifactError(f"{source}: sha256 {found}, expected {record.sha256}")


@dataclass(frozen=True, slots=True)
class InStore:
    """A file or folder in a store: its files are fetched whole before they are read."""

    url: str

    def __str__(self) -> str:
        return self.url

    def below(self, name: str) -> "InStore":
        """Return the place of a file in this folder."""
        return InStore(f"{self.url}/{name}")

    def size_bytes(self) -> int:
        """Return its size.

        Raises:
            ConfigError: there is no library for such URLs. PlaceError: it is not there, or the
            store does not answer.
        """
        store, path = self._open()
        try:
            return int(store.size(path))
        except Exception as error:  # each library has errors of its own
            raise self._failure(error) from error

    def blocks(self) -> Iterator[bytes]:
        """Yield its bytes, from first to last.

        Raises:
            ConfigError, PlaceError: as `size_bytes`.
        """
        store, path = self._open()
        try:
            # cache_type: fsspec's own would fetch more than what is read, and keep it in memory
            file = store.open(path, "rb", block_size=BLOCK_BYTES, cache_type="none")
        except Exception as error:
            raise self._failure(error) from error
        with file:
            while True:
                try:
                    block = file.read(BLOCK_BYTES)
                except Exception as error:
                    raise self._failure(error) from error
                if not block:
                    return
                yield block

    def write(self, source: Path, record: FileRecord) -> None:
        """Copy `source` here, and read back what the store has then.

        Raises:
            ConfigError: nothing can be written to such URLs. PlaceError: the store is full, does
            not answer or has other bytes. ArtifactError: `source` is damaged.
        """
        store, path = self._open()
        try:
            store.put_file(str(source), path)
        except NotImplementedError as error:
            raise ConfigError(f"{self}: can be read only; expected a store to write to") from error
        except Exception as error:
            raise self._failure(error) from error
        hasher = hashlib.sha256()
        for block in self.blocks():
            hasher.update(block)
        if hasher.hexdigest() != record.sha256:
            with source.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
                    raise ArtifactError(f"{source}: damaged; expected sha256 {record.sha256}")
            raise PlaceError(f"{self}: the store gives back other bytes than it was given")

    def _open(self) -> tuple[Any, str]:
        """Return the file system, and the path in it."""
        import fsspec  # 0.1 s that few need

        try:
            return cast(Any, fsspec).core.url_to_fs(self.url)
        except ImportError as error:  # says what to install
            raise ConfigError(f"{self}: {error}") from error
        except ValueError as error:
            raise ConfigError(f"{self}: {error}; expected a folder or a URL of a store") from error
        except Exception as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> PlaceError:
        if isinstance(error, FileNotFoundError):
            reason = f" ({error.__cause__})" if error.__cause__ else ""  # http: any failure is this
            return PlaceError(f"{self}: not there{reason}; {ADVICE}")
        return PlaceError(
            f"{self}: the store failed ({type(error).__name__}: {error}); see that it can be"
            " reached, has room, and that the environment holds what it asks for"
        )


Place = OnDisk | InStore


def parse_place(text: str) -> Place:
    """Read a folder or a URL as the user writes it.

    Raises:
        ConfigError: it holds a secret, which would be written down, or is not of one store.
    """
    scheme, _, rest = text.partition("://")
    if not rest or scheme in ("file", "local"):
        return OnDisk(Path(rest or text).absolute())
    parts = urlsplit(text)
    if parts.username or parts.password or parts.query:
        shown = f"{scheme}://...{parts.path}"
        raise ConfigError(
            f"{shown}: holds a user name, password or query; expected these in the environment,"
            " where the store's library looks for them"
        )
    if "::" in text:
        raise ConfigError(f"{text}: found `::`, expected the URL of one store")
    return InStore(text.rstrip("/"))


def read_elsewhere(folder: Path) -> dict[str, Place]:
    """Return where the files of the artifact in `folder` are that are not in it, by their names.

    Raises:
        ArtifactError: the record is damaged.
    """
    path = folder / ELSEWHERE
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"{type(found).__name__}, expected an object")
        listed = cast(dict[str, object], found)
        return {name: parse_place(str(place)) for name, place in listed.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError, ConfigError) as error:
        raise ArtifactError(f"{path}: damaged ({error})") from error


def write_elsewhere(folder: Path, places: Mapping[str, Place]) -> None:
    """Record where files are, durably. A file that is in the folder too is read there."""
    write_json_atomically(folder / ELSEWHERE, {name: str(place) for name, place in places.items()})


def check_size(place: Place, record: FileRecord) -> None:
    """See that a file of an artifact is where it was put, with the size it had.

    Raises:
        PlaceError: it is not there, or cannot be looked at. ArtifactError: it has another size.
    """
    if (found := place.size_bytes()) != record.size_bytes:
        raise ArtifactError(f"{place}: {found} bytes, expected {record.size_bytes}")


def disk_failure(path: Path, error: OSError, needed_bytes: int) -> PlaceError:
    """Return the error that says why `path` could not be written."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return PlaceError(f"{path}: cannot be written ({error.strerror})")
    return PlaceError(
        f"{path}: no room for {needed_bytes:,} bytes ({error.strerror}); free some, or name another"
        " place; what is whole stays"
    )
