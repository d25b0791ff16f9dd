"""The artifact store: artifacts by content digest, and records of the cache key of each.

    artifacts/<stage>/<digest>/         a published artifact
    artifacts/keys/<stage>/<key>.json   the parts of the key, and the digest of the artifact
    artifacts/stamps/<stage>/<digest>   size, times, inode of each file when it was last verified
    artifacts/staging/<stage>-<key>/    in progress: job.json, out/, work/ (survives kills)
    artifacts/locks/                    kernel locks: two runs that need one artifact build it once
    artifacts/damaged/                  damaged artifacts, each with the reason

It needs no server. A key is a hit only if every file of its artifact is verified.
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
    file_stamp,
    fsync_folder,
    load_artifact,
    make_folder,
    read_manifest,
    write_json_atomically,
)
from llm.errors import ArtifactError
from llm.role import Role


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyParts:
    """Everything that decides the bytes of a step's artifact. `key` is its digest."""

    stage: str
    role: str
    settings: Mapping[str, Json]
    """The stage's section of the recipe."""
    seed: int | None
    """The run's seed where the stage draws from it."""
    inputs: Mapping[str, str]
    """Content digest of each input."""
    libraries: Mapping[str, str]
    """Versions of the libraries that affect the bytes."""
    code: Mapping[str, str]
    """Digest of each module's code."""

    @property
    def key(self) -> str:
        """The cache key. The index of a source does not count, only what it gives."""
        return digest(replace(self, role=Role.parse(self.role).name))


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyRecord:
    """The record of a key: the digest of its artifact, and links to the runs that built it."""

    key: str
    parts: KeyParts
    digest: str
    seconds: float
    """Wall time of the build."""
    made_at: str
    """Time of the build, UTC."""
    reused_from: str = ""
    """The key whose artifact the user declared valid for this key too (`--reuse`)."""
    links: Mapping[str, str] = field(default_factory=dict[str, str])
    """Ids of the MLflow and Prefect runs that built it."""


