"""Fingerprint a source without fetching it: list its local files and hash their bytes.

The fingerprint is part of the cache key of `download` and computed for every plan, so a file's
sha256 is cached while its size, times and inode stay the same.
"""

import contextlib
import glob
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from llm.artifact import digest, file_sha256, file_stamp, write_json_atomically
from llm.config import SourceConfig
from llm.data.raw.formats import content_of, is_readable, readable_suffixes, refuse_name
from llm.data.raw.record_formats import AUTO, formats_of
from llm.data.sources.hub import resolve_commit
from llm.data.sources.stdlib import library_files
from llm.errors import DataError, DiskFullError
from llm.role import Role

NANOSECONDS_UNTIL_CACHED = 2_000_000_000
"""A file changed twice within one tick of the file system's clock keeps its times, as in git."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalFiles:
    """The files of a local source, and the number of files of unknown format beside them."""

    files: list[tuple[str, Path]]
    """(name relative to the source's root with `/` between folders, path), sorted by name."""
    num_ignored: int


def fingerprint(source: SourceConfig, role: str, cache_file: Path | None) -> str:
    """Return a digest, 32 hexadecimal characters, of the data of `source` as `role`.

    Local files count by relative name and bytes, not by path. `cache_file` holds the sha256 of
    unchanged files; None reads them all.

    Raises:
        DataError: a local file is missing or unreadable, the hub cannot resolve a branch, or the
        format is not one of the dataset's content; the message names the setting.
    """
    _refuse_format(source, role)
    if source.kind == "url":
        return digest(["url", content_of(role), source.sha256])
    if source.kind == "hub":
        parts = (source.hub_name, source.hub_config, source.hub_split)
        try:
            return digest(["hub", content_of(role), *parts, resolve_commit(source, role)])
        except ConnectionError as error:
            raise DataError(
                f"{error}; to plan without the hub, set download.{role}.hub_revision to a commit"
            ) from error
    try:
        files = library_files() if source.kind == "stdlib" else list_files(source, role).files
        return files_fingerprint(source, role, _hash_files(files, cache_file))
    except OSError as error:
        raise DataError(f"download.{role}.path: {error}; make it readable") from error


def _refuse_format(source: SourceConfig, role: str) -> None:
    """Raise if the format of a source belongs to another content than its dataset's."""
    content = content_of(role)
    if source.format == AUTO or source.format in formats_of(content):
        return
    known = ", ".join((AUTO, *formats_of(content)))
    raise DataError(
        f"download.{role}.format: found {source.format}, expected one of {known} since"
        f" {Role.parse(role).name} holds {content}"
    )


def files_fingerprint(source: SourceConfig, role: str, hashes: Iterable[tuple[str, str]]) -> str:
    """Return `fingerprint` for a stdlib or files source from the (name, sha256) of its files."""
    files_sha256 = hashlib.sha256()
    for name, sha256 in sorted(hashes):
        files_sha256.update(json.dumps([name, sha256]).encode())
    maker = [platform.python_implementation(), platform.python_version()]
    made_by = maker if source.kind == "stdlib" else []
    return digest([source.kind, content_of(role), made_by, files_sha256.hexdigest()])


def list_files(source: SourceConfig, role: str) -> LocalFiles:
    """List the files of a `files` source: one file, all below a folder, or the matches of a glob.

    Hidden files and folders are left out, as are folders behind symbolic links.

    Raises:
        DataError: there are no files, or none can be read as `role`.
    """
    pattern = os.path.expanduser(source.path)  # noqa: PTH111 (Path drops the `/` that ends a glob)
    if Path(pattern).is_file():
        refuse_name(Path(pattern).name, role, "path")
        return LocalFiles(files=[(Path(pattern).name, Path(pattern))], num_ignored=0)
    if Path(pattern).is_dir():
        root, candidates = Path(pattern), _walk(Path(pattern))
    elif glob.has_magic(pattern):
        root = _fixed_part(pattern)
        matches = glob.glob(pattern, recursive=True)  # noqa: PTH207 (takes absolute patterns too)
        candidates = (Path(match) for match in matches if _is_part(Path(match)))
    else:
        raise DataError(
            f"download.{role}.path: {source.path} does not exist; expected a file, a folder or a"
            " glob"
        )
    every = sorted((path.relative_to(root).as_posix(), path) for path in candidates)
    known = [entry for entry in every if is_readable(entry[0], role)]
    if not known:
        raise DataError(
            f"download.{role}.path: none of the {len(every)} files in {source.path} has a known"
            f" format; expected {readable_suffixes(role)}"
        )
    return LocalFiles(files=known, num_ignored=len(every) - len(known))


def _walk(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        yield from (path for path in paths if _is_part(path))


def _raise(error: OSError) -> None:
    raise error


def _is_part(path: Path) -> bool:
    """Return whether a path is a file or a dangling link, which raises an error later."""
    return path.is_file() or not path.exists()


def _fixed_part(pattern: str) -> Path:
    """Return the folder above the first wildcard: `data` for `data/*/part-*.txt`."""
    parts = Path(pattern).parts
    wild = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:wild])


def _hash_files(
    files: Iterable[tuple[str, Path]], cache_file: Path | None
) -> list[tuple[str, str]]:
    cached = _read_cache(cache_file)
    is_changed = False
    hashes: list[tuple[str, str]] = []
    for name, path in files:
        key, stamp = os.path.abspath(path), file_stamp(path)  # noqa: PTH100 (resolve() follows links)
        record = cached.get(key)
        if record is None or record[:-1] != stamp:
            before = time.time_ns()
            record = [*stamp, file_sha256(path)]
            if file_stamp(path) == stamp and before - path.stat().st_ctime_ns > (
                NANOSECONDS_UNTIL_CACHED
            ):
                cached[key], is_changed = record, True
        hashes.append((name, str(record[-1])))
    if cache_file is not None and is_changed:
        # an unwritable cache only costs time; the stage reports a full disk itself
        with contextlib.suppress(OSError, DiskFullError):
            cache_file.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomically(cache_file, cached, is_durable=False)
    return hashes


def _read_cache(cache_file: Path | None) -> dict[str, list[int | str]]:
    """Return the cached hashes; none if the cache is missing or damaged."""
    try:
        cached = json.loads(cache_file.read_bytes()) if cache_file is not None else {}
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(cached, dict):
        return {}
    records = cast(dict[str, object], cached).items()
    return {
        key: cast(list[int | str], record)
        for key, record in records
        if isinstance(record, list) and len(cast(list[object], record)) == 5
    }
