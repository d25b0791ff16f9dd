"""Generation options: how tokens are chosen, and where a completion ends."""

import math
from dataclasses import dataclass

from llm.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationOptions:
    """Options of one call; the defaults choose greedily.

    Raises:
        ConfigError: naming every option out of range.
    """

    max_new_tokens: int = 128
    """Longest completion. The model's context ends it too."""
    stop_ids: tuple[int, ...] = ()
    """Tokens before which a completion ends."""
    stops: tuple[str | tuple[int, ...], ...] = ()
    """Texts, or sequences of ids, before which a completion ends."""
    temperature: float = 0.0
    """Divides the logits: below 1 sharpens the distribution. 0 takes the most probable token."""
    top_k: int = 0
    """Sample from this many most probable tokens; 0 from all."""
    top_p: float = 1.0
    """Sample from the fewest most probable tokens whose probabilities sum to this; 1 from all."""
    min_p: float = 0.0
    """Sample from tokens with at least this share of the top token's probability; 0 from all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of the prompt and of the completion so far become less probable."""
    seed: int = 0
    """Of sampling: the same seed draws the same tokens."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}: found {getattr(self, name)!r}, expected {expected}"
            for name, is_fine, expected in (
                ("max_new_tokens", self.max_new_tokens >= 0, "a whole number >= 0"),
                ("stops", all(map(len, self.stops)), "none that is empty"),
                ("temperature", 0 <= self.temperature < math.inf, "a number >= 0"),
                ("top_k", self.top_k >= 0, "a whole number >= 0"),
                ("top_p", 0 < self.top_p <= 1, "a number > 0 and <= 1"),
                ("min_p", 0 <= self.min_p <= 1, "a number >= 0 and <= 1"),
                ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a number > 0"),
            )
            if not is_fine
        ]
        if problems:
            raise ConfigError("\n".join(problems))
