"""The depth dial derives a model and its training from one number."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from llm.model.transformer import Transformer
from tests.llm.toy_presets import resolve


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 12, 20])
@pytest.mark.parametrize("shape", ["", "mlp: relu2, tie_embeddings: false"])
def test_the_dial_gives_twenty_tokens_per_parameter(tmp_path: Path, depth: int, shape: str) -> None:
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


def test_settings_beside_the_dial_override_it_and_the_rest_follows_from_them(
    tmp_path: Path,
) -> None:
    pretrain = resolve(
        tmp_path, "pretrain: {depth: 8, num_steps: 100, model: {d_model: 256, mlp: gelu}}"
    ).pretrain
    model = pretrain.model
    assert (pretrain.num_steps, pretrain.warmup_steps, pretrain.learning_rate) == (100, 2, 3e-3)
    assert (model.num_layers, model.d_model, model.num_heads, model.d_ff) == (8, 256, 4, 1024)


def test_the_dial_on_the_command_line_replaces_its_settings_and_other_overrides_win(
    tmp_path: Path,
) -> None:
    recipe = "pretrain: {num_steps: 7, warmup_steps: 1, model: {num_layers: 2, has_qk_norm: true}}"
    found = resolve(tmp_path, recipe, ["pretrain.model.num_heads=2", "pretrain.depth=4"]).pretrain
    assert (found.model.num_layers, found.model.num_heads) == (4, 2)
    assert found.model.has_qk_norm, "the dial does not set it"
    assert found.num_steps > 7


def test_depth_zero_equals_no_depth(tmp_path: Path) -> None:
    recipe = "pretrain: {depth: 0, num_steps: 700, model: {num_layers: 3}}"
    plain = recipe.replace("depth: 0, ", "")
    assert resolve(tmp_path, recipe) == resolve(tmp_path, plain)
    assert resolve(tmp_path, plain, ["pretrain.depth=0"]) == resolve(tmp_path, plain)


def test_a_depth_and_its_settings_written_out_are_equal(tmp_path: Path) -> None:
    short = resolve(tmp_path, "pretrain: {depth: 4}").pretrain
    plain: dict[str, Any] = asdict(short)
    plain["model"] = "{" + ", ".join(f"{k}: {v}" for k, v in plain["model"].items()) + "}"
    long = "pretrain: {" + ", ".join(f"{k}: {v}" for k, v in plain.items()) + "}"
    assert resolve(tmp_path, long).pretrain == short
