"""Short forms of a recipe's settings: models known by name, and one dial for a whole family.

`pretrain.model.preset: gpt2-124m` and `pretrain.depth: 8` stand for other settings and are replaced
by them when a recipe is read, so that what a run resolves to, saves and is cached under has neither
word in it: equal settings, equal keys, however they were written.

Plain numbers; nothing here needs torch, or the classes these settings become.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from llm.settings import did_you_mean

Tree = dict[str, object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A published model's shape: settings of `pretrain.model` that differ from their defaults."""

    model: Mapping[str, object]
    vocab_size: int
    """Of the published model; a pipeline takes its own tokenizer's."""
    seq_len: int
    """The published context; a pipeline takes `pack.seq_len`."""
    num_parameters: int
    """As published, or as counted in the published weights."""


def _gpt2(num_layers: int, d_model: int, num_heads: int, num_parameters: int) -> Preset:
    """Source: "Language Models are Unsupervised Multitask Learners", table 2, and the published
    weights, which are larger than the table says.
    """
    return Preset(
        model={
            "num_layers": num_layers,
            "d_model": d_model,
            "num_heads": num_heads,
            "num_kv_heads": num_heads,
            "d_ff": 4 * d_model,
            "positions": "learned",
            "norm": "layernorm",
            "mlp": "gelu",
            "has_biases": True,
        },
        vocab_size=50_257,
        seq_len=1024,
        num_parameters=num_parameters,
    )


def _llama3(
    num_layers: int,
    d_model: int,
    num_heads: int,
    d_ff: int,
    rope_factor: float,
    num_parameters: int,
    tie_embeddings: bool = True,
) -> Preset:
    """Source: "The Llama 3 Herd of Models" (arXiv 2407.21783), table 3; Llama 3.2's model card."""
    return Preset(
        model={
            "num_layers": num_layers,
            "d_model": d_model,
            "num_heads": num_heads,
            "num_kv_heads": 8,
            "d_ff": d_ff,
            "rope_theta": 500_000.0,
            "rope_scaling": "llama3",
            "rope_factor": rope_factor,
            "tie_embeddings": tie_embeddings,
        },
        vocab_size=128_256,
        seq_len=131_072,
        num_parameters=num_parameters,
    )


def _qwen3(num_layers: int, d_model: int, num_heads: int, d_ff: int, num_parameters: int) -> Preset:
    """Source: "Qwen3 Technical Report" (arXiv 2505.09388), table 1, and the published config."""
    return Preset(
        model={
            "num_layers": num_layers,
            "d_model": d_model,
            "num_heads": num_heads,
            "num_kv_heads": 8,
            "head_dim": 128,
            "d_ff": d_ff,
            "rope_theta": 1_000_000.0,
            "norm_eps": 1e-6,
            "has_qk_norm": True,
        },
        vocab_size=151_936,
        seq_len=40_960,
        num_parameters=num_parameters,
    )


PRESETS: dict[str, Preset] = {
    "gpt2-124m": _gpt2(12, 768, 12, 124_439_808),
    "gpt2-355m": _gpt2(24, 1024, 16, 354_823_168),
    "gpt2-774m": _gpt2(36, 1280, 20, 774_030_080),
    "gpt2-1558m": _gpt2(48, 1600, 25, 1_557_611_200),
    "llama3.2-1b": _llama3(16, 2048, 32, 8192, 32.0, 1_235_814_400),
    "llama3.2-3b": _llama3(28, 3072, 24, 8192, 32.0, 3_212_749_824),
    "llama3.1-8b": _llama3(32, 4096, 32, 14_336, 8.0, 8_030_261_248, tie_embeddings=False),
    "qwen3-0.6b": _qwen3(28, 1024, 16, 3072, 596_049_920),
    "qwen3-1.7b": _qwen3(28, 2048, 16, 6144, 1_720_574_976),
    "qwen3-4b": _qwen3(36, 2560, 32, 9728, 4_022_468_096),
    "gemma-2b": Preset(  # "Gemma" (arXiv 2403.08295), table 1, and the published config
        model={
            "num_layers": 18,
            "d_model": 2048,
            "num_heads": 8,
            "num_kv_heads": 1,
            "head_dim": 256,
            "d_ff": 16_384,
            "norm_eps": 1e-6,
            "mlp": "geglu",
            "is_embedding_scaled": True,
        },
        vocab_size=256_000,
        seq_len=8192,
        num_parameters=2_506_172_416,
    ),
}


