"""Read pieces of many files at any place, a few of which are open at a time."""

import os
from collections import OrderedDict
from pathlib import Path
from types import TracebackType

MAX_OPEN_FILES = 128


class OpenFiles:
    """Files that are opened when they are first read; those not read for long are closed."""

    def __init__(self) -> None:
        """Open nothing yet."""
        self._descriptors: OrderedDict[Path, int] = OrderedDict()

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def read(self, path: Path, offset_bytes: int, num_bytes: int) -> bytes:
        """Return `num_bytes` from `offset_bytes` on, fewer where the file ends before."""
        if (descriptor := self._descriptors.get(path)) is None:
            if len(self._descriptors) >= MAX_OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
            descriptor = self._descriptors[path] = os.open(path, os.O_RDONLY)
        else:
            self._descriptors.move_to_end(path)
        return os.pread(descriptor, num_bytes, offset_bytes)
