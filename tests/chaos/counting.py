"""A promise as cases that hold or not: tests run each, benchmarks/promises.py counts them."""

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Case = Callable[[Path], None]
"""Tries one thing in an empty folder of its own; an exception says that the promise is broken."""


@dataclass(kw_only=True)
class Figure:
    """What came of a promise: one line of the table."""

    name: str
    num_tried: int = 0
    failures: list[str] = field(default_factory=list)
    note: str = ""

    def count(self, name: str, attempt: Callable[[], object]) -> None:
        """Try once more."""
        self.num_tried += 1
        try:
            attempt()
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(frame.filename).name}:{frame.lineno}"
            self.failures.append(f"{name}: {type(error).__name__} at {place}: {error}")

    @property
    def num_held(self) -> int:
        """How many attempts held."""
        return self.num_tried - len(self.failures)


def try_all(name: str, cases: Mapping[str, Case], folder: Path) -> Figure:
    """Try every case, whatever became of those before."""
    figure = Figure(name=name)
    for number, (title, case) in enumerate(cases.items()):
        place = folder / str(number)
        place.mkdir(parents=True)
        figure.count(title, lambda case=case, place=place: case(place))
    return figure