# The dial: docs/decisions/0008-one-dial.md says what is derived, from what, and what is not.
MAX_DEPTH = 64
WIDTH_PER_LAYER = 64
HEAD_DIM = 64
D_FF_MULTIPLE = 64
REFERENCE_WIDTH = 256
REFERENCE_LEARNING_RATES = {"muon": 3e-3, "adamw": 1e-3}  # AdamW's peak, at that width
EXPONENTS = {"muon": 0.5, "adamw": 1.0}
MUON_LEARNING_RATE = 0.02
TOKENS_PER_PARAMETER = 20
WARMUP_FRACTION = 0.02
DIAL_MODEL_KEYS = ("num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff")
DIAL_KEYS = ("optimizer", "learning_rate", "muon_learning_rate", "num_steps", "warmup_steps")


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """What the dial's settings depend on beside the depth."""

    is_gated: bool
    """Whether the feed-forward block has a third matrix."""
    tie_embeddings: bool
    vocab_size: int
    tokens_per_step: int


def make_room(tree: Tree, overrides: Sequence[str]) -> None:
    """Drop from a recipe what a short form among the overrides stands for, so that the short form
    replaces it and the other overrides win over the short form.
    """
    pretrain = _section(tree, "pretrain")
    model = _section(pretrain, "model")
    values = {key.strip(): text.strip() for key, _, text in (o.partition("=") for o in overrides)}
    if "pretrain.model.preset" in values:
        model.clear()
        pretrain.pop("depth", None)
    if values.get("pretrain.depth", "0") != "0":
        for key in ("preset", *DIAL_MODEL_KEYS):
            model.pop(key, None)
        for key in DIAL_KEYS:
            pretrain.pop(key, None)


def expand_preset(tree: Tree, problems: list[str]) -> None:
    """Put a preset's settings in the place of `pretrain.model.preset`; those beside it win."""
    model = _section(_section(tree, "pretrain"), "model")
    if "preset" not in model:
        return
    name = str(model.pop("preset"))
    if name in PRESETS:
        model.update({**PRESETS[name].model, **model})
        return
    meant = did_you_mean(name, list(PRESETS))
    allowed = ", ".join(PRESETS)
    problems.append(f"pretrain.model.preset: found {name!r}, allowed: {allowed}{meant}")


def take_depth(tree: Tree, problems: list[str]) -> int:
    """Take `pretrain.depth` out of the settings and return it; 0 where the dial is off."""
    pretrain = _section(tree, "pretrain")
    depth = pretrain.pop("depth", 0)
    if not isinstance(depth, int) or isinstance(depth, bool) or not 0 <= depth <= MAX_DEPTH:
        problems.append(
            f"pretrain.depth: found {depth!r}, expected a whole number from 0 (off) to {MAX_DEPTH}"
        )
        return 0
    if depth and "preset" in _section(pretrain, "model"):
        problems.append(
            f"pretrain.depth: found {depth} beside pretrain.model.preset, expected one of the two"
        )
    return depth


def expand_depth(tree: Tree, depth: int, around: Surroundings) -> None:
    """Give `pretrain` and its model the settings that a depth stands for.

    Those given stay, and what follows from them follows from what was given: a narrower model has
    fewer heads and a higher learning rate.
    """
    pretrain = tree["pretrain"] = _section(tree, "pretrain")
    model = pretrain["model"] = _section(pretrain, "model")

    def size(key: str, derived: int) -> int:
        return int(cast(int, model.setdefault(key, derived)))

    L, C = size("num_layers", depth), size("d_model", WIDTH_PER_LAYER * depth)
    H = size("num_heads", max(1, C // HEAD_DIM))
    K = size("num_kv_heads", H)
    num_matrices, widening = (3, 8 / 3) if around.is_gated else (2, 4)
    F = size("d_ff", D_FF_MULTIPLE * max(1, round(widening * C / D_FF_MULTIPLE)))
    D = int(cast(int, model.get("head_dim", 0))) or C // H
    num_weights = around.vocab_size * C * (1 if around.tie_embeddings else 2)
    num_weights += L * (2 * C * (H + K) * D + num_matrices * C * F)  # vectors are too few to count
    pretrain.setdefault("optimizer", "muon")
    optimizer = str(pretrain["optimizer"])
    rate = REFERENCE_LEARNING_RATES[optimizer] * (REFERENCE_WIDTH / C) ** EXPONENTS[optimizer]
    pretrain.setdefault("learning_rate", float(f"{rate:.3g}"))
    pretrain.setdefault("muon_learning_rate", MUON_LEARNING_RATE)
    num_tokens = TOKENS_PER_PARAMETER * num_weights
    num_steps = pretrain.setdefault("num_steps", math.ceil(num_tokens / around.tokens_per_step))
    pretrain.setdefault("warmup_steps", int(WARMUP_FRACTION * int(cast(int, num_steps))))


def _section(tree: Tree, name: str) -> Tree:
    """Return a section to read and to change; an empty one where there is none, or no section."""
    section = tree.get(name)
    return cast(Tree, section) if isinstance(section, dict) else {}
