"""Spread the shards of an artifact over disks and stores, and bring them back.

A shard's files are copied, read back, recorded in `elsewhere.json`, and only then removed here. So
wherever this is stopped the artifact is whole, and the same command goes on.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm.artifact import FileRecord, Manifest, read_manifest
from llm.errors import ArtifactError, ConfigError, PlaceError
from llm.storage.elsewhere import (
    ELSEWHERE,
    OnDisk,
    Place,
    check_size,
    parse_place,
    read_elsewhere,
    write_elsewhere,
)
from llm.storage.file_cache import fetch

STAGE = "pack"  # whose files are read through llm.storage.file_cache


@dataclass(frozen=True, kw_only=True, slots=True)
class Moved:
    """A shard that is at its place now, and how far the whole is."""

    shard: str
    place: Place
    """Of its first file."""
    done_bytes: int
    total_bytes: int


def spread(folder: Path, places: Sequence[str]) -> Iterator[Moved]:
    """Move the shards of the artifact in `folder` to `places` by turns; yield after each.

    A place is a folder that is there, or a URL. Shards that were moved before stay where they are.

    Raises:
        ConfigError: a place is none, or the artifact has no shards that can lie elsewhere.
        PlaceError: a place is full, is not there or does not answer. ArtifactError: a file here is
        missing or damaged.
    """
    manifest = read_manifest(folder)
    shards = _shards(folder, manifest)
    roots = _roots(places)
    known = read_elsewhere(folder)
    _check_room(folder, list(shards.values()), roots)
    total_bytes = sum(record.size_bytes for files in shards.values() for record in files)
    done_bytes = 0
    for number, (shard, files) in enumerate(shards.items()):
        root = roots[number % len(roots)].below(f"{manifest.stage}-{manifest.digest}")
        here = [record for record in files if _is_here(folder, record, known)]
        for record in here:
            if not (record.path in known and _is_whole(known[record.path], record)):
                known[record.path] = root.below(record.path)
                known[record.path].write(folder / record.path, record)
        if here:
            write_elsewhere(folder, known)
        for record in here:
            (folder / record.path).unlink()
        done_bytes += sum(record.size_bytes for record in files)
        place = known[files[0].path]
        yield Moved(shard=shard, place=place, done_bytes=done_bytes, total_bytes=total_bytes)


def bring_back(folder: Path) -> Iterator[Moved]:
    """Copy what lies elsewhere back into the artifact, and forget where it was; yield after each.

    The copies elsewhere stay: other machines may read them.

    Raises:
        PlaceError: a place is not there or does not answer, or this disk is full. ArtifactError: a
        file there is damaged.
    """
    known = read_elsewhere(folder)
    records = [record for record in read_manifest(folder).files if record.path in known]
    total_bytes, done_bytes = sum(record.size_bytes for record in records), 0
    for record in records:
        path, place = folder / record.path, known.pop(record.path)
        if not path.exists():
            fetch(place, record, path)
        if known:
            write_elsewhere(folder, known)
        else:
            (folder / ELSEWHERE).unlink()
        done_bytes += record.size_bytes
        yield Moved(shard=record.path, place=place, done_bytes=done_bytes, total_bytes=total_bytes)


def _shards(folder: Path, manifest: Manifest) -> dict[str, list[FileRecord]]:
    """Return the files of each shard, `train/00000` say."""
    shards: dict[str, list[FileRecord]] = {}
    for record in manifest.files:
        if record.path.endswith(".bin"):
            shards.setdefault(record.path.partition(".")[0], []).append(record)
    if manifest.stage != STAGE or not shards:
        raise ConfigError(f"{folder}: found an artifact of {manifest.stage}, expected rows of pack")
    return shards


def _roots(places: Sequence[str]) -> list[Place]:
    roots = [parse_place(text) for text in places]
    for root in roots:
        if isinstance(root, OnDisk) and not root.path.is_dir():
            raise PlaceError(f"{root}: no such folder; mount its disk, or make it")
    if len(set(roots)) < len(roots):
        raise ConfigError(f"{', '.join(places)}: found the same place twice")
    return roots


def _check_room(
    folder: Path, shards: Sequence[Sequence[FileRecord]], roots: Sequence[Place]
) -> None:
    """See that each disk can take what it will get, before anything is copied."""
    problems: list[str] = []
    for number, root in enumerate(roots):
        if isinstance(root, OnDisk):
            files = [record for shard in shards[number :: len(roots)] for record in shard]
            wanted = sum(r.size_bytes for r in files if (folder / r.path).exists())
            if wanted > (free := shutil.disk_usage(root.path).free):
                problems.append(f"{root}: {free:,} bytes free, expected {wanted:,}")
    if problems:
        raise PlaceError("; ".join([*problems, "free some, or name more places"]))


def _is_here(folder: Path, record: FileRecord, known: dict[str, Place]) -> bool:
    if (folder / record.path).exists():
        return True
    if record.path not in known:
        raise ArtifactError(f"{folder / record.path}: missing; run pack again")
    return False


def _is_whole(place: Place, record: FileRecord) -> bool:
    """Tell whether a file is there that an attempt recorded which was stopped before removing."""
    try:
        check_size(place, record)
    except (ArtifactError, PlaceError):
        return False
    return True
