"""Learning-rate schedules (cosine, linear, warmup-stable-decay) as pure functions of the step.

Each gives a factor between 0 and 1 of the peak learning rate, so there is no state to save.
"""

import math

from llm.config import OptimizationConfig


def learning_rate_factor(step: int, config: OptimizationConfig) -> float:
    """Return the fraction of the peak learning rate to use at `step`, counted from 0."""
    warmup, last = config.warmup_steps, config.num_steps - 1
    if step < warmup:
        # from 1 / (warmup + 1), not from 0, where the first step would change nothing; the peak is
        # reached at step `warmup`
        return (step + 1) / (warmup + 1)
    # exact at step num_steps - 1, so that the last step is taken at the final learning rate
    final = config.final_learning_rate_fraction
    if config.schedule == "wsd":
        # warmup, stable, decay; a decay that would start within the warmup starts after it
        first = min(max(warmup, round(config.num_steps * (1 - config.decay_fraction)) - 1), last)
        return _linear(_progress(step, first, last), final)
    progress = _progress(step, warmup, last)
    return _cosine(progress, final) if config.schedule == "cosine" else _linear(progress, final)


def _progress(step: int, first: int, last: int) -> float:
    """Return 0 up to step `first`, 1 from step `last` on, and linear between."""
    return min(max(step - first, 0) / max(last - first, 1), 1.0)  # first == last: one step


def _cosine(progress: float, final: float) -> float:
    # half a cosine, "SGDR" (arXiv 1608.03983)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def _linear(progress: float, final: float) -> float:
    # as the decay of wsd: "Scaling Laws and Compute-Optimal Training Beyond Fixed Training
    # Durations" (arXiv 2405.18392)
    return 1 - (1 - final) * progress
