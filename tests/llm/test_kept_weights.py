"""Averages of the weights, against averages computed from the weights of every step."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm.config import OptimizationConfig
from llm.errors import ArtifactError
from llm.training.kept_weights import (
    KeptWeights,
    averaging_share,
    describe_weights,
    num_snapshots,
)
from tests.llm.training_setup import tiny_model

EMA = OptimizationConfig(num_steps=12, averaging="ema", ema_decay=0.8)
SNAPSHOTS = OptimizationConfig(
    num_steps=12, averaging="snapshots", averaged_snapshots=3, snapshot_every_steps=2
)


def brute_force(history: list[Tensor], config: OptimizationConfig) -> Tensor:
    """The average of weights of steps 1 to N, by its definition, in fp64."""
    N = len(history)
    if config.averaging == "ema":
        raw = [config.ema_decay ** (N - step) for step in range(1, N + 1)]
    else:
        every, count = config.snapshot_every_steps, config.averaged_snapshots
        taken = list(range(N, 0, -every))[:count]
        raw = [float(step in taken) for step in range(1, N + 1)]
    shares = torch.tensor(raw, dtype=torch.float64) / sum(raw)
    return (torch.stack(history).double() * shares[:, None]).sum(dim=0)


@pytest.mark.parametrize(
    "config",
    [
        EMA,
        replace(EMA, num_steps=1),
        replace(EMA, num_steps=300, ema_decay=0.999),
        SNAPSHOTS,
        replace(SNAPSHOTS, num_steps=11),
        replace(SNAPSHOTS, averaged_snapshots=100),  # more than there are
        replace(SNAPSHOTS, snapshot_every_steps=5, num_steps=10),
        replace(SNAPSHOTS, snapshot_every_steps=50),  # only the last step
        replace(SNAPSHOTS, averaged_snapshots=1),
    ],
)
def test_shares_of_the_steps_give_the_average_of_the_definition(config: OptimizationConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(5, 1, bias=False)
    kept, history = KeptWeights(model, config), []
    for step in range(1, config.num_steps + 1):
        with torch.no_grad():
            model.weight.copy_(torch.randn(1, 5, generator=generator) + 3.0)
        history.append(model.weight.detach()[0].clone())
        kept.update_average(step)
    last = model.weight.detach().clone()
    with kept.averaged():
        torch.testing.assert_close(
            model.weight[0].double(), brute_force(history, config), rtol=1e-5, atol=0
        )
    assert torch.equal(model.weight, last), "the weights in training come back bit-equal"
    assert kept.use()
    torch.testing.assert_close(
        model.weight[0].double(), brute_force(history, config), rtol=1e-5, atol=0
    )


def test_frozen_weights_have_no_copy_and_stay() -> None:
    model = tiny_model()
    model.embedding.weight.requires_grad_(False)
    before = model.embedding.weight.clone()
    kept = KeptWeights(model, EMA)
    kept.update_average(1)
    kept.keep_best()
    assert not [name for name in kept.state_dict() if "embedding" in name]
    assert kept.use() and torch.equal(model.embedding.weight, before)


def test_without_averaging_nothing_is_kept() -> None:
    kept = KeptWeights(tiny_model(), OptimizationConfig())
    kept.update_average(1)
    assert not kept.state_dict() and not kept.use()
    with kept.averaged():
        pass


def test_the_best_win_over_the_average_and_both_come_back(tmp_path: Path) -> None:
    model, other = tiny_model(seed=0), tiny_model(seed=1)
    kept = KeptWeights(model, EMA)
    kept.update_average(1)
    kept.keep_best()
    best = {name: tensor.clone() for name, tensor in model.named_parameters()}
    for parameter in model.parameters():
        parameter.data.add_(1.0)
    kept.update_average(2)
    state = kept.state_dict()
    assert {name.split("/")[0] for name in state} == {"average", "best"}
    loaded = KeptWeights(other, EMA)
    loaded.load_state_dict(state, tmp_path)
    assert equal(loaded.state_dict(), state)
    assert loaded.use()
    assert all(torch.equal(tensor, best[name]) for name, tensor in other.named_parameters())


def test_copies_of_other_weights_are_refused(tmp_path: Path) -> None:
    kept = KeptWeights(tiny_model(d_ff=64), EMA)
    kept.update_average(1)
    with pytest.raises(ArtifactError, match=r"gate.weight: found shape \[64, 32\], expected \[48"):
        KeptWeights(tiny_model(), EMA).load_state_dict(kept.state_dict(), tmp_path)


@pytest.mark.parametrize(
    ("settings", "best_step", "expected"),
    [
        ({}, 0, "last step"),
        ({}, 80, "best, step 80"),
        ({"averaging": "ema"}, 0, "ema 0.999"),
        ({"averaging": "ema"}, 80, "ema 0.999, best, step 80"),
        ({"averaging": "snapshots"}, 0, "mean of 5 snapshots"),
        ({"averaging": "snapshots", "num_steps": 25}, 0, "mean of 3 snapshots"),
    ],
)
def test_weights_are_described(settings: dict[str, Any], best_step: int, expected: str) -> None:
    assert describe_weights(OptimizationConfig(**settings), best_step) == expected


def test_snapshots_are_counted_back_from_the_last_step() -> None:
    shares = {step: averaging_share(step, SNAPSHOTS) for step in range(1, 13)}
    assert {step: share for step, share in shares.items() if share} == {
        8: 1.0,
        10: 1 / 2,
        12: 1 / 3,
    }
    assert num_snapshots(SNAPSHOTS) == 3


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
