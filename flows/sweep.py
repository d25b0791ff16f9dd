"""Sweeps: one recipe over a grid of settings, each member an ordinary run with cached stages."""

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from llm.config import RunConfig
from llm.errors import ConfigError, FromscratchError
from llm.models import MODELS, trainings
from llm.recipes import CONFIG_FOLDERS, load_config
from llm.settings import did_you_mean
from tasks.cached import Outcome

BITS_PER_BYTE = "bits/byte"
RunMember = Callable[[RunConfig, "Member", Sequence[str]], Sequence[Outcome]]
COLUMNS = {
    "vocabulary": ("train_tokenizer", "vocab_size"),
    "bytes/token": ("train_tokenizer", "bytes_per_token"),
    "parameters": (next(iter(MODELS)), "num_parameters"),
}
"""Stage and key of its summary for each column; bits per byte of each model follow."""
SWEEP = "sweep"
"""Tag of its runs: `sweep:NAME` in Prefect, `fromscratch.sweep` in MLflow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """A recipe and the overrides of each member."""

    recipe: str
    members: Sequence[Sequence[str]]


@dataclass(kw_only=True, slots=True)
class Member:
    """One member and its result."""

    number: int
    """Counted from 1, in the order of the grid."""
    overrides: Sequence[str]
    """Without those that all members share."""
    status: str = "finished"
    error: str = ""
    seconds: float = 0.0
    metrics: dict[str, float] = dataclasses.field(default_factory=dict[str, float])
    num_validation_bytes: int = 0
    """Size of the text that bits per byte are measured on."""


def sweep_names() -> list[str]:
    """Return the names of the sweeps that come with the project, sorted."""
    return sorted(path.stem for folder in CONFIG_FOLDERS for path in folder.glob("sweeps/*.yaml"))


def load_sweep(name: str, overrides: Sequence[str] = ()) -> Sweep:
    """Read `configs/sweeps/NAME.yaml`, or a YAML file by its path.

    It holds `recipe`, `overrides` for all members, and `grid`: either lists of values by dotted
    key (every combination is a member) or a list of override lists (each is a member).

    Raises:
        ConfigError: unknown sweep, or a file of another form.
    """
    paths = [folder / "sweeps" / f"{name}.yaml" for folder in CONFIG_FOLDERS]
    path = next((path for path in [Path(name), *paths] if path.is_file()), None)
    if path is None:
        known = sweep_names()
        raise ConfigError(
            f"{name}: unknown sweep{did_you_mean(name, known)}; there are {', '.join(known)}"
        )
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: no valid YAML: {error}") from error
    fields = cast(dict[str, Any], tree) if isinstance(tree, dict) else {}
    shared, members = _words(fields.get("overrides", [])), _members(fields.get("grid"))
    if not isinstance(fields.get("recipe"), str) or shared is None or not members:
        raise ConfigError(
            f"{path}: expected `recipe: NAME`, perhaps `overrides: [section.key=value]`, and"
            " `grid:` with {section.key: [value, ...]} or [[section.key=value, ...], ...]"
        )
    unknown = fields.keys() - {"recipe", "description", "overrides", "grid"}
    if unknown:
        raise ConfigError(f"{path}: {', '.join(sorted(unknown))}: unknown")
    return Sweep(
        recipe=fields["recipe"], members=[[*shared, *member, *overrides] for member in members]
    )


def run_sweep(sweep: Sweep, run_member: RunMember, announce: Callable[[str], None]) -> list[Member]:
    """Run every member, one after another; a failed member does not stop the others.

    Raises:
        ConfigError: the settings of some members are wrong; nothing has run.
    """
    configs = _load_all(sweep)
    shared = set.intersection(*map(set, sweep.members)) if len(sweep.members) > 1 else set[str]()
    members: list[Member] = []
    for number, (overrides, config) in enumerate(zip(sweep.members, configs, strict=True), 1):
        differing = [word for word in overrides if word not in shared]
        member = Member(number=number, overrides=differing)
        announce(f"{number} of {len(configs)}: {' '.join(member.overrides)}")
        started_at = time.monotonic()
        try:
            _read_metrics(member, config, run_member(config, member, overrides))
        except FromscratchError as error:
            member.status, member.error = "failed", str(error)
            announce(f"failed: {error}")
        member.seconds = time.monotonic() - started_at
        members.append(member)
    return members


def comparison(members: Sequence[Member]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of a table, best first by the first model's bits per byte.

    A metric that no member has gets no column.
    """
    names = list(dict.fromkeys(name for member in members for name in member.metrics))
    order = next((name for name in names if name.endswith(BITS_PER_BYTE)), "")
    best_first = sorted(members, key=lambda m: m.metrics.get(order, float("inf")))
    rows = [
        [
            short_name(member),
            *(_shown(member.metrics.get(name)) for name in names),
            f"{member.seconds:.0f}" if member.status == "finished" else member.status,
        ]
        for member in best_first
    ]
    return ["member", *names, "seconds"], rows


