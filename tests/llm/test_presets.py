"""Presets have the parameters of the published models and resolve to plain settings."""

import itertools
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from llm.config import PretrainConfig
from llm.errors import ConfigError
from llm.model.loss import token_losses
from llm.model.transformer import Transformer
from llm.presets import PRESETS
from llm.recipes import load_preset
from llm.training.optimizers import make_optimizer
from tests.llm.toy_presets import resolve, toy_shape

LLAMA = {"num_layers": 16, "d_model": 2048, "rope_factor": 32.0, "mlp": "swiglu"}


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


def test_a_preset_resolves_to_its_settings(tmp_path: Path) -> None:
    found = resolve(tmp_path, "pretrain: {model: {preset: llama3.2-1b}}")
    written_out = {**PRESETS["llama3.2-1b"].model}
    expected = resolve(tmp_path, f"pretrain: {{model: {written_out}}}".replace("True", "true"))
    assert found == expected  # so equal cache keys
    model = asdict(found.pretrain.model)
    assert {key: model[key] for key in LLAMA} == LLAMA
    assert found.pretrain.model == load_preset("llama3.2-1b")[0]


def test_settings_beside_a_preset_override_it(tmp_path: Path) -> None:
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
def test_a_wrong_preset_or_depth_is_reported(tmp_path: Path, settings: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(tmp_path, f"pretrain: {{{settings}}}")


def test_an_unknown_preset_is_refused_when_loaded_directly() -> None:
    with pytest.raises(ConfigError, match="found 'gpt5', allowed: gpt2-124m"):
        load_preset("gpt5")
