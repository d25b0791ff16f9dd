"""Decompress files as bounded streams: a bomb, truncation or damage raises an error.

Of the standard library's file classes only gzip's is used: those of bz2 and xz silently drop
damaged data after the first stream, and none has a memory limit.
"""

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from typing import IO, Protocol, cast

from llm.config import ReadingConfig
from llm.errors import DataError

READ_BYTES = 1 << 18
BUFFER_BYTES = 1 << 18
FREE_BYTES = 64 << 20
"""Always allowed, whatever the ratio: a small file of repetitive text is not a bomb."""
MAX_XZ_MEMORY_BYTES = 256 << 20  # xz -9 needs 65 MiB
MAX_WINDOW_LOG = 27  # 128 MiB, zstd's default limit


class Budget:
    """How many more bytes one raw file may decompress to."""

    def __init__(self, name: str, size_bytes: int, limits: ReadingConfig) -> None:
        by_ratio = max(FREE_BYTES, int(limits.max_ratio * size_bytes))
        self._name = name
        self._size_bytes = size_bytes
        self._max_bytes = min(limits.max_unpacked_bytes, by_ratio)
        self._left_bytes = self._max_bytes

    def take(self, num_bytes: int) -> None:
        """Count decompressed bytes.

        Raises:
            DataError: they exceed the limits.
        """
        self._left_bytes -= num_bytes
        if self._left_bytes < 0:
            raise DataError(
                f"{self._name}: {self._size_bytes:,} bytes decompress to more than"
                f" {self._max_bytes:,}; if that is intended, raise clean.reading.max_ratio or"
                " clean.reading.max_unpacked_bytes"
            )


class MeteredFile(io.RawIOBase):
    """A stream that counts its bytes against a budget and raises DataError for damage."""

    def __init__(self, inner: IO[bytes], name: str, budget: Budget) -> None:
        super().__init__()
        self._inner = inner
        self._name = name
        self._budget = budget
        self._offset_bytes = 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._offset_bytes

    def readinto(self, buffer: object) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        filled = 0
        while filled < len(view):  # fill it, so that `peek` sees the byte order mark
            try:
                block = self._inner.read(len(view) - filled)
            except Exception as error:
                if isinstance(error, DataError) or getattr(error, "errno", None):
                    raise
                raise DataError(
                    f"{self._name}: damaged or truncated after {self._offset_bytes + filled:,}"
                    f" unpacked bytes ({error or type(error).__name__}); download it again"
                ) from error
            if not block:
                break
            self._budget.take(len(block))
            view[filled : filled + len(block)] = block
            filled += len(block)
        self._offset_bytes += filled
        return filled


def metered(inner: IO[bytes], name: str, budget: Budget) -> io.BufferedReader:
    """Return `inner` buffered, with its bytes counted against `budget`."""
    return io.BufferedReader(MeteredFile(inner, name, budget), BUFFER_BYTES)


def decompress(file: IO[bytes], compression: str, name: str, budget: Budget) -> io.BufferedReader:
    """Return a stream of the decompressed bytes of `file`; `compression` is a suffix.

    Raises:
        DataError: for `.zst`, a package is missing; while reading, damage or an exceeded budget.
    """
    if compression == ".gz":
        return metered(cast(IO[bytes], gzip.GzipFile(fileobj=file)), name, budget)
    makers: dict[str, Callable[[], Decompressor]] = {
        ".bz2": bz2.BZ2Decompressor,
        ".xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_XZ_MEMORY_BYTES),
        ".zst": lambda: _zstd_decompressor(name),
    }
    make, padding = makers[compression], b"\0" if compression == ".xz" else b""
    return metered(io.BufferedReader(_Streams(file, make, padding)), name, budget)


class Decompressor(Protocol):
    """The common interface of bz2, lzma and zstd."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Streams(io.RawIOBase):
    """Concatenated compressed streams, each of which must be complete."""

    def __init__(self, file: IO[bytes], make: Callable[[], Decompressor], padding: bytes) -> None:
        super().__init__()
        self._file = file
        self._make = make
        self._padding = padding
        self._decompressor = make()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        data = b""
        while not data:
            if self._decompressor.eof:
                data_left = self._decompressor.unused_data.lstrip(self._padding)
                while not data_left and (block := self._file.read(READ_BYTES)):
                    data_left = block.lstrip(self._padding)
                if not data_left:
                    return 0
                self._decompressor = self._make()
                data = self._decompressor.decompress(data_left, len(view))
            elif not self._decompressor.needs_input:
                data = self._decompressor.decompress(b"", len(view))
            elif block := self._file.read(READ_BYTES):
                data = self._decompressor.decompress(block, len(view))
            else:
                raise EOFError("the compressed data ends before its end mark")
        view[: len(data)] = data
        return len(data)


def _zstd_decompressor(name: str) -> Decompressor:
    try:
        from backports import zstd  # in Python itself from 3.14 on; optional
    except ImportError as error:
        raise DataError(
            f"{name}: to read .zst the package `backports.zstd` is needed; pip install"
            " backports.zstd"
        ) from error
    return zstd.ZstdDecompressor(
        options={zstd.DecompressionParameter.window_log_max: MAX_WINDOW_LOG}
    )
