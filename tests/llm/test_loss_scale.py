"""The loss scale of fp16 follows torch's GradScaler."""

import random

import torch

from llm.training.loss_scale import INITIAL_LOSS_SCALE, STEPS_TO_DOUBLE, LossScale


def test_the_loss_scale_moves_as_torchs_scaler_does() -> None:
    mine = LossScale(INITIAL_LOSS_SCALE, STEPS_TO_DOUBLE - 5, torch.device("cpu"))
    scale, count = torch.tensor(INITIAL_LOSS_SCALE), torch.tensor(STEPS_TO_DOUBLE - 5).int()
    generator = random.Random(1)
    for step in range(3 * STEPS_TO_DOUBLE):
        has_overflow = torch.tensor(float(step < 100 and generator.random() < 0.1))
        mine.update(has_overflow)
        torch._amp_update_scale_(scale, count, has_overflow, 2.0, 0.5, STEPS_TO_DOUBLE)
        assert (float(mine.scale), float(mine.num_steps)) == (float(scale), float(count))
    assert float(scale) != INITIAL_LOSS_SCALE
