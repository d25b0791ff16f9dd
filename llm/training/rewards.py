"""Verifiable rewards: functions that judge an answer by rules, without a model.

A recipe names them, `rewards: [exact_match, "0.1*format", "regex:\\d+", my_module:my_function]`,
and the reward of an answer is their weighted sum. No heavy imports: names are checked before the
first stage runs.
"""

import ast
import hashlib
import importlib
import importlib.util
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import cast

from llm.errors import ConfigError, StageError

WEIGHTED = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\*(.+)", re.DOTALL)
FUNCTION = re.compile(r"(?!regex:)([A-Za-z_][\w.]*):([A-Za-z_]\w*)")
NOT_IN_METRIC_NAMES = re.compile(r"[^\w\-]+")  # some of these are invalid in MLflow
# a minus after a digit or a letter is a dash: the last number of "3-5" is 5
NUMBER = re.compile(
    r"(?:(?<!\w)[-+])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3})?"
)
REGEX_PREFIX = "regex:"


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a reward function judges."""

    prompt: str
    """The texts of the messages before the answer."""
    text: str
    """Without control tokens."""
    reference: str
    """The answer that the data holds."""
    has_ended: bool
    """Whether the model ended it, before the limit on its length did."""


RewardFunction = Callable[[Answer], float]


def exact_match(answer: Answer) -> float:
    """Return 1 for the reference, ignoring white space at the ends, as the report compares."""
    return float(answer.text.strip() == answer.reference.strip())


def number(answer: Answer) -> float:
    """Return 1 if the last numbers of answer and reference are equal: 1,000.0 equals 1000."""
    found, expected = last_number(answer.text), last_number(answer.reference)
    return float(found is not None and found == expected)


def is_json(answer: Answer) -> float:
    """Return 1 for valid JSON, without the NaN and Infinity that Python adds to it."""
    try:
        json.loads(answer.text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


def is_well_formed(answer: Answer) -> float:
    """Return 1 for an answer that is not empty and that the model ended within the limit."""
    return float(answer.has_ended and bool(answer.text.strip()))


REWARDS: dict[str, RewardFunction] = {
    "exact_match": exact_match,
    "number": number,
    "json": is_json,
    "format": is_well_formed,
}
"""By name. Beside them: regex:PATTERN, and MODULE:FUNCTION of the user's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reward:
    """One of the reward functions of a recipe."""

    name: str
    """In metrics: `reward/<name>`."""
    weight: float
    judge: RewardFunction


def last_number(text: str) -> Decimal | None:
    """Return the last number in a text, None without one."""
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def reward_problems(rewards: Sequence[str], prefix: str) -> list[str]:
    """Return what is wrong with the setting `prefix`; runs nothing of the user's modules."""
    if not rewards:
        return [f"{prefix}: empty, expected reward functions: {_known()}"]
    problems: list[str] = []
    for index, text in enumerate(rewards):
        _, name = _split_weight(text)
        if problem := _problem(name):
            problems.append(f"{prefix}.{index}: found {text!r}, {problem}")
    names = [_split_weight(text)[1] for text in rewards]
    twice = sorted({name for name in names if names.count(name) > 1})
    problems += [
        f"{prefix}: {name} twice; expected once, with a weight: 2*{name}" for name in twice
    ]
    return problems


def load_rewards(rewards: Sequence[str], prefix: str) -> list[Reward]:
    """Return the functions of a recipe; imports the user's modules.

    Raises:
        ConfigError: as `reward_problems`, or a module fails on import.
    """
    if problems := reward_problems(rewards, prefix):
        raise ConfigError("\n".join(problems))
    loaded: list[Reward] = []
    for text in rewards:
        weight, name = _split_weight(text)
        metric = NOT_IN_METRIC_NAMES.sub("_", name).strip("_")
        while any(metric == other.name for other in loaded):  # regex:^a$ and regex:a+ are both a
            metric += "_"
        loaded.append(Reward(name=metric, weight=weight, judge=_load(name, prefix)))
    return loaded


