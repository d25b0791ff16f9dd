"""A base class for objects that hold open files."""

from contextlib import ExitStack
from types import TracebackType
from typing import Self


class Closing:
    """A context manager that closes the files entered into `self._stack`."""

    def __init__(self) -> None:
        """Start without open files."""
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)
