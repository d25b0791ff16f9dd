"""Recipes: finding and reading YAML files of settings, one perhaps a variant of another."""

import os
import typing
from collections.abc import Mapping
from pathlib import Path

import yaml

from llm import presets
from llm.depth import Tree, section
from llm.errors import ConfigError
from llm.settings import did_you_mean

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
