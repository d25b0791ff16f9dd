"""What several classes that hold open files have in common."""

from contextlib import ExitStack
from types import TracebackType
from typing import Self


class Closing:
    """Holds files that the end of a `with` closes: enter them into `self._stack`."""

    def __init__(self) -> None:
        """Hold nothing yet."""
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
