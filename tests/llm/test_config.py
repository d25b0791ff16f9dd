"""Settings: defaults < recipe < overrides, resolved once, and every problem said at once."""

import ast
import dataclasses
import itertools
from pathlib import Path

import pytest

from llm import config
from llm.artifact import canonical
from llm.config import RunConfig, flatten, read_section
from llm.errors import ConfigError
from llm.recipes import load_config, recipe_names


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_resolves(recipe: str) -> None:
    assert load_config(recipe).name == recipe


def test_override_beats_recipe_beats_default(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("pack: {seq_len: 64}\npretrain: {num_steps: 9, warmup_steps: 1}\n")
    resolved = load_config(path, ["pretrain.num_steps=11"])
    assert (resolved.name, resolved.pack.seq_len) == ("mine", 64)
    assert (resolved.pretrain.num_steps, resolved.pretrain.warmup_steps) == (11, 1)
    assert resolved.clean.validation_fraction == RunConfig(name="x").clean.validation_fraction


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("pretrain.stpes=3", "pretrain.stpes: unknown, did you mean pretrain.num_steps?"),
        (
            "num_steps=3",
            "did you mean pretrain.num_steps or finetune.num_steps or align.num_steps?",
        ),
        ("pretrain.d_model=8", "did you mean pretrain.model.d_model?"),
        ("pretrian.num_steps=3", "pretrian: unknown, did you mean pretrain?"),
        ("pack.seq_len=abc", "pack.seq_len: found 'abc', expected a whole number"),
        ("pack.seq_len=2.5", "pack.seq_len: found 2.5, expected a whole number"),
        ("pack.seq_len=true", "pack.seq_len: found True, expected a whole number"),
        ("pack.seq_len=4", "pack.seq_len: found 4, expected >= 8"),
        ("pretrain.beta1=1", "pretrain.beta1: found 1.0, expected >= 0 and < 1"),
        ("pretrain.learning_rate=nan", "pretrain.learning_rate"),
        ("pretrain.optimizer=adam", "allowed: adamw, muon, did you mean adamw?"),
        ("pretrain=3", "pretrain: found 3, expected a section with keys"),
        ("seed.x=3", "seed: found"),
        ("nonsense", "nonsense: expected section.key=value"),
        ("evaluate.prompts=5", "evaluate.prompts: found 5, expected a list of strings"),
        ("pretrain.model.num_heads=3", "pretrain.model.d_model: found 256, expected a multiple"),
        ("pretrain.model.num_kv_heads=3", "expected a divisor of pretrain.model.num_heads"),
        ("pretrain.warmup_steps=100000", "expected less than pretrain.num_steps"),
        ("download.corpus.kind=files", "download.corpus.path: empty"),
        ("download.chats.kind=hub", "download.chats.hub_revision: found ''"),
        ("download.chats.url=ftp://x", None),
        ("download.corpus.sources.0.kind=files", "download.corpus.sources.0.path: empty"),
        ("download.corpus.sources.1.kind=files", "expected a list of sections, numbered from 0"),
        ("download.corpus.sources=[{weight: 0}]", "download.corpus.sources.0.weight: found 0.0"),
        ("download.corpus.sources=[3]", "download.corpus.sources.0: found 3, expected a section"),
        ("download.corpus.sources.0.wieght=2", "did you mean download.corpus.sources.0.weight?"),
        ("pack.shares=[{weight: 2}]", "expected weights in download.<role>.sources instead"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(override: str, expected: str | None) -> None:
    if expected is None:  # a url is not looked at while the kind is another
        load_config("quickstart", [override])
        return
    with pytest.raises(ConfigError) as caught:
        load_config("quickstart", [override])
    assert expected in str(caught.value)


def test_one_of_several_sources_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("download: {corpus: {sources: [{kind: stdlib}, {kind: stdlib, weight: 2}]}}")
    overrides = ["download.corpus.sources.1.max_tokens=5", "download.corpus.sources.2.weight=3"]
    resolved = load_config(path, overrides)
    found = [(source.weight, source.max_tokens) for source in resolved.download.corpus.sources]
    assert found == [(1, 0), (2, 5), (3, 0)]
    assert flatten(resolved)["download.corpus.sources.1.weight"] == 2
    assert flatten(canonical(resolved)).keys() == flatten(resolved).keys()
    with pytest.raises(
        ConfigError, match=r"download\.corpus\.url: has no effect next to .*\.sources; move"
    ):
        load_config(path, ["download.corpus.url=http://a"])


def test_all_problems_are_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("quickstart", ["pack.seq_len=1", "pretrain.stpes=3", "clean.x=1"])
    assert "3 problem(s)" in str(caught.value)


def test_scientific_notation_is_a_number() -> None:
    assert load_config("quickstart", ["pretrain.learning_rate=1e-4"]).pretrain.learning_rate == 1e-4


def test_sections_survive_the_job_file() -> None:
    resolved = load_config("gpt2-124m")
    for field in dataclasses.fields(resolved):
        section = getattr(resolved, field.name)
        if dataclasses.is_dataclass(section):
            plain = canonical(section)
            assert isinstance(plain, dict)
            assert read_section(type(section), plain) == section


def test_flatten_gives_dotted_keys_that_are_overrides() -> None:
    leaves = flatten(load_config("quickstart"))
    assert leaves["pretrain.model.norm"] == "rmsnorm"
    assert all(not dataclasses.is_dataclass(value) for value in leaves.values())


def test_every_setting_says_what_it_does() -> None:
    tree = ast.parse(Path(config.__file__).read_bytes())
    sections = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for section in sections:
        if section.name.endswith("Config"):
            for setting, text in itertools.pairwise([*section.body, ast.Pass()]):
                if isinstance(setting, ast.AnnAssign):
                    assert isinstance(text, ast.Expr), ast.unparse(setting)
