"""The store: artifacts by the digest of their bytes, and keys that say what gave which bytes.

    artifacts/<stage>/<digest>/         a published artifact, whole
    artifacts/keys/<stage>/<key>.json   what it was made from, and which digest came out
    artifacts/stamps/<stage>/<digest>   size, times, inode of each file when it was last verified
    artifacts/staging/<stage>-<key>/    one being made: job.json, out/, work/ (which outlives kills)
    artifacts/locks/                    kernel locks: two runs that want one artifact build it once
    artifacts/damaged/                  what was found damaged, each with its reason

It needs no server, and is the truth about what is there: a hit is a hit only if every file was
seen to be whole.
"""

import contextlib
import fcntl
import json
import shutil
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

from llm.artifact import (
    MANIFEST,
    Artifact,
    Json,
    digest,
    file_sha256,
    fsync_folder,
    load_artifact,
    make_folder,
    read_manifest,
    write_json_atomically,
)
from llm.errors import ArtifactError, PlaceError
from llm.storage.elsewhere import InStore, OnDisk, Place, check_size, read_elsewhere


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyParts:
    """All that decides the bytes a step makes. `key` is the digest of it."""

    stage: str
    role: str
    settings: Mapping[str, Json]
    """The stage's section of the recipe."""
    seed: int | None
    """The run's seed where the stage draws from it."""
    inputs: Mapping[str, str]
    """Content digest of each input."""
    libraries: Mapping[str, str]
    """Versions of the libraries that decide the bytes."""
    code: Mapping[str, str]
    """Digest of each module's code."""

    @property
    def key(self) -> str:
        """The cache key. Which of several sources a download is does not count, what it is does."""
        return digest(replace(self, role=self.role.partition(".")[0]))


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyRecord:
    """What is remembered under a key: which digest came out, and where to read about it."""

    key: str
    parts: KeyParts
    digest: str
    seconds: float
    """Wall time of the building."""
    made_at: str
    """When, UTC."""
    reused_from: str = ""
    """The key whose artifact someone declared to hold for this one too (`--reuse`)."""
    links: Mapping[str, str] = field(default_factory=dict[str, str])
    """Ids of the MLflow and Prefect runs that made it."""


