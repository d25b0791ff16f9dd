"""Artifacts: a stage's output folder, its manifest written last, published by a rename.

Readers see a whole artifact or none. Its digest covers the bytes of its files only, so equal bytes
have equal digests whenever and wherever they were made. Logs (times, rates) are stored and verified
with the files, and are not part of the digest.
"""

import hashlib
import io
import json
import math
import os
import shutil
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import IO, cast

from llm.errors import ArtifactError
from llm.runtime.disk import disk_full, refuse_full_disk
from llm.runtime.failpoints import failpoint

MANIFEST = "manifest.json"
DIGEST_HEX_CHARACTERS = 32  # 128 bits; MLflow cuts dataset digests at 36 characters

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """One file of an artifact: its path inside the folder, its size and the sha256 of its bytes."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """A published artifact: `digest` of its files, `summary` by the stage."""

    stage: str
    digest: str
    path: Path
    summary: Mapping[str, Json]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The content of `manifest.json`: the files, what they were made from, and by what code."""

    stage: str
    digest: str
    files: Sequence[FileRecord]
    logs: Sequence[FileRecord]
    summary: Mapping[str, Json]
    settings: Mapping[str, Json] = field(default_factory=dict[str, Json])
    inputs: Mapping[str, str] = field(default_factory=dict[str, str])
    code: Mapping[str, str] = field(default_factory=dict[str, str])
    provenance: Mapping[str, Json] = field(default_factory=dict[str, Json])


def canonical(value: object, where: str = "value") -> Json:
    """Return `value` as plain JSON types in one canonical form.

    Raises:
        TypeError: another type, or a mapping key that is not a string.
        ValueError: a float that is not finite.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where}: {value} has no canonical form; use a finite number")
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: canonical(getattr(value, f.name), f"{where}.{f.name}") for f in fields(value)
        }
    if isinstance(value, Mapping):
        result: dict[str, Json] = {}
        for key, item in cast(Mapping[object, object], value).items():
            if not isinstance(key, str):
                raise TypeError(f"{where}: mapping key {key!r} is not a string")
            result[key] = canonical(item, f"{where}.{key}")
        return result
    if isinstance(value, list | tuple):
        items = cast(Sequence[object], value)
        return [canonical(item, f"{where}[{index}]") for index, item in enumerate(items)]
    raise TypeError(f"{where}: {type(value).__name__} has no canonical form")


def canonical_json(value: object) -> str:
    """Encode `value` as JSON with sorted keys and no spaces: equal values, equal text."""
    return json.dumps(canonical(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: object) -> str:
    """Return the digest of `value`'s canonical JSON, 32 hexadecimal characters."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:DIGEST_HEX_CHARACTERS]


