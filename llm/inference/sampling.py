"""Which token comes next: settings, and filters from logits to logits.

A filter takes tokens out by setting their logits to minus infinity; it never takes out the
likeliest one. Shapes: B rows, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llm.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are chosen and where a continuation ends.

    Raises:
        ConfigError: naming every setting that is out of its range.
    """

    temperature: float = 0.0
    """Logits are divided by it: below 1 the likely becomes likelier. 0 takes the likeliest token.
    """
    top_k: int = 0
    """Draw from so many likeliest tokens; 0 from all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens that have this probability together; 1 from all."""
    min_p: float = 0.0
    """Draw from tokens at least this share as likely as the likeliest; 0 from all."""
    repetition_penalty: float = 1.0
    """Tokens already in the text, the prompt included, become less likely; 1 leaves them."""
    stops: tuple[str | tuple[int, ...], ...] = ()
    """Texts, or sequences of ids, before which a continuation ends."""
    seed: int = 0
    """Of what is drawn: the same seed draws the same tokens."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}: found {getattr(self, name)!r}, expected {expected}"
            for name, is_fine, expected in (
                ("temperature", 0 <= self.temperature < math.inf, "a number >= 0"),
                ("top_k", self.top_k >= 0, "a whole number >= 0"),
                ("top_p", 0 < self.top_p <= 1, "a number > 0 and <= 1"),
                ("min_p", 0 <= self.min_p <= 1, "a number >= 0 and <= 1"),
                ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a number > 0"),
                ("stops", all(map(len, self.stops)), "none that is empty"),
            )
            if not is_fine
        ]
        if problems:
            raise ConfigError("\n".join(problems))


def filter_logits(logits: Tensor, sampling: Sampling, is_seen: Tensor | None) -> Tensor:
    """Apply what `sampling` asks for to logits (B, V), in the order that transformers has too.

    `is_seen` (B, V) is true for tokens already in each row's text; None where nothing asks for it.
    """
    logits = logits.float()
    if is_seen is not None:
        logits = penalize_repetition(logits, is_seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p:
        logits = keep_min_p(logits, sampling.min_p)
    return logits


def penalize_repetition(logits: Tensor, is_seen: Tensor, penalty: float) -> Tensor:
    """Divide positive logits of seen tokens by `penalty` and multiply negative ones by it.

    Source: "CTRL" (arXiv 1909.05858), section 4.1.
    """
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(is_seen, penalized, logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the `k` likeliest tokens, and those exactly as likely as the last of them.

    Source: "Hierarchical Neural Story Generation" (arXiv 1805.04833), section 5.4.
    """
    least = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]  # (B, V) -> (B, 1)
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the nucleus: the fewest likeliest tokens whose probabilities sum to `p` or more.

    Source: "The Curious Case of Neural Text Degeneration" (arXiv 1904.09751), section 3.1.
    """
    ordered, places = logits.sort(dim=-1, descending=True, stable=True)
    chances = ordered.double().softmax(dim=-1)
    before = chances.cumsum(dim=-1) - chances  # what all likelier tokens have together
    is_out = before >= p
    is_out[:, 0] = False
    return logits.masked_fill(torch.zeros_like(is_out).scatter(1, places, is_out), -torch.inf)


def keep_min_p(logits: Tensor, share: float) -> Tensor:
    """Keep tokens whose probability is at least `share` of the likeliest one's.

    Source: "Turning Up the Heat: Min-p Sampling" (arXiv 2407.01082).
    """
    least = logits.amax(dim=-1, keepdim=True) + math.log(share)  # (B, V) -> (B, 1)
    return logits.masked_fill(logits < least, -torch.inf)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Return, of each row of logits (B, V), the token at which the cumulated probability passes
    that row's number between 0 and 1: (B,) -> (B,).
    """
    cumulated = logits.double().softmax(dim=-1).cumsum(dim=-1)
    total = cumulated[:, -1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # a number that was rounded to 1
    thresholds = (uniform.to(cumulated)[:, None] * total).minimum(below)
    return torch.searchsorted(cumulated, thresholds, right=True).squeeze(1)
