"""Presets at toy size, and recipes resolved from text."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llm.config import ModelConfig, RunConfig
from llm.recipes import load_config, load_preset

TOY_D_MODEL, TOY_HEADS = 32, 4


def toy_shape(preset: str) -> ModelConfig:
    """The preset's choices and proportions at a width of 32."""
    config, _, _ = load_preset(preset)
    kv_heads = max(1, TOY_HEADS * config.num_kv_heads // config.num_heads)
    return replace(
        config,
        num_layers=2,
        d_model=TOY_D_MODEL,
        num_heads=TOY_HEADS,
        num_kv_heads=kv_heads,
        head_dim=2 * TOY_D_MODEL // TOY_HEADS if config.head_dim else 0,
        d_ff=config.d_ff * TOY_D_MODEL // config.d_model,
        rope_original_seq_len=16,
    )


def resolve(folder: Path, recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the settings of a recipe given as YAML."""
    path = folder / "mine.yaml"
    path.write_text(recipe)
    return load_config(path, overrides)
