"""Random-access reads over many files, with an LRU of open descriptors."""

import os
from collections import OrderedDict
from pathlib import Path

from llm.data.closing import Closing

MAX_OPEN_FILES = 128


class OpenFiles(Closing):
    """Files opened on first read; the least recently read ones are closed."""

    def __init__(self) -> None:
        """Start without open files."""
        super().__init__()
        self._stack.callback(self._close_all)
        self._descriptors: OrderedDict[Path, int] = OrderedDict()

    def read(self, path: Path, offset_bytes: int, num_bytes: int) -> bytes:
        """Return `num_bytes` from `offset_bytes` on, fewer at the end of the file."""
        if (descriptor := self._descriptors.get(path)) is None:
            if len(self._descriptors) >= MAX_OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
            descriptor = self._descriptors[path] = os.open(path, os.O_RDONLY)
        else:
            self._descriptors.move_to_end(path)
        return os.pread(descriptor, num_bytes, offset_bytes)

    def _close_all(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])