class ArtifactStore:
    """The artifact store in one folder."""

    def __init__(self, root: Path) -> None:
        """Open the store in `root`; the folder is created at the first write."""
        self.root = root.absolute()

    def staging(self, parts: KeyParts) -> Path:
        """Return the folder in which the artifact of `parts` is built."""
        return self.root / "staging" / f"{parts.stage}-{parts.key}"

    def folder(self, stage: str, content_digest: str) -> Path:
        """Return the folder of the artifact with this digest; it need not exist."""
        return self.root / stage / content_digest

    def find(self, parts: KeyParts) -> tuple[KeyRecord, Artifact] | None:
        """Return the verified artifact of `parts`, or None; a damaged one is set aside first."""
        record = self.record(parts.stage, parts.key)
        if record is None:
            return None
        folder = self.folder(parts.stage, record.digest)
        if not _exists(folder):
            return None
        try:
            self.verify(folder)
            return record, load_artifact(folder)
        except ArtifactError:
            with self._lock_of(folder):
                self._set_aside_if_damaged(folder)  # another process may have, and rebuilt it
            return None

    def damage(self, record: KeyRecord) -> str:
        """Return why a recorded artifact cannot be used, or an empty string."""
        folder = self.folder(record.parts.stage, record.digest)
        try:
            if not _exists(folder):
                return "its artifact was deleted"
            self.verify(folder)
        except ArtifactError as error:
            return f"its artifact is damaged: {error}"
        return ""

    def record(self, stage: str, key: str) -> KeyRecord | None:
        """Return the record of a key; None if it is missing or unreadable."""
        return _read_record(self.root / "keys" / stage / f"{key}.json")

    def records(self, *stages: str, newest: int = 200) -> list[KeyRecord]:
        """Return the newest records of some stages, newest first."""
        folders = [self.root / "keys" / stage for stage in stages]
        paths = [path for folder in folders for path in folder.glob("*.json")]
        paths.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
        return [record for path in paths[:newest] if (record := _read_record(path)) is not None]

    def remember(self, record: KeyRecord) -> None:
        """Write the record of a key durably."""
        folder = self.root / "keys" / record.parts.stage
        make_folder(folder)
        write_json_atomically(folder / f"{record.key}.json", record)

    def publish(self, parts: KeyParts, out: Path) -> Artifact:
        """Give a finished staging folder its final name in one rename, and return the artifact.

        If the same artifact exists undamaged, it is kept and `out` is removed: two keys may give
        the same bytes, even at the same time.
        """
        manifest = read_manifest(out)
        folder = self.folder(parts.stage, manifest.digest)
        with self._lock_of(folder):
            self._set_aside_if_damaged(folder)
            if folder.is_dir():
                shutil.rmtree(out)
            else:
                make_folder(folder.parent)
                out.rename(folder)
                fsync_folder(folder.parent)
                self._write_stamps(folder)
        return load_artifact(folder)

    def verify(self, folder: Path, *, is_thorough: bool = False) -> None:
        """Check that every file of an artifact exists with the expected bytes.

        A file whose size, times and inode have not changed since it was last verified counts as
        unchanged; any other is hashed, and `is_thorough` hashes all.

        Raises:
            ArtifactError: naming the first file that is missing or differs.
        """
        manifest = read_manifest(folder)
        stamps = {} if is_thorough else self._read_stamps(folder)
        has_news = False
        for record in (*manifest.files, *manifest.logs):
            path = folder / record.path
            try:
                stamp = file_stamp(path)
            except OSError as error:
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
        """Move a damaged artifact to damaged/ with the reason, and return its new folder."""
        target = self.root / "damaged" / f"{folder.parent.name}-{folder.name}-{time.time_ns()}"
        target.parent.mkdir(parents=True, exist_ok=True)
        written = folder.resolve() if folder.is_symlink() else target  # a link may be relative
        folder.rename(target)
        (written / "REASON.txt").write_text(reason + "\n", encoding="utf-8")
        return target

    def _set_aside_if_damaged(self, folder: Path) -> None:
        if _exists(folder):
            try:
                self.verify(folder)
            except ArtifactError as error:
                self.set_aside(folder, str(error))

    def _lock_of(self, folder: Path) -> AbstractContextManager[None]:
        """Hold the lock of the artifact in `folder`, to publish or remove it."""
        return self.lock(f"{folder.parent.name}-{folder.name}.artifact")

    def artifacts(self, stages: Sequence[str]) -> list[Path]:
        """Return the folders of all published artifacts of these stages."""
        folders = (self.root / stage for stage in stages)
        return sorted(path.parent for folder in folders for path in folder.glob(f"*/{MANIFEST}"))

    def sweep(self) -> None:
        """Remove the staging folders of published artifacts that no run is building."""
        for folder in (self.root / "staging").glob("*-*"):
            stage, _, key = folder.name.rpartition("-")
            if self.record(stage, key) is not None:
                with contextlib.suppress(BlockingIOError), self.lock(folder.name, is_waiting=False):
                    shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def lock(
        self, name: str, *, on_wait: Callable[[], None] | None = None, is_waiting: bool = True
    ) -> Generator[None]:
        """Hold the lock `name`; the kernel frees it when the holder dies.

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
            return {}  # every file is hashed again

    def _write_stamps(self, folder: Path) -> None:
        manifest = read_manifest(folder)
        path = self._stamps_path(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        records = (*manifest.files, *manifest.logs)
        write_json_atomically(path, {r.path: file_stamp(folder / r.path) for r in records})


def library_versions(libraries: Sequence[str]) -> dict[str, str]:
    """Return the installed version of each library, or `none`, without importing it."""
    from importlib import metadata  # takes 30 ms

    def version(library: str) -> str:
        try:
            return metadata.version(library)
        except metadata.PackageNotFoundError:  # the stage raises, with how to install it
            return "none"

    return {library: version(library) for library in libraries}


def _exists(folder: Path) -> bool:
    """Tell whether an artifact's folder is there.

    Raises:
        ArtifactError: it is a link to a missing folder. Its disk may only be unmounted, so the
        artifact is not built again.
    """
    if folder.is_symlink() and not folder.exists():
        raise ArtifactError(
            f"{folder}: links to {folder.readlink()}, which is missing; mount its disk, or delete"
            " the link to have the artifact built again"
        )
    return folder.is_dir()


def _read_record(path: Path) -> KeyRecord | None:
    try:
        data = json.loads(path.read_bytes())
        data["parts"] = KeyParts(**data["parts"])
        return KeyRecord(**data)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