def source_digests(rewards: Sequence[str]) -> dict[str, str]:
    """Return the sha256 of the source of each user's module, which decides a model's bytes.

    Modules that it imports in turn do not count.
    """
    found: dict[str, str] = {}
    for text in rewards:
        if match := FUNCTION.fullmatch(_split_weight(text)[1]):
            path = _module_path(match[1])
            if path is not None:
                found[match[1]] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def judge(rewards: Sequence[Reward], answer: Answer) -> dict[str, float]:
    """Return what each function gives to an answer, without its weight.

    Raises:
        StageError: a function raised, or gave no finite number; with its name, prompt and answer.
    """
    found: dict[str, float] = {}
    for reward in rewards:
        try:
            value = reward.judge(answer)
            problem = None if _is_finite(value) else f"gave {value!r}, expected a finite number"
        except Exception as error:  # the user's code: it may raise anything
            value, problem = 0.0, f"raised {type(error).__name__}: {error}"
        if problem is not None:
            raise StageError(
                f"the reward function {reward.name} {problem}\n  prompt: {answer.prompt!r}\n"
                f"  answer: {answer.text!r}\n  reference: {answer.reference!r}"
            )
        found[reward.name] = float(value)
    return found


def total(rewards: Sequence[Reward], values: Mapping[str, float]) -> float:
    """Return the weighted sum of what the functions gave."""
    return sum(reward.weight * values[reward.name] for reward in rewards)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _split_weight(text: str) -> tuple[float, str]:
    match = WEIGHTED.fullmatch(text)
    return (float(match[1]), match[2]) if match else (1.0, text)


def _known() -> str:
    return f"{', '.join(REWARDS)}, regex:PATTERN, MODULE:FUNCTION; with a weight 2*NAME"


def _problem(name: str) -> str | None:
    """Return why a name without its weight is no reward function."""
    if name in REWARDS:
        return None
    if name.startswith(REGEX_PREFIX):
        try:
            re.compile(name.removeprefix(REGEX_PREFIX))
        except re.error as error:
            return f"which is no regular expression: {error}"
        return None
    match = FUNCTION.fullmatch(name)
    if match is None:
        return f"expected one of {_known()}"
    module, function = match.groups()
    path = _module_path(module)
    if path is None:
        return (
            f"but there is no module {module}: give its folder in PYTHONPATH, or start the run in"
            " that folder"
        )
    if function not in _names_in(path):
        return f"but {path} defines no {function}"
    return None


def _load(name: str, prefix: str) -> RewardFunction:
    if name in REWARDS:
        return REWARDS[name]
    if name.startswith(REGEX_PREFIX):
        pattern = re.compile(name.removeprefix(REGEX_PREFIX))
        return lambda answer: float(pattern.search(answer.text) is not None)
    module, function = name.split(":")
    _look_here_too()
    try:
        found: object = getattr(importlib.import_module(module), function)
    except Exception as error:  # the user's code: it may raise anything
        raise ConfigError(
            f"{prefix}: found {name}, whose module fails on import: {type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise ConfigError(f"{prefix}: found {name}, which is no function but {found!r}")
    # the user's signature: plain texts, so that a function needs nothing of this project
    call = cast(Callable[[str, str, str], float], found)
    return lambda answer: call(answer.prompt, answer.text, answer.reference)


def _module_path(module: str) -> Path | None:
    """Find a module's file without running it; None if there is none."""
    _look_here_too()
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    path = None if spec is None or spec.origin is None else Path(spec.origin)
    return path if path is not None and path.suffix == ".py" else None


def _names_in(path: Path) -> set[str]:
    """Return the names that a module defines or imports at its top level."""
    names: set[str] = set()
    try:
        statements = ast.parse(path.read_bytes()).body
    except (SyntaxError, ValueError):
        return names
    for statement in statements:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            names.add(statement.name)
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in statement.names}
        elif isinstance(statement, ast.Assign):
            names |= {target.id for target in statement.targets if isinstance(target, ast.Name)}
    return names


def _look_here_too() -> None:
    # the stage's process has the working folder in its path (python -m), the command line has not
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
