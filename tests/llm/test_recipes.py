"""Recipes: found by name or path, read from YAML, and laid over the recipe that they extend."""

from pathlib import Path

import pytest

from llm.config import flatten
from llm.errors import ConfigError
from llm.recipes import load_config, recipe_names

BELOW = """
name: another
description: All of it.
download: {corpus: {sources: [{kind: stdlib}, {kind: stdlib}]}}
pack: {seq_len: 64}
pretrain: {num_steps: 9, warmup_steps: 1, model: {num_layers: 3, d_model: 64}}
"""


def test_all_recipes_are_found() -> None:
    assert set(recipe_names()) >= {"quickstart", "shakespeare", "tinystories", "gpt2-124m"}


def test_unknown_recipe_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match="did you mean quickstart") as caught:
        load_config("quickstrat")
    assert "shakespeare" in str(caught.value)


def test_recipe_that_is_no_yaml_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml: not valid YAML"):
        load_config(tmp_path / "bad.yaml")


def test_variant_has_all_settings_of_the_recipe_it_extends_but_its_own(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text(BELOW)
    (tmp_path / "above.yaml").write_text("extends: below.yaml\n")
    text = "extends: above.yaml\nseed: 5\npretrain: {num_steps: 7, model: {d_model: 128}}\n"
    (tmp_path / "top.yaml").write_text(text)
    below, top = flatten(load_config(tmp_path / "below.yaml")), load_config(tmp_path / "top.yaml")
    differing = {"name", "description", "seed", "pretrain.num_steps", "pretrain.model.d_model"}
    assert {key for key, value in flatten(top).items() if below[key] != value} == differing
    assert (top.name, top.description, top.seed) == ("top", "", 5)
    assert (top.pretrain.num_steps, top.pretrain.model.d_model) == (7, 128)
    assert load_config(tmp_path / "top.yaml", ["pretrain.num_steps=5"]).pretrain.num_steps == 5


def test_list_of_a_variant_replaces_the_whole_list(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text(BELOW)
    text = "extends: below.yaml\ndownload: {corpus: {sources: [{kind: stdlib, weight: 2.0}]}}\n"
    (tmp_path / "top.yaml").write_text(text)
    assert [s.weight for s in load_config(tmp_path / "top.yaml").download.corpus.sources] == [2.0]


@pytest.mark.parametrize(
    ("shape", "num_layers"), [("{depth: 5}", 5), ("{model: {preset: gpt2-124m}}", 12)]
)
def test_depth_or_preset_of_a_variant_replaces_the_shape(
    tmp_path: Path, shape: str, num_layers: int
) -> None:
    (tmp_path / "below.yaml").write_text(BELOW)
    (tmp_path / "top.yaml").write_text(f"extends: below.yaml\npretrain: {shape}\n")
    model = load_config(tmp_path / "top.yaml").pretrain.model
    assert (model.num_layers, model.d_model > 64) == (num_layers, True)


@pytest.mark.parametrize(
    ("extends", "expected"),
    [
        ("quickstrat", "quickstrat: unknown recipe, did you mean quickstart?"),
        ("missing.yaml", r"missing\.yaml: no such recipe file"),
        ("[quickstart]", r"extends: found \['quickstart'\], expected the name of a recipe"),
        ("", "extends: found None, expected the name of a recipe"),
        ("above.yaml", r"a recipe extends itself: top\.yaml extends above\.yaml extends top\.yaml"),
    ],
)
def test_recipe_that_extends_none_or_itself_is_refused(
    tmp_path: Path, extends: str, expected: str
) -> None:
    (tmp_path / "above.yaml").write_text("extends: top.yaml\n")
    (tmp_path / "top.yaml").write_text(f"extends: {extends}\n")
    with pytest.raises(ConfigError, match=expected):
        load_config(tmp_path / "top.yaml")
