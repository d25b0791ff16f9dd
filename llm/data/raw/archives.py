"""Read the members of zip and tar files as streams; nothing is extracted to disk.

A member that is not a regular file, whose path leaves the archive, that is encrypted or is itself
an archive is refused with a reason, for the reader to count.
"""

import io
import stat
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PureWindowsPath
from typing import IO

from llm.config import ReadingConfig
from llm.data.raw.compression import Budget, metered
from llm.data.raw.formats import format_of
from llm.data.raw.records import BLOCK_BYTES
from llm.errors import DataError

MAX_HEADER_BYTES = 1 << 20
"""Size limit of a tar header with a long name or attributes."""
ZIP_ENTRY_MARK = b"PK\x01\x02"
NAME_HEADERS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
ATTRIBUTE_HEADERS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
PLAIN_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
SHOWN_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class ArchiveMember:
    """A file in an archive: its printable name, and its bytes or why it is refused."""

    name: str
    refusal: str = ""
    file: io.BufferedReader | None = None
    """To be read before the next member is requested; None if refused."""


def members(
    file: IO[bytes], suffix: str, name: str, budget: Budget, limits: ReadingConfig
) -> Iterator[ArchiveMember]:
    """Yield the members of an archive in its order, without directories.

    Raises:
        DataError: the archive is damaged or truncated, or has more members than `limits` allow.
    """
    if suffix == ".zip":
        _refuse_many_marks(file, name, limits)
    found = _zip_members(file, name, budget) if suffix == ".zip" else _tar_members(file, name)
    for number, member in enumerate(found):
        if number == limits.max_members:
            raise _too_many(name, limits)
        yield member


def _zip_members(file: IO[bytes], name: str, budget: Budget) -> Iterator[ArchiveMember]:
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise _damaged(name, error) from error
    for info in archive.infolist():
        if info.filename.endswith("/"):  # is_dir() fails on an empty name before Python 3.12
            continue
        shown, kind = _shown(name, info.filename), stat.S_IFMT(info.external_attr >> 16)
        refusal = (
            "encrypted"
            if info.flag_bits & 0x1
            else "no plain file"
            if kind not in (0, stat.S_IFREG)
            else "unknown compression"  # zipfile inflates bz2 and lzma in one block of any size
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            else _refusal(info.filename)
        )
        if refusal:
            yield ArchiveMember(name=shown, refusal=refusal)
            continue
        try:
            inner = archive.open(info)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
            raise _damaged(shown, error) from error
        with inner:
            yield ArchiveMember(name=shown, file=metered(inner, shown, budget))


def _refuse_many_marks(file: IO[bytes], name: str, limits: ReadingConfig) -> None:
    """Raise if the directory may have more entries than allowed: zipfile reads it whole."""
    num_marks, overlap = 0, b""
    while block := file.read(BLOCK_BYTES):
        num_marks += (overlap + block).count(ZIP_ENTRY_MARK)
        overlap = block[1 - len(ZIP_ENTRY_MARK) :]
        if num_marks > limits.max_members:
            raise _too_many(name, limits)
    file.seek(0)


def _tar_members(file: IO[bytes], name: str) -> Iterator[ArchiveMember]:
    """Yield the members, header by header; tarfile would keep all headers in memory."""
    attributes: dict[str, str] = {}  # of the next member, from extended headers
    while (block := _read_exactly(file, tarfile.BLOCKSIZE, name)).strip(b"\0"):
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
            if info.type in NAME_HEADERS + ATTRIBUTE_HEADERS:
                attributes |= _attributes(file, info, name)
                continue
            size_bytes = int(attributes.get("size", info.size))
        except (tarfile.HeaderError, ValueError) as error:
            raise _damaged(name, error) from error
        path = attributes.get("path", info.name)
        is_sparse = any(key.startswith("GNU.sparse") for key in attributes)
        attributes = {}
        if info.isdir():
            continue
        is_plain = info.type in PLAIN_FILES and not is_sparse
        refusal = _refusal(path) if is_plain else "no plain file"
        has_data = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
        window = _Window(file, size_bytes if has_data else 0, name)
        shown = _shown(name, path)
        yield ArchiveMember(
            name=shown, refusal=refusal, file=None if refusal else io.BufferedReader(window)
        )
        window.skip_remainder()
    while block := file.read(BLOCK_BYTES):
        if block.strip(b"\0"):
            raise DataError(f"{name}: data after the end of the archive; unpack it yourself")


def _attributes(file: IO[bytes], info: tarfile.TarInfo, name: str) -> dict[str, str]:
    """Return the attributes in an extended header: long names, `path` and `size`."""
    if not 0 <= info.size <= MAX_HEADER_BYTES:
        raise ValueError(f"a header of {info.size:,} bytes")
    padded_bytes = -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    data = _read_exactly(file, padded_bytes, name)[: info.size]
    if info.type in NAME_HEADERS:
        text = data.rstrip(b"\0").decode(errors="replace")
        return {"path": text} if info.type == tarfile.GNUTYPE_LONGNAME else {}
    found: dict[str, str] = {}
    while data:
        length = int(data.partition(b" ")[0])  # of the record, itself included
        key, equals, value = data[:length].partition(b" ")[2].partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise ValueError("a header that is not `length key=value`")
        found[key.decode(errors="replace")] = value[:-1].decode(errors="replace")
        data = data[length:]
    return {} if info.type == tarfile.XGLTYPE else found


class _Window(io.RawIOBase):
    """The data of one tar member and its padding."""

    def __init__(self, file: IO[bytes], size_bytes: int, name: str) -> None:
        super().__init__()
        if size_bytes < 0:
            raise DataError(f"{name}: a member of {size_bytes} bytes; the archive is damaged")
        self._file = file
        self._name = name
        self._offset_bytes = 0
        self._left_bytes = size_bytes
        self._padding_bytes = -size_bytes % tarfile.BLOCKSIZE

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._offset_bytes

    def readinto(self, buffer: object) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        block = _read_exactly(self._file, min(len(view), self._left_bytes), self._name)
        self._left_bytes -= len(block)
        self._offset_bytes += len(block)
        view[: len(block)] = block
        return len(block)

    def skip_remainder(self) -> None:
        """Move the file to the next header."""
        left_bytes = self._left_bytes + self._padding_bytes
        while left_bytes:
            left_bytes -= len(_read_exactly(self._file, min(left_bytes, BLOCK_BYTES), self._name))


def _read_exactly(file: IO[bytes], num_bytes: int, name: str) -> bytes:
    data = file.read(num_bytes)
    if len(data) < num_bytes:
        raise DataError(f"{name}: the archive is truncated; download it again")
    return data


def _refusal(path: str) -> str:
    """Return why a member of this path is not read, or ""."""
    parts = path.replace("\\", "/").split("/")
    if ".." in parts or parts[0] == "" or PureWindowsPath(path).drive:
        return "name leads out of the archive"
    if parts[-1].startswith("."):
        return "hidden"
    if (found := format_of(path)) is None:
        return "unknown format"
    return "archive in an archive" if found.is_archive else ""


def _shown(archive: str, path: str) -> str:
    printable = "".join(letter if letter.isprintable() else "?" for letter in path)
    return f"{archive}/{printable[:SHOWN_CHARACTERS]}"


def _too_many(name: str, limits: ReadingConfig) -> DataError:
    return DataError(
        f"{name}: more than {limits.max_members:,} members; if that is intended, raise"
        " clean.reading.max_members"
    )


def _damaged(name: str, error: Exception) -> DataError:
    return DataError(
        f"{name}: the archive is damaged ({error or type(error).__name__}); download it again"
    )
