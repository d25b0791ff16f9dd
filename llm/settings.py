"""Build typed settings from plain mappings; report all problems at once, by dotted key.

A section is any frozen dataclass; its annotations say which values are allowed (`Positive`,
`Literal[...]`, `Annotated[float, Range(above=0)]`).
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal


@dataclass(frozen=True, slots=True)
class Range:
    """Bounds of a number: minimum and maximum inclusive, above and below exclusive."""

    minimum: float = -math.inf
    maximum: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, number: float) -> bool:
        return self.minimum <= number <= self.maximum and self.above < number < self.below

    def __str__(self) -> str:
        parts = [f">= {self.minimum:g}"] if self.minimum > -math.inf else []
        parts += [f"> {self.above:g}"] if self.above > -math.inf else []
        parts += [f"<= {self.maximum:g}"] if self.maximum < math.inf else []
        parts += [f"< {self.below:g}"] if self.below < math.inf else []
        return " and ".join(parts)


@dataclass(frozen=True, slots=True, eq=False)
class OneOf:
    """One of the names in a table; names added to the table later are allowed too."""

    table: Mapping[str, object]


Count = Annotated[int, Range(minimum=0)]
Positive = Annotated[int, Range(minimum=1)]
Fraction = Annotated[float, Range(minimum=0, maximum=1)]
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(minimum=0)]


def build(cls: type, tree: Mapping[str, object], prefix: str, problems: list[str]) -> object | None:
    """Build the dataclass `cls` from a mapping; on problems, add them and return None."""
    hints = typing.get_type_hints(cls, include_extras=True)
    known = {f.name: f for f in dataclasses.fields(cls)}
    values: dict[str, object] = {}
    before = len(problems)
    for name, value in tree.items():
        dotted = f"{prefix}{name}"
        if name not in known:
            meant = _did_you_mean_deeper(cls, str(name), prefix) or did_you_mean(
                str(name), list(known), prefix
            )
            problems.append(f"{dotted}: unknown{meant or '; known here: ' + ', '.join(known)}")
            continue
        values[name] = _check(hints[name], value, dotted, problems)
    required = [f.name for f in known.values() if f.default is f.default_factory]
    problems += [f"{prefix}{name}: missing" for name in required if name not in tree]
    return cls(**values) if len(problems) == before else None


def _check(hint: object, value: object, dotted: str, problems: list[str]) -> object:
    """Return `value` converted to the type `hint`, or add a problem."""
    bounds: Range | OneOf | None = None
    if typing.get_origin(hint) is Annotated:
        hint, bounds = typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            problems.append(f"{dotted}: found {value!r}, expected a section with keys")
            return None
        return build(
            typing.cast(type, hint),
            typing.cast(Mapping[str, object], value),
            f"{dotted}.",
            problems,
        )
    if typing.get_origin(hint) is Literal or isinstance(bounds, OneOf):
        allowed = list(bounds.table) if isinstance(bounds, OneOf) else typing.get_args(hint)
        if value not in allowed:
            meant = did_you_mean(str(value), [str(choice) for choice in allowed])
            problems.append(
                f"{dotted}: found {value!r}, allowed: {', '.join(map(str, allowed))}{meant}"
            )
        return value
    if typing.get_origin(hint) is tuple:
        return _check_list(typing.get_args(hint)[0], value, dotted, problems)
    value = _coerce(hint, value)
    if not isinstance(value, typing.cast(type, hint)) or (
        hint is not bool and isinstance(value, bool)
    ):
        kind = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[
            typing.cast(type, hint)
        ]
        limits = f" {bounds}" if bounds else ""
        problems.append(f"{dotted}: found {value!r}, expected {kind}{limits}")
    elif isinstance(value, float) and not math.isfinite(value):
        problems.append(f"{dotted}: found {value}, expected a finite number")
    elif bounds is not None and typing.cast(float, value) not in bounds:
        problems.append(f"{dotted}: found {value}, expected {bounds}")
    return value


def _check_list(hint: object, value: object, dotted: str, problems: list[str]) -> object:
    """Return a list, or a mapping `{"0": ..., "1": ...}`, as a tuple of sections or strings."""
    if isinstance(value, Mapping):
        items = typing.cast(Mapping[str, object], value)
        if list(items) == [str(index) for index in range(len(items))]:
            value = list(items.values())
    is_section = dataclasses.is_dataclass(hint)
    if not isinstance(value, list | tuple) or not all(
        is_section or isinstance(item, str) for item in typing.cast(Sequence[object], value)
    ):
        kind = "sections, numbered from 0" if is_section else "strings"
        problems.append(f"{dotted}: found {value!r}, expected a list of {kind}")
        return None
    listed = enumerate(typing.cast(Sequence[object], value))
    if is_section:
        return tuple(_check(hint, item, f"{dotted}.{index}", problems) for index, item in listed)
    return tuple(item for _, item in listed)


def _coerce(hint: object, value: object) -> object:
    """Convert what YAML reads as another type: `1e-3` is text in YAML 1.1, and 1 is an int."""
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value


def _did_you_mean_deeper(cls: type, name: str, prefix: str) -> str:
    """Suggest settings of this name in the sections below `cls`."""
    found = [f"{prefix}{dotted}" for dotted in _settings(cls) if dotted.endswith(f".{name}")]
    return f", did you mean {' or '.join(found)}?" if found else ""


def _settings(cls: type) -> Iterator[str]:
    """Yield the dotted key of every setting of `cls` and its sections."""
    hints = typing.get_type_hints(cls)
    for known in dataclasses.fields(cls):
        yield known.name
        if dataclasses.is_dataclass(hints[known.name]):
            deeper = typing.cast(type, hints[known.name])
            yield from (f"{known.name}.{dotted}" for dotted in _settings(deeper))


def did_you_mean(word: str, known: Sequence[str], prefix: str = "") -> str:
    """Return a suggestion of the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f", did you mean {prefix}{close[0]}?" if close else ""
