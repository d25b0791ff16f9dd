"""Read compressed files as streams that end: a bomb, a cut or a damage is an error, never silence.

The standard library's file classes are not used but for gzip: those of bz2 and xz take what follows
the first stream for no data when it is damaged, and none takes a limit of memory.
"""

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from typing import IO, Protocol, cast

from llm.config import ReadingConfig
from llm.errors import DataError

BLOCK_BYTES = 1 << 18
BUFFER_BYTES = 1 << 18
FREE_BYTES = 64 << 20
"""So much may come out of any file, however small: highly repetitive text is no bomb."""
MAX_XZ_MEMORY_BYTES = 256 << 20  # xz -9 needs 65 MiB
MAX_WINDOW_LOG = 27  # 128 MiB, zstd's own limit unless asked for more


class Budget:
    """How many bytes one raw file may still unfold to."""

    def __init__(self, name: str, size_bytes: int, limits: ReadingConfig) -> None:
        by_ratio = max(FREE_BYTES, int(limits.max_ratio * size_bytes))
        self._name = name
        self._size_bytes = size_bytes
        self._max_bytes = min(limits.max_unpacked_bytes, by_ratio)
        self._left_bytes = self._max_bytes

    def take(self, num_bytes: int) -> None:
        """Count what came out.

        Raises:
            DataError: it is more than the limits allow.
        """
        self._left_bytes -= num_bytes
        if self._left_bytes < 0:
            raise DataError(
                f"{self._name}: {self._size_bytes:,} bytes unfold to more than"
                f" {self._max_bytes:,}; if that is what you want, raise clean.reading.max_ratio or"
                " clean.reading.max_unpacked_bytes"
            )


class MeteredFile(io.RawIOBase):
    """A stream whose bytes count against a budget, and whose faults are errors of the data."""

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
        while filled < len(view):  # whole buffers, so that a peek sees the head of the file
            try:
                block = self._inner.read(len(view) - filled)
            except Exception as error:
                if isinstance(error, DataError) or getattr(error, "errno", None):
                    raise
                raise DataError(
                    f"{self._name}: damaged or cut off after {self._offset_bytes + filled:,}"
                    f" unpacked bytes ({error or type(error).__name__}); get it again"
                ) from error
            if not block:
                break
            self._budget.take(len(block))
            view[filled : filled + len(block)] = block
            filled += len(block)
        self._offset_bytes += filled
        return filled


def metered(inner: IO[bytes], name: str, budget: Budget) -> io.BufferedReader:
    """Return `inner` buffered, its bytes counted."""
    return io.BufferedReader(MeteredFile(inner, name, budget), BUFFER_BYTES)


def decompress(file: IO[bytes], compression: str, name: str, budget: Budget) -> io.BufferedReader:
    """Return the bytes that `file` holds compressed in the format of the suffix `compression`.

    Raises:
        DataError: for `.zst`, a package is missing; while reading, damage or more than the budget.
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
    """What bz2, lzma and zstd have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Streams(io.RawIOBase):
    """One compressed stream after another, each of them whole."""

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
                rest = self._decompressor.unused_data.lstrip(self._padding)
                while not rest and (block := self._file.read(BLOCK_BYTES)):
                    rest = block.lstrip(self._padding)
                if not rest:
                    return 0
                self._decompressor = self._make()
                data = self._decompressor.decompress(rest, len(view))
            elif not self._decompressor.needs_input:
                data = self._decompressor.decompress(b"", len(view))
            elif block := self._file.read(BLOCK_BYTES):
                data = self._decompressor.decompress(block, len(view))
            else:
                raise EOFError("the compressed data ends before its end mark")
        view[: len(data)] = data
        return len(data)


def _zstd_decompressor(name: str) -> Decompressor:
    try:
        from backports import zstd  # in Python itself from 3.14 on; absent on a bare node
    except ImportError as error:
        raise DataError(
            f"{name}: to read .zst the package `backports.zstd` is needed; pip install"
            " backports.zstd"
        ) from error
    return zstd.ZstdDecompressor(
        options={zstd.DecompressionParameter.window_log_max: MAX_WINDOW_LOG}
    )
