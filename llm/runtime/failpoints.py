"""Failpoints: named points in the code where a test makes a process fail, as machines do.

    FROMSCRATCH_FAILPOINTS=checkpoint.renamed=kill,file.write:3=torn

kills the process when it first reaches `checkpoint.renamed`, and loses half of the bytes of the
third `file.write`; `training.loss:5@1=nan` is for rank 1 only. Each happens once. Without the
variable a failpoint returns its value and does nothing else.

| Action | Effect |
|---|---|
| kill | SIGKILL to this process |
| stop | SIGSTOP to this process, until a SIGCONT |
| raise:ENOSPC | an OSError with that errno, here: disk full |
| torn | the second half of the bytes to be written is silently lost |
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
    """An action at the `count`-th time that a failpoint is reached."""

    name: str
    count: int
    action: str


def arm(text: str) -> None:
    """Plan the actions of `text`, replacing all earlier plans and counts.

    Raises:
        ValueError: the text is not a list of `name[:count][@rank]=action`.
    """
    _reached.clear()
    _plans[:] = [plan for part in text.split(",") if part and (plan := _parse(part))]


def reached() -> dict[str, int]:
    """Return how often each failpoint was reached since `arm`."""
    return dict(_reached)


def failpoint(name: str, value: Value = None) -> Value:
    """Fail here if planned; else return `value`, which a failure may change."""
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
    if action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
        return value
    if action.startswith("raise:"):
        number = getattr(errno, action.removeprefix("raise:"))
        raise OSError(number, os.strerror(number))
    return value[: len(value) // 2] if action == "torn" else value * float(action)


def _parse(part: str) -> _Plan | None:
    """Return the plan, None if it is for another rank."""
    point, equals, action = part.partition("=")
    point, _, rank = point.partition("@")
    name, _, count = point.partition(":")
    is_known = action in ("kill", "stop", "torn", "nan", "inf") or (
        action.startswith("raise:") and hasattr(errno, action.removeprefix("raise:"))
    )
    if not equals or not is_known:
        raise ValueError(
            f"{VARIABLE}: found {part!r}, expected name[:count][@rank]=action with an action of"
            " kill, stop, raise:ENOSPC, torn, nan or inf"
        )
    is_here = not rank or rank == os.environ.get("RANK", "0")
    return _Plan(name, int(count or 1), action) if is_here else None


_plans: list[_Plan] = []
_reached: Counter[str] = Counter()
arm(os.environ.get(VARIABLE, ""))
