"""What follows from a model's settings: the width of a head, how far back a layer looks."""

from llm.config import ModelConfig


def head_dim_of(config: ModelConfig) -> int:
    """Return the width D of a head."""
    return config.head_dim or config.d_model // config.num_heads


def window_of(config: ModelConfig, layer: int) -> int:
    """Return how many positions a query of `layer` looks back on, itself included; 0: on all.

    Most layers read what is near, which is cheap; the last of each group carries what is far.

    Source: "Longformer" (arXiv 2004.05150) for the window, "Gemma 2" (arXiv 2408.00118) for layers
    of both kinds in one model.
    """
    is_full = config.full_attention_every and (layer + 1) % config.full_attention_every == 0
    return 0 if is_full else config.sliding_window
