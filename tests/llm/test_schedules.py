"""Schedules equal their closed forms."""

import math
from typing import Any

import pytest

from llm.config import OptimizationConfig
from llm.training.schedules import learning_rate_factor


def factors(**settings: Any) -> list[float]:
    config = OptimizationConfig(**{"num_steps": 101, "warmup_steps": 0, **settings})
    return [learning_rate_factor(step, config) for step in range(config.num_steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 20])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_every_schedule_rises_to_one_and_ends_at_the_final_fraction(
    schedule: str, warmup_steps: int, final: float
) -> None:
    found = factors(
        schedule=schedule, warmup_steps=warmup_steps, final_learning_rate_fraction=final
    )
    rise = [(step + 1) / (warmup_steps + 1) for step in range(warmup_steps)]
    assert found[:warmup_steps] == rise
    assert found[warmup_steps] == 1
    assert found[-1] == pytest.approx(final, abs=1e-15)
    falling = found[warmup_steps:]
    assert falling == sorted(falling, reverse=True)
    assert all(0 <= factor <= 1 for factor in found)


def test_cosine_is_half_a_cosine() -> None:
    found = factors(schedule="cosine", final_learning_rate_fraction=0.0)
    assert found == pytest.approx([math.cos(math.pi * s / 200) ** 2 for s in range(101)])


def test_linear_is_a_line_after_the_warm_up() -> None:
    found = factors(schedule="linear", final_learning_rate_fraction=0.5, warmup_steps=50)
    assert found[50:] == pytest.approx([1 - 0.01 * step for step in range(51)])


def test_wsd_stays_at_the_peak_and_falls_over_the_last_steps() -> None:
    found = factors(
        schedule="wsd",
        num_steps=100,
        warmup_steps=10,
        decay_fraction=0.25,
        final_learning_rate_fraction=0.0,
    )
    assert found[10:75] == [1.0] * 65
    assert found[75:] == pytest.approx([1 - (step + 1) / 25 for step in range(25)])


def test_a_training_of_one_step_is_at_the_peak() -> None:
    for schedule in ("cosine", "linear", "wsd"):
        assert factors(schedule=schedule, num_steps=1) == [1.0]


def test_wsd_whose_decay_reaches_into_the_warm_up_still_rises_first() -> None:
    found = factors(schedule="wsd", num_steps=10, warmup_steps=5, decay_fraction=1.0)
    assert found[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert found[-1] == pytest.approx(0.1)