class Store:
    """The artifacts folder."""

    def __init__(self, root: Path) -> None:
        """Open the store in `root`; nothing is made before something is written."""
        self.root = root.absolute()

    def staging(self, parts: KeyParts) -> Path:
        """Return the folder in which the artifact of `parts` is made."""
        return self.root / "staging" / f"{parts.stage}-{parts.key}"

    def folder(self, stage: str, content_digest: str) -> Path:
        """Return where the artifact with these bytes lies, or would."""
        return self.root / stage / content_digest

    def find(self, parts: KeyParts) -> tuple[KeyRecord, Artifact] | None:
        """Return the verified artifact of `parts`, or None; a damaged one is set aside first."""
        record = self.record(parts.stage, parts.key)
        if record is None:
            return None
        folder = self.folder(parts.stage, record.digest)
        if not folder.is_dir():
            return None
        try:
            self.verify(folder)
            return record, load_artifact(folder)
        except ArtifactError:
            with self._lock_of(folder):
                self._set_aside_if(ArtifactError, folder)  # another may have, and made it again
            return None

    def damage(self, record: KeyRecord) -> str:
        """Say what keeps a recorded artifact from being used, or nothing."""
        folder = self.folder(record.parts.stage, record.digest)
        if not folder.is_dir():
            return "its artifact was deleted"
        try:
            self.verify(folder)
        except ArtifactError as error:
            return f"its artifact is damaged: {error}"
        return ""

    def record(self, stage: str, key: str) -> KeyRecord | None:
        """Return what is remembered under a key; an unreadable record counts as none."""
        return _read_record(self.root / "keys" / stage / f"{key}.json")

    def records(self, *stages: str, newest: int = 200) -> list[KeyRecord]:
        """Return the newest records of some stages, newest first."""
        folders = [self.root / "keys" / stage for stage in stages]
        paths = [path for folder in folders for path in folder.glob("*.json")]
        paths.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
        return [record for path in paths[:newest] if (record := _read_record(path)) is not None]

    def remember(self, record: KeyRecord) -> None:
        """Write a key's record, durably."""
        folder = self.root / "keys" / record.parts.stage
        make_folder(folder)
        write_json_atomically(folder / f"{record.key}.json", record)

    def publish(self, parts: KeyParts, out: Path) -> Artifact:
        """Give a finished staging folder its final name in one rename, and return the artifact.

        When the same bytes are there already, whole, they stay and `out` is dropped. Two keys may
        give the same bytes at the same time.
        """
        manifest = read_manifest(out)
        folder = self.folder(parts.stage, manifest.digest)
        with self._lock_of(folder):
            self._set_aside_if((ArtifactError, PlaceError), folder)
            if folder.is_dir():
                shutil.rmtree(out)
            else:
                make_folder(folder.parent)
                out.rename(folder)
                fsync_folder(folder.parent)
                self._write_stamps(folder)
        return load_artifact(folder)

    def verify(self, folder: Path, *, is_thorough: bool = False) -> None:
        """Check that every file of an artifact is there and whole.

        A file whose size, times and inode are as when it was last verified is taken for
        unchanged; any other is hashed again, and with `is_thorough` all are. So it is on another
        disk. A file in a store is trusted until it is read, which checks it; with `is_thorough` it
        is asked for its size.

        Raises:
            ArtifactError: naming the first file that is missing or differs. PlaceError: the disk or
            the store where a file was put is not there, which is no reason to make it again.
        """
        manifest, elsewhere = read_manifest(folder), read_elsewhere(folder)
        stamps = {} if is_thorough else self._read_stamps(folder)
        has_news = False
        for record in (*manifest.files, *manifest.logs):
            place = _place(folder, record.path, elsewhere)
            if isinstance(place, InStore):
                if is_thorough:
                    check_size(place, record)
                continue
            path = place.path
            if record.path in elsewhere:
                check_size(place, record)
            try:
                stamp = _stamp(path)
            except OSError as error:
                if read_elsewhere(folder) != elsewhere:  # it was moved just now
                    self.verify(folder, is_thorough=is_thorough)
                    return
                raise ArtifactError(f"{path}: missing ({error.strerror})") from error
            if stamp[0] != record.size_bytes:
                raise ArtifactError(f"{path}: {stamp[0]} bytes, expected {record.size_bytes}")
            if stamps.get(record.path) != stamp:
                has_news = True
                if (found := file_sha256(path)) != record.sha256:
                    raise ArtifactError(f"{path}: sha256 {found}, expected {record.sha256}")
        if has_news:
            self._write_stamps(folder)

    def set_aside(self, folder: Path, reason: str) -> Path:
        """Move a damaged artifact out of the way, its reason with it, and return where to."""
        target = self.root / "damaged" / f"{folder.parent.name}-{folder.name}-{time.time_ns()}"
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)
        (target / "REASON.txt").write_text(reason + "\n", encoding="utf-8")
        return target

    def _set_aside_if(
        self, errors: type[Exception] | tuple[type[Exception], ...], folder: Path
    ) -> None:
        """Set the artifact in `folder` aside, if one is there, when looking at it raises these."""
        if folder.is_dir():
            try:
                self.verify(folder)
            except errors as error:
                self.set_aside(folder, str(error))

    def _lock_of(self, folder: Path) -> AbstractContextManager[None]:
        """Hold the lock of the artifact in `folder`: whoever names or removes it does."""
        return self.lock(f"{folder.parent.name}-{folder.name}.artifact")

    def artifacts(self, stages: Sequence[str]) -> list[Path]:
        """Return the folders of all published artifacts of these stages."""
        folders = (self.root / stage for stage in stages)
        return sorted(path.parent for folder in folders for path in folder.glob(f"*/{MANIFEST}"))

    def sweep(self) -> None:
        """Remove the staging folders of artifacts that are published and that nobody is making."""
        for folder in (self.root / "staging").glob("*-*"):
            stage, _, key = folder.name.rpartition("-")
            if self.record(stage, key) is not None:
                with contextlib.suppress(BlockingIOError), self.lock(folder.name, is_waiting=False):
                    shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def lock(
        self, name: str, *, on_wait: Callable[[], None] | None = None, is_waiting: bool = True
    ) -> Generator[None]:
        """Hold the lock `name`, which the kernel frees when its holder dies.

        `on_wait` is called every 0.1 s while another process holds it.

        Raises:
            BlockingIOError: another process holds it and `is_waiting` is off.
        """
        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{name}.lock").open("w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not is_waiting:
                        raise
                    if on_wait is not None:
                        on_wait()
                    time.sleep(0.1)
            yield

    def _stamps_path(self, folder: Path) -> Path:
        return self.root / "stamps" / folder.parent.name / f"{folder.name}.json"

    def _read_stamps(self, folder: Path) -> Mapping[str, Sequence[int]]:
        try:
            return json.loads(self._stamps_path(folder).read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}  # then every file is hashed again, which is always right

    def _write_stamps(self, folder: Path) -> None:
        manifest = read_manifest(folder)
        path = self._stamps_path(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        elsewhere = read_elsewhere(folder)
        records = (*manifest.files, *manifest.logs)
        places = {record.path: _place(folder, record.path, elsewhere) for record in records}
        stamps = {n: _stamp(place.path) for n, place in places.items() if isinstance(place, OnDisk)}
        write_json_atomically(path, stamps)


def library_versions(libraries: Sequence[str]) -> dict[str, str]:
    """Return the installed version of each library, or `none`, from its metadata alone."""
    from importlib import metadata  # 30 ms that only some callers need

    def version(library: str) -> str:
        try:
            return metadata.version(library)
        except metadata.PackageNotFoundError:  # the stage itself says how to install it
            return "none"

    return {library: version(library) for library in libraries}


def _place(folder: Path, name: str, elsewhere: Mapping[str, Place]) -> Place:
    """Return where a file is: in the artifact's folder, or where it was moved to."""
    path = folder / name
    return elsewhere[name] if name in elsewhere and not path.exists() else OnDisk(path)


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _read_record(path: Path) -> KeyRecord | None:
    try:
        data = json.loads(path.read_bytes())
        data["parts"] = KeyParts(**data["parts"])
        return KeyRecord(**data)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