def short_name(member: Member) -> str:
    """Return its number and its overrides without sections: `4 kind=bpe vocab_size=4096`.

    The number keeps names distinct where a list truncates them, as MLflow does at 20 characters.
    """
    parts = [word.partition("=") for word in member.overrides]
    differing = " ".join(f"{key.rpartition('.')[2]}={value}" for key, _, value in parts)
    return f"{member.number} {differing or 'unchanged'}"


def differing_bytes(members: Sequence[Member]) -> str:
    """Return a warning if bits per byte were measured on texts of different lengths, else ''."""
    counts = {member.num_validation_bytes for member in members if member.num_validation_bytes}
    if len(counts) < 2:
        return ""
    listed = ", ".join(f"{count:,}" for count in sorted(counts))
    return f"bits per byte were measured on different texts ({listed} bytes): compare with care"


def _load_all(sweep: Sweep) -> list[RunConfig]:
    configs: list[RunConfig] = []
    problems: list[str] = []
    for overrides in sweep.members:
        try:
            configs.append(load_config(sweep.recipe, overrides))
        except ConfigError as error:
            problems.append(f"{' '.join(overrides)}:\n{error}")
    if problems:
        raise ConfigError("\n".join(problems))
    return configs


def _read_metrics(member: Member, config: RunConfig, outcomes: Sequence[Outcome]) -> None:
    summaries = {(outcome.stage, outcome.role): outcome.summary for outcome in outcomes}
    models = [training.model_name for training in trainings(config)]
    of_models = {
        f"{name} {BITS_PER_BYTE}": ("evaluate", f"{name}/bits_per_byte") for name in models
    }
    for name, (stage, key) in {**COLUMNS, **of_models}.items():
        value = summaries.get((stage, ""), {}).get(key)
        if isinstance(value, int | float):
            member.metrics[name] = value
    num_bytes = summaries.get(("pack", "corpus"), {}).get("validation_bytes")
    member.num_validation_bytes = num_bytes if isinstance(num_bytes, int) else 0


def _members(grid: object) -> list[list[str]] | None:
    """Return the overrides of each member, or None if `grid` has another form."""
    if isinstance(grid, list):
        words = [_words(member) for member in cast(list[object], grid)]
        return None if None in words else cast(list[list[str]], words)
    if not isinstance(grid, Mapping):
        return None
    values = cast(Mapping[str, object], grid)
    if not all(isinstance(value, list) for value in values.values()):
        return None
    pairs = [
        [f"{key}={_text(value)}" for value in cast(list[object], listed)]
        for key, listed in values.items()
    ]
    return [list(member) for member in itertools.product(*pairs)] if pairs else None


def _words(value: object) -> list[str] | None:
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        return None
    return cast(list[str], value)


def _text(value: object) -> str:
    """Write a value so that it parses as an override: JSON is YAML on one line."""
    return value if isinstance(value, str) else json.dumps(value)


def _shown(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