class HashingFile(io.RawIOBase):
    """A binary file that hashes the bytes written to it, so they need not be read back."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("wb")
        self._sha256 = hashlib.sha256()
        self.size_bytes = 0
        self.pending_bytes = 0
        """Of the current write, or of the one that failed."""

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:  # type: ignore[override]
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        self.pending_bytes = len(view)
        self._file.write(failpoint("file.write", view))
        self._sha256.update(view)
        self.size_bytes += len(view)
        return len(view)

    def finish(self) -> str:
        """Flush and fsync, close, and return the sha256 of all bytes."""
        self._file.flush()
        failpoint("file.sync")
        os.fsync(self._file.fileno())
        self.close()
        return self._sha256.hexdigest()

    def close(self) -> None:
        if not self._file.closed:
            self._file.close()
        super().close()


class ArtifactWriter:
    """Writes files to a staging folder and completes it with a manifest.

    with writer.open("train.jsonl") as file: file.write(b"...")
    writer.write_bytes("tokenizer.json", data)
    writer.finish(stage="pack", summary={...})
    """

    def __init__(self, folder: Path) -> None:
        """Create `folder`; files of an earlier, killed attempt are removed."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder = folder
        self._files: dict[str, FileRecord] = {}
        self._logs: dict[str, FileRecord] = {}

    @contextmanager
    def open(self, name: str, *, is_log: bool = False) -> Generator[IO[bytes]]:
        """Open the new file `name` for binary writing through a 1 MiB buffer."""
        path = self._new_path(name)
        raw = HashingFile(path)
        buffered = io.BufferedWriter(raw, buffer_size=1 << 20)
        try:
            yield buffered
            buffered.flush()
            record = FileRecord(path=name, sha256=raw.finish(), size_bytes=raw.size_bytes)
        except BaseException as error:
            with suppress(OSError):  # the first error counts, not that of closing
                raw.close()
            if isinstance(error, OSError):
                raise disk_full(error, path, raw.pending_bytes or None) or error from error
            raise
        (self._logs if is_log else self._files)[name] = record

    def write_bytes(self, name: str, data: bytes, *, is_log: bool = False) -> None:
        """Write the whole file `name` at once."""
        with self.open(name, is_log=is_log) as file:
            file.write(data)

    def write_json(self, name: str, value: object, *, is_log: bool = False) -> None:
        """Write `value` as indented JSON with sorted keys."""
        text = json.dumps(canonical(value), indent=2, sort_keys=True, allow_nan=False)
        self.write_bytes(name, text.encode() + b"\n", is_log=is_log)

    def adopt(self, path: Path, record: FileRecord, name: str) -> None:
        """Add a finished file as `name`: by a hard link where possible, else by a copy."""
        target = self._new_path(name)
        try:
            os.link(path, target)
        except OSError:  # a file system without hard links
            with self.open(name) as file, path.open("rb") as original:
                shutil.copyfileobj(original, file)
            if self._files[name].sha256 != record.sha256:
                raise ArtifactError(f"{path}: its bytes changed; run the stage again") from None
        self._files[name] = replace(record, path=name)

    def _folders(self) -> set[Path]:
        # all subfolders; the artifact's own is synced with the manifest
        names = (Path(name) for name in (*self._files, *self._logs))
        return {self.folder / parent for name in names for parent in name.parents} - {self.folder}

    def _new_path(self, name: str) -> Path:
        if name in self._files or name in self._logs or name == MANIFEST:
            raise ValueError(f"{name} is already written")
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def finish(
        self,
        *,
        stage: str,
        summary: Mapping[str, Json],
        settings: Mapping[str, Json] | None = None,
        inputs: Mapping[str, str] | None = None,
        code: Mapping[str, str] | None = None,
        provenance: Mapping[str, Json] | None = None,
    ) -> Manifest:
        """Write `manifest.json` durably, which completes the artifact, and return it."""
        files = [self._files[name] for name in sorted(self._files)]
        manifest = Manifest(
            stage=stage,
            digest=digest([stage, files]),
            files=files,
            logs=[self._logs[name] for name in sorted(self._logs)],
            summary=summary,
            settings=settings or {},
            inputs=inputs or {},
            code=code or {},
            provenance=provenance or {},
        )
        for folder in sorted(self._folders()):
            fsync_folder(folder)
        write_json_atomically(self.folder / MANIFEST, manifest)
        return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of the artifact in `folder`.

    Raises:
        ArtifactError: the manifest is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_bytes())
        data["files"] = [FileRecord(**record) for record in data["files"]]
        data["logs"] = [FileRecord(**record) for record in data["logs"]]
        manifest = Manifest(**data)
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{folder}: no {MANIFEST} there, so the artifact is missing or unfinished"
        ) from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ArtifactError(
            f"{path}: not a manifest of this version ({error}); remove the folder"
        ) from error
    if manifest.digest != digest([manifest.stage, list(manifest.files)]):
        raise ArtifactError(
            f"{path}: its list of files does not give its digest; remove the folder"
        )
    return manifest


def load_artifact(folder: Path) -> Artifact:
    """Open the artifact in `folder` by its manifest, without reading its files."""
    manifest = read_manifest(folder)
    return Artifact(
        stage=manifest.stage, digest=manifest.digest, path=folder, summary=manifest.summary
    )


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_stamp(path: Path) -> list[int]:
    """Return size, times and inode of a file, which change when the file does."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def make_folder(folder: Path) -> None:
    """Make `folder` and its missing parents durably."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync_folder(folder.parent)


def fsync_folder(folder: Path) -> None:
    """Make renames in `folder` durable, by an fsync of the folder."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes_atomically(path: Path, data: bytes, *, is_durable: bool = True) -> None:
    """Write `path` so that a reader sees the old bytes or the new ones, never a part."""
    writer = f"{os.getpid()}.{threading.get_ident()}"  # no two writers share a temporary file
    temporary = path.with_name(f".{path.name}.{writer}.tmp")
    with refuse_full_disk(path, len(data)):
        try:
            with temporary.open("wb") as file:
                file.write(failpoint(f"{path.name}.write", data))
                if is_durable:
                    file.flush()
                    os.fsync(file.fileno())
            failpoint(f"{path.name}.rename")
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if is_durable:
            fsync_folder(path.parent)


def write_json_atomically(path: Path, value: object, *, is_durable: bool = True) -> None:
    """Write `value` as indented canonical JSON, atomically."""
    text = json.dumps(canonical(value), indent=2, sort_keys=True, allow_nan=False)
    write_bytes_atomically(path, text.encode() + b"\n", is_durable=is_durable)
