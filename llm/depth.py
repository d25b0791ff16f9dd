"""The depth dial: `pretrain.depth` sets width, heads, steps and learning rates of a whole family.

`pretrain.depth: 8` is replaced by plain settings when a recipe is read; settings given beside it
win, and the rest is derived from them. docs/decisions/0008-one-dial.md has the derivation.
"""

import math
from dataclasses import dataclass
from typing import cast

Tree = dict[str, object]

MAX_DEPTH = 64
WIDTH_PER_LAYER = 64  # 12 layers of 768: the smallest GPT-2
HEAD_DIM = 64
D_FF_MULTIPLE = 64
REFERENCE_WIDTH = 256
REFERENCE_LEARNING_RATES = {"muon": 3e-3, "adamw": 1e-3}  # AdamW's peak at REFERENCE_WIDTH
EXPONENTS = {"muon": 0.5, "adamw": 1.0}
MUON_LEARNING_RATE = 0.02
TOKENS_PER_PARAMETER = 20  # "Chinchilla" (arXiv 2203.15556), table 3
WARMUP_FRACTION = 0.02
DIAL_MODEL_KEYS = ("num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff")
DIAL_KEYS = ("optimizer", "learning_rate", "muon_learning_rate", "num_steps", "warmup_steps")


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthContext:
    """Settings the dial depends on beside the depth."""

    is_gated: bool
    """Whether the feed-forward network has a third matrix."""
    tie_embeddings: bool
    vocab_size: int
    tokens_per_step: int


def take_depth(tree: Tree, problems: list[str]) -> int:
    """Remove `pretrain.depth` from the settings and return it; 0: the dial is off."""
    pretrain = section(tree, "pretrain")
    depth = pretrain.pop("depth", 0)
    if not isinstance(depth, int) or isinstance(depth, bool) or not 0 <= depth <= MAX_DEPTH:
        problems.append(
            f"pretrain.depth: found {depth!r}, expected a whole number from 0 (off) to {MAX_DEPTH}"
        )
        return 0
    if depth and "preset" in section(pretrain, "model"):
        problems.append(
            f"pretrain.depth: found {depth} beside pretrain.model.preset, expected one of the two"
        )
    return depth


def expand_depth(tree: Tree, depth: int, context: DepthContext) -> None:
    """Set what `pretrain` and its model do not set themselves.

    Later values follow from given ones: a narrower model gets fewer heads and a higher learning
    rate.
    """
    pretrain = tree["pretrain"] = section(tree, "pretrain")
    model = pretrain["model"] = section(pretrain, "model")

    def size(key: str, derived: int) -> int:
        return int(cast(int, model.setdefault(key, derived)))

    L, C = size("num_layers", depth), size("d_model", WIDTH_PER_LAYER * depth)
    H = size("num_heads", max(1, C // HEAD_DIM))
    K = size("num_kv_heads", H)
    num_matrices, widening = (3, 8 / 3) if context.is_gated else (2, 4)
    F = size("d_ff", D_FF_MULTIPLE * max(1, round(widening * C / D_FF_MULTIPLE)))
    D = int(cast(int, model.get("head_dim", 0))) or C // H
    num_weights = context.vocab_size * C * (1 if context.tie_embeddings else 2)
    num_weights += L * (2 * C * (H + K) * D + num_matrices * C * F)  # vectors are too few to count
    pretrain.setdefault("optimizer", "muon")
    optimizer = str(pretrain["optimizer"])
    rate = REFERENCE_LEARNING_RATES[optimizer] * (REFERENCE_WIDTH / C) ** EXPONENTS[optimizer]
    pretrain.setdefault("learning_rate", float(f"{rate:.3g}"))
    pretrain.setdefault("muon_learning_rate", MUON_LEARNING_RATE)
    num_tokens = TOKENS_PER_PARAMETER * num_weights
    num_steps = pretrain.setdefault("num_steps", math.ceil(num_tokens / context.tokens_per_step))
    pretrain.setdefault("warmup_steps", int(WARMUP_FRACTION * int(cast(int, num_steps))))


def section(tree: Tree, name: str) -> Tree:
    """Return the section `name`, to read or change in place; a new one if it is missing."""
    found = tree.get(name)
    return cast(Tree, found) if isinstance(found, dict) else {}
