"""Presets: shapes of published models by name, as plain settings.

`pretrain.model.preset: gpt2-124m` is replaced by the settings it stands for when a recipe is read.
Equal settings therefore give equal cache keys, however they were written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llm.depth import DIAL_KEYS, DIAL_MODEL_KEYS, Tree, section
from llm.settings import did_you_mean


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A published model: settings of `pretrain.model` that differ from their defaults."""

    model: Mapping[str, object]
    vocab_size: int
    """Of the published model; a run uses its own tokenizer's."""
    seq_len: int
    """The published context; a run uses `pack.seq_len`."""
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


def clear_overridden(tree: Tree, overrides: Sequence[str]) -> None:
    """Drop the recipe's settings that a preset or a depth among the overrides replaces.

    The other overrides still win over the preset or depth.
    """
    pretrain = section(tree, "pretrain")
    model = section(pretrain, "model")
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
    """Replace `pretrain.model.preset` by its settings; settings given beside it win."""
    model = section(section(tree, "pretrain"), "model")
    if "preset" not in model:
        return
    name = str(model.pop("preset"))
    if name in PRESETS:
        model.update({**PRESETS[name].model, **model})
        return
    meant = did_you_mean(name, list(PRESETS))
    allowed = ", ".join(PRESETS)
    problems.append(f"pretrain.model.preset: found {name!r}, allowed: {allowed}{meant}")
