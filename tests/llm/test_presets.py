"""Presets are the published models; short forms resolve to plain settings and leave no trace."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from llm.config import PretrainConfig, RunConfig, load_config, load_preset
from llm.errors import ConfigError
from llm.model.loss import token_losses
from llm.model.transformer import Transformer
from llm.presets import PRESETS
from llm.training.optimizers import make_optimizer
from tests.llm.toy_presets import toy_shape

LLAMA = {"num_layers": 16, "d_model": 2048, "rope_factor": 32.0, "mlp": "swiglu"}


def resolve(folder: Path, recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    path = folder / "mine.yaml"
    path.write_text(recipe)
    return load_config(path, overrides)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_exactly_the_parameters_of_the_published_model(name: str) -> None:
    config, vocab_size, seq_len = load_preset(name)
    with torch.device("meta"):
        model = Transformer(config, vocab_size, seq_len)
    assert model.num_parameters() == PRESETS[name].num_parameters


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_preset_trains_at_toy_size(name: str, optimizer: str) -> None:
    model = Transformer(toy_shape(name), 100, 16)
    model.initialize(torch.Generator().manual_seed(1))
    # 3e-3 and 0.01: both far below where these diverge
    settings = PretrainConfig(optimizer=optimizer, learning_rate=3e-3, muon_learning_rate=0.01)
    stepper = make_optimizer(model, settings)
    rows = torch.randint(0, 100, (4, 17), generator=torch.Generator().manual_seed(2))
    losses: list[float] = []
    for _ in range(20):
        loss = token_losses(model(rows[:, :-1]), rows[:, 1:]).mean()
        losses.append(loss.item())
        stepper.zero_grad()
        loss.backward()
        stepper.step()
    assert losses[0] == pytest.approx(4.6, abs=0.5)  # ln 100
    assert losses[-1] < losses[0] - 0.3
    assert all(later < earlier + 0.05 for earlier, later in itertools.pairwise(losses))


def test_a_preset_becomes_its_settings_and_leaves_no_trace(tmp_path: Path) -> None:
    found = resolve(tmp_path, "pretrain: {model: {preset: llama3.2-1b}}")
    written_out = {**PRESETS["llama3.2-1b"].model}
    expected = resolve(tmp_path, f"pretrain: {{model: {written_out}}}".replace("True", "true"))
    assert found == expected  # so equal cache keys
    model = asdict(found.pretrain.model)
    assert {key: model[key] for key in LLAMA} == LLAMA
    assert found.pretrain.model == load_preset("llama3.2-1b")[0]


def test_settings_beside_a_preset_win(tmp_path: Path) -> None:
    recipe = "pretrain: {model: {num_layers: 2, preset: gpt2-124m, dropout: 0.1}}"
    model = resolve(tmp_path, recipe).pretrain.model
    assert (model.num_layers, model.dropout, model.d_model) == (2, 0.1, 768)
    model = resolve(tmp_path, recipe, ["pretrain.model.d_model=96"]).pretrain.model
    assert (model.num_layers, model.d_model, model.num_heads) == (2, 96, 12)


def test_a_preset_on_the_command_line_replaces_the_recipes_model(tmp_path: Path) -> None:
    recipe = "pretrain: {depth: 3, model: {num_layers: 2, mlp: relu2, dropout: 0.1}}"
    overrides = ["pretrain.model.preset=llama3.2-1b", "pretrain.model.d_ff=64"]
    model = resolve(tmp_path, recipe, overrides).pretrain.model
    assert {**asdict(model), "d_ff": 8192} == asdict(load_preset("llama3.2-1b")[0])
    assert model.d_ff == 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("model: {preset: gpt2-124}", r"pretrain.model.preset: found 'gpt2-124', allowed: .*"),
        ("model: {preset: gpt2-124}", "did you mean gpt2-124m?"),
        ("model: {preset: 3}", "pretrain.model.preset: found '3', allowed: gpt2-124m"),
        ("depth: -1", r"pretrain.depth: found -1, expected a whole number from 0 \(off\) to 64"),
        ("depth: deep", "pretrain.depth: found 'deep', expected a whole number"),
        ("depth: true", "pretrain.depth: found True, expected a whole number"),
        ("depth: 2, model: {preset: gemma-2b}", "pretrain.depth: found 2 beside pretrain.model.pr"),
        ("depth: 2, model: {d_model: wide}", "pretrain.model.d_model: found 'wide', expected a"),
        ("depth: 2, model: {d_model: 100, num_heads: 3}", "d_model: found 100, expected a mult"),
    ],
)
def test_what_is_no_short_form_is_named(tmp_path: Path, settings: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(tmp_path, f"pretrain: {{{settings}}}")


def test_an_unknown_preset_is_refused_when_loaded_directly() -> None:
    with pytest.raises(ConfigError, match="found 'gpt5', allowed: gpt2-124m"):
        load_preset("gpt5")


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 12, 20])
@pytest.mark.parametrize("shape", ["", "mlp: relu2, tie_embeddings: false"])
def test_the_dial_gives_twenty_tokens_a_parameter(tmp_path: Path, depth: int, shape: str) -> None:
    recipe = f"pretrain: {{depth: {depth}, model: {{{shape}}}}}"
    found = resolve(tmp_path, recipe)
    pretrain = found.pretrain
    with torch.device("meta"):
        model = Transformer(pretrain.model, found.train_tokenizer.vocab_size, found.pack.seq_len)
    num_tokens = pretrain.num_steps * pretrain.global_batch_size * found.pack.seq_len
    # vectors are not counted, and the last step is rounded up
    assert num_tokens / model.num_parameters() == pytest.approx(20, rel=0.005)
    assert pretrain.model.num_layers == depth and pretrain.model.d_model == 64 * depth
    assert pretrain.optimizer == "muon"


def test_the_dial_lowers_the_learning_rate_as_the_width_grows(tmp_path: Path) -> None:
    def rates(settings: str) -> tuple[float, float]:
        pretrain = resolve(tmp_path, f"pretrain: {{{settings}}}").pretrain
        return pretrain.learning_rate, pretrain.muon_learning_rate

    assert rates("depth: 4") == (3e-3, 0.02)
    assert rates("depth: 16") == (1.5e-3, 0.02)  # width 4 times as large: half
    assert rates("depth: 4, optimizer: adamw") == (1e-3, 0.02)
    assert rates("depth: 16, optimizer: adamw") == (2.5e-4, 0.02)  # by muP: a quarter
    assert rates("depth: 16, learning_rate: 1.0e-2, muon_learning_rate: 0.1") == (1e-2, 0.1)


def test_what_is_given_beside_the_dial_wins_and_the_rest_follows_from_it(tmp_path: Path) -> None:
    pretrain = resolve(
        tmp_path, "pretrain: {depth: 8, num_steps: 100, model: {d_model: 256, mlp: gelu}}"
    ).pretrain
    model = pretrain.model
    assert (pretrain.num_steps, pretrain.warmup_steps, pretrain.learning_rate) == (100, 2, 3e-3)
    assert (model.num_layers, model.d_model, model.num_heads, model.d_ff) == (8, 256, 4, 1024)


def test_the_dial_on_the_command_line_replaces_what_it_sets_and_other_overrides_win(
    tmp_path: Path,
) -> None:
    recipe = "pretrain: {num_steps: 7, warmup_steps: 1, model: {num_layers: 2, has_qk_norm: true}}"
    found = resolve(tmp_path, recipe, ["pretrain.model.num_heads=2", "pretrain.depth=4"]).pretrain
    assert (found.model.num_layers, found.model.num_heads) == (4, 2)
    assert found.model.has_qk_norm, "what the dial does not set stays"
    assert found.num_steps > 7


def test_off_is_as_if_the_dial_were_not_there(tmp_path: Path) -> None:
    recipe = "pretrain: {depth: 0, num_steps: 700, model: {num_layers: 3}}"
    plain = recipe.replace("depth: 0, ", "")
    assert resolve(tmp_path, recipe) == resolve(tmp_path, plain)
    assert resolve(tmp_path, plain, ["pretrain.depth=0"]) == resolve(tmp_path, plain)


def test_the_same_model_written_in_two_ways_is_one(tmp_path: Path) -> None:
    short = resolve(tmp_path, "pretrain: {depth: 4}").pretrain
    plain: dict[str, Any] = asdict(short)
    plain["model"] = "{" + ", ".join(f"{k}: {v}" for k, v in plain["model"].items()) + "}"
    long = "pretrain: {" + ", ".join(f"{k}: {v}" for k, v in plain.items()) + "}"
    assert resolve(tmp_path, long).pretrain == short
