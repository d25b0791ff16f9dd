"""Failpoints: named moments at which a test has a process fail, as machines do.

    FROMSCRATCH_FAILPOINTS=checkpoint.renamed=kill,file.write:3=torn

kills the process when it first reaches `checkpoint.renamed`, and loses half of what is written when
`file.write` is reached for the third time; `training.loss:5@1=nan` is for rank 1 alone. Each
happens once. Without the variable a failpoint returns what it was given and does nothing else.

| Action | What happens |
|---|---|
| kill | SIGKILL to this process |
| raise:ENOSPC | an OSError with that errno, here of a full disk |
| torn | of the bytes to be written the second half is lost, and nothing says so |
| nan, inf | the number becomes that |
"""

import errno
import os
import signal
from collections import Counter
from dataclasses import dataclass
from typing import Any, TypeVar

VARIABLE = "FROMSCRATCH_FAILPOINTS"
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class _Plan:
    """What happens when a failpoint is reached for the `count`-th time."""

    name: str
    count: int
    action: str


def arm(text: str) -> None:
    """Plan what the variable says, in place of what was planned, and count from 0 again.

    Raises:
        ValueError: the text is no list of `name[:count][@rank]=action`.
    """
    _reached.clear()
    _plans[:] = [plan for part in text.split(",") if part and (plan := _parse(part))]


def reached() -> dict[str, int]:
    """Return how often each failpoint was reached since something was planned."""
    return dict(_reached)


def failpoint(name: str, value: Value = None) -> Value:
    """Fail here if that is planned; else return `value`, what the failing would change."""
    if not _plans:
        return value
    _reached[name] += 1
    for plan in _plans:
        if (plan.name, plan.count) == (name, _reached[name]):
            return _act(plan.action, value)
    return value


def _act(action: str, value: Any) -> Any:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action.startswith("raise:"):
        number = getattr(errno, action.removeprefix("raise:"))
        raise OSError(number, os.strerror(number))
    return value[: len(value) // 2] if action == "torn" else value * float(action)


def _parse(part: str) -> _Plan | None:
    """Return the plan, or None when it is for another rank."""
    place, equals, action = part.partition("=")
    place, _, rank = place.partition("@")
    name, _, count = place.partition(":")
    is_known = action in ("kill", "torn", "nan", "inf") or (
        action.startswith("raise:") and hasattr(errno, action.removeprefix("raise:"))
    )
    if not equals or not is_known:
        raise ValueError(
            f"{VARIABLE}: found {part!r}, expected name[:count][@rank]=action with an action of"
            " kill, raise:ENOSPC, torn, nan or inf"
        )
    is_here = not rank or rank == os.environ.get("RANK", "0")
    return _Plan(name, int(count or 1), action) if is_here else None


_plans: list[_Plan] = []
_reached: Counter[str] = Counter()
arm(os.environ.get(VARIABLE, ""))
