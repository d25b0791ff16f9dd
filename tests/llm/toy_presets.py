"""Every preset with its sizes divided until it trains in a second; all its choices stay."""

from dataclasses import replace

from llm.config import ModelConfig, load_preset

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
