"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to lose.

Each gives a factor between 0 and 1 of the peak learning rate. Step 0 is the first; a schedule of
`num_steps` ends at exactly `final_learning_rate_fraction` on the last one, num_steps - 1.
"""

import math

from llm.config import OptimizationConfig


def learning_rate_factor(step: int, config: OptimizationConfig) -> float:
    """Return the share of the peak learning rate that holds at `step`.

    The rate rises over `warmup_steps` from 1 / (warmup_steps + 1), so that no step is wasted at
    zero, and reaches the peak at step `warmup_steps`.
    """
    warmup, last = config.warmup_steps, config.num_steps - 1
    if step < warmup:
        return (step + 1) / (warmup + 1)
    final = config.final_learning_rate_fraction
    if config.schedule == "wsd":
        first = min(max(warmup, round(config.num_steps * (1 - config.decay_fraction)) - 1), last)
        return _linear(_progress(step, first, last), final)
    progress = _progress(step, warmup, last)
    return _cosine(progress, final) if config.schedule == "cosine" else _linear(progress, final)


def _progress(step: int, first: int, last: int) -> float:
    """Return 0 up to step `first`, 1 from step `last` on, and the share of the way between."""
    return min(max(step - first, 0) / max(last - first, 1), 1.0)


def _cosine(progress: float, final: float) -> float:
    """Fall along half a cosine. Source: "SGDR" (arXiv 1608.03983)."""
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def _linear(progress: float, final: float) -> float:
    """Fall along a line; as the end of wsd, "Scaling Laws and Compute-Optimal Training Beyond Fixed
    Training Durations" (arXiv 2405.18392).
    """
    return 1 - (1 - final) * progress
