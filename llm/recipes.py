"""Recipes: find, read and resolve YAML files of settings, one perhaps a variant of another."""

import os
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from llm import presets
from llm.config import ModelConfig, RunConfig, read_section
from llm.consistency import find_problems
from llm.depth import DepthContext, Tree, expand_depth, section, take_depth
from llm.errors import ConfigError
from llm.models import MODELS
from llm.settings import build, did_you_mean
from llm.tokenizer.kinds import TOKENIZER_KINDS

CONFIG_FOLDERS = (Path(__file__).parents[1] / "configs", Path(__file__).parent / "configs")
EXTENDS = "extends"
OWN_KEYS = ("name", "description")
"""A variant does not take these over."""


def find_recipe(recipe: str | Path) -> Path:
    """Return the file of a recipe given by name or by path.

    Raises:
        ConfigError: there is no such recipe.
    """
    text = str(recipe)
    if text.endswith((".yaml", ".yml")) or os.sep in text:
        if Path(text).is_file():
            return Path(text)
        raise ConfigError(f"{text}: no such recipe file")
    for folder in CONFIG_FOLDERS:
        if (folder / f"{text}.yaml").is_file():
            return folder / f"{text}.yaml"
    names = recipe_names()
    raise ConfigError(
        f"{text}: unknown recipe{did_you_mean(text, names)}; known: {', '.join(names)}"
    )


def recipe_names() -> list[str]:
    """Return the names of the recipes in configs/, sorted."""
    return sorted({path.stem for folder in CONFIG_FOLDERS for path in folder.glob("*.yaml")})


def read_recipe(path: Path, variants: tuple[Path, ...] = ()) -> Tree:
    """Read a recipe as nested mappings, laid over the recipe that it `extends`, if any.

    A variant's sections are merged with those of the recipe it extends, key by key; any other
    value, a list too, replaces the one there. `variants` are the files that extend this one.

    Raises:
        ConfigError: not YAML, not a mapping, or a recipe that extends none or itself.
    """
    tree = _read_yaml(path)
    if EXTENDS not in tree:
        return tree
    name, chain = tree.pop(EXTENDS), (*variants, path.resolve())
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{path}: {EXTENDS}: found {name!r}, expected the name of a recipe")
    # a file named in a recipe is beside it, wherever the command runs
    extended = find_recipe(path.parent / name if name.endswith((".yaml", ".yml")) else name)
    if extended.resolve() in chain:
        listed = " extends ".join(file.name for file in (*chain, extended))
        raise ConfigError(f"{path}: {EXTENDS}: a recipe extends itself: {listed}")
    below = read_recipe(extended, chain)
    for key in OWN_KEYS:
        below.pop(key, None)
    presets.clear_overridden(below, _shape_overrides(tree))
    return merge(below, tree)


def _read_yaml(path: Path) -> Tree:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a number of 5,000 digits
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: expected `section: {{key: value}}`, found {type(tree).__name__}"
        )
    return typing.cast(Tree, tree)


def _shape_overrides(tree: Tree) -> list[str]:
    """Return the preset and the depth that a variant sets, as overrides."""
    pretrain = section(tree, "pretrain")
    values = {
        "pretrain.depth": pretrain.get("depth"),
        "pretrain.model.preset": section(pretrain, "model").get("preset"),
    }
    return [f"{key}={value}" for key, value in values.items() if value is not None]


def merge(below: Mapping[str, object], above: Mapping[str, object]) -> Tree:
    """Return nested mappings in which `above` replaces what it sets."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = merge(typing.cast(Tree, old), typing.cast(Tree, value))
        merged[key] = value
    return merged


def load_config(recipe: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Resolve a recipe (a name in configs/, or a YAML file) and `section.key=value` overrides.

    Raises:
        ConfigError: lists every problem with its dotted key and the allowed values.
    """
    path = find_recipe(recipe)
    tree = read_recipe(path)
    problems: list[str] = []
    tree.setdefault("name", path.stem)
    presets.clear_overridden(tree, overrides)
    for override in overrides:
        _apply_override(tree, override, problems)
    _share_settings(tree)
    depth = take_depth(tree, problems)
    presets.expand_preset(tree, problems)
    config = build(RunConfig, tree, "", problems)
    if config is not None and depth:
        expand_depth(tree, depth, _depth_context(typing.cast(RunConfig, config)))
        config = build(RunConfig, tree, "", problems)
    if config is not None:
        problems += find_problems(typing.cast(RunConfig, config))
    if problems or config is None:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(f"{path.name}: {len(problems)} problem(s) in the settings\n{listed}")
    return typing.cast(RunConfig, config)


def load_preset(name: str) -> tuple[ModelConfig, int, int]:
    """Return a published model's config, vocabulary size and context length.

    Raises:
        ConfigError: there is no such preset.
    """
    tree: dict[str, object] = {"pretrain": {"model": {"preset": name}}}
    problems: list[str] = []
    presets.expand_preset(tree, problems)
    if problems:
        raise ConfigError("; ".join(problems))
    preset = presets.PRESETS[name]
    return read_section(ModelConfig, preset.model), preset.vocab_size, preset.seq_len


def _apply_override(tree: dict[str, object], override: str, problems: list[str]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        problems.append(f"{override}: expected section.key=value")
        return
    try:
        value: object = yaml.safe_load(text) if text.strip() else ""
    except yaml.YAMLError:
        value = text
    *parents, last = key.strip().split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if isinstance(child, list):  # `sources.0.weight` overrides one item
            child = {str(index): item for index, item in enumerate(child)}
            node[parent] = child
        if not isinstance(child, dict):
            problems.append(f"{key}: {parent} is a value, not a section")
            return
        node = typing.cast(dict[str, object], child)
    node[last] = value


def _share_settings(tree: dict[str, object]) -> None:
    """Give each of several trainings of a stage the settings beside them."""
    for settings in (section(tree, stage) for stage in MODELS):
        if "stages" not in settings:
            continue
        shared = dict(settings)
        stages = shared.pop("stages")
        if isinstance(stages, Mapping):  # overridden: {"0": ..., "1": ...}
            stages = list(typing.cast(Mapping[str, object], stages).values())
        if isinstance(stages, list):
            settings["stages"] = [
                merge(shared, own) if isinstance(own, Mapping) else own for own in stages
            ]


def _depth_context(config: RunConfig) -> DepthContext:
    """Return the settings that the depth dial depends on."""
    model, tokenizer = config.pretrain.model, config.train_tokenizer
    return DepthContext(
        is_gated=model.mlp in ("swiglu", "geglu"),
        tie_embeddings=model.tie_embeddings,
        vocab_size=TOKENIZER_KINDS[tokenizer.kind].fixed_vocab_size or tokenizer.vocab_size,
        tokens_per_step=config.pretrain.global_batch_size * config.pack.seq_len,
    )
