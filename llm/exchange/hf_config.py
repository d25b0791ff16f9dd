"""The keys of `config.json` of four architectures of transformers, to a model's shape and back.

Source: transformers, configuration_{gpt2,llama,qwen3,gemma}.py, version 5.23: keys and defaults.
"""

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, NamedTuple

from llm.config import ModelConfig
from llm.model.attention import window_of
from llm.model.positions import head_dim_of
from llm.settings import Positive, PositiveFloat, Range

# Bounds above every real model, so that a hostile file can neither overflow a product of two sizes
# nor allocate large tables.
Size = Annotated[int, Range(minimum=1, maximum=1 << 24)]
OptionalSize = Annotated[int, Range(minimum=0, maximum=1 << 24)]
NumLayers = Annotated[int, Range(minimum=1, maximum=1024)]
NumHeads = Annotated[int, Range(minimum=1, maximum=1 << 12)]
HeadDim = Annotated[int, Range(minimum=0, maximum=1 << 12)]
Context = Annotated[int, Range(minimum=1, maximum=1_048_576)]

FULL, SLIDING = "full_attention", "sliding_attention"


class Shape(NamedTuple):
    """Settings, vocabulary and context of a model."""

    config: ModelConfig
    vocab_size: int
    seq_len: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GPT2Json:
    """The keys of GPT-2's `config.json` that decide its logits. Literals: the supported values."""

    vocab_size: Size
    n_positions: Context
    n_embd: Size
    n_layer: NumLayers
    n_head: NumHeads
    n_inner: OptionalSize = 0
    activation_function: Literal["gelu_new", "gelu_pytorch_tanh"] = "gelu_new"
    layer_norm_epsilon: PositiveFloat = 1e-5
    scale_attn_weights: Literal[True] = True
    scale_attn_by_inverse_layer_idx: Literal[False] = False
    add_cross_attention: Literal[False] = False
    tie_word_embeddings: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeJson:
    """`rope_parameters`, or in older files `rope_theta` and `rope_scaling`."""

    rope_type: Literal["default", "llama3"] = "default"
    rope_theta: PositiveFloat = 10_000.0
    partial_rotary_factor: Literal[1] = 1
    factor: Annotated[float, Range(minimum=1)] = 8.0
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_max_position_embeddings: Positive = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class RotaryJson:
    """The keys that the layouts with rotary positions share."""

    vocab_size: Size
    max_position_embeddings: Context
    hidden_size: Size
    num_hidden_layers: NumLayers
    num_attention_heads: NumHeads
    num_key_value_heads: OptionalSize = 0
    head_dim: HeadDim = 0
    intermediate_size: Size
    rms_norm_eps: PositiveFloat = 1e-6
    rope_parameters: RopeJson = field(default_factory=RopeJson)


@dataclass(frozen=True, kw_only=True, slots=True)
class LlamaJson(RotaryJson):
    """The keys of Llama's `config.json` that decide its logits."""

    hidden_act: Literal["silu", "swish"] = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Qwen3Json(RotaryJson):
    """The keys of Qwen-3's `config.json` that decide its logits."""

    head_dim: HeadDim = 128
    hidden_act: Literal["silu", "swish"] = "silu"
    attention_bias: Literal[False] = False
    tie_word_embeddings: bool = False
    use_sliding_window: bool = False
    sliding_window: OptionalSize = 4096
    max_window_layers: OptionalSize = 28
    layer_types: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class GemmaJson(RotaryJson):
    """The keys of Gemma's `config.json` that decide its logits."""

    head_dim: HeadDim = 256
    hidden_act: Literal["gelu_pytorch_tanh", "gelu"] = "gelu_pytorch_tanh"  # both mean tanh here
    hidden_activation: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    attention_bias: Literal[False] = False
    use_bidirectional_attention: Literal[False] = False
    tie_word_embeddings: bool = True


ConfigJson = GPT2Json | LlamaJson | Qwen3Json | GemmaJson


def read_gpt2(keys: GPT2Json, problems: list[str]) -> Shape:
    """Return the shape that a `config.json` of GPT-2 describes."""
    config = ModelConfig(
        num_layers=keys.n_layer,
        d_model=keys.n_embd,
        num_heads=keys.n_head,
        num_kv_heads=keys.n_head,
        d_ff=keys.n_inner or 4 * keys.n_embd,
        positions="learned",
        norm="layernorm",
        norm_eps=keys.layer_norm_epsilon,
        mlp="gelu",
        has_biases=True,
        tie_embeddings=keys.tie_word_embeddings,
    )
    return Shape(config, keys.vocab_size, keys.n_positions)


def write_gpt2(shape: Shape) -> GPT2Json:
    """Return the keys of GPT-2 for `shape`, as far as they can express it."""
    config = shape.config
    return GPT2Json(
        vocab_size=shape.vocab_size,
        n_positions=shape.seq_len,
        n_embd=config.d_model,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        n_inner=config.d_ff,
        layer_norm_epsilon=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings,
    )


def _read_rotary(keys: LlamaJson | Qwen3Json | GemmaJson) -> Shape:
    rope = keys.rope_parameters
    config = ModelConfig(
        num_layers=keys.num_hidden_layers,
        d_model=keys.hidden_size,
        num_heads=keys.num_attention_heads,
        num_kv_heads=keys.num_key_value_heads or keys.num_attention_heads,
        head_dim=keys.head_dim,
        d_ff=keys.intermediate_size,
        norm_eps=keys.rms_norm_eps,
        tie_embeddings=keys.tie_word_embeddings,
        rope_theta=rope.rope_theta,
        rope_scaling="llama3" if rope.rope_type == "llama3" else "none",
        rope_factor=rope.factor,
        rope_low_frequency_factor=rope.low_freq_factor,
        rope_high_frequency_factor=rope.high_freq_factor,
        rope_original_seq_len=rope.original_max_position_embeddings,
    )
    return Shape(normalized_config(config), keys.vocab_size, keys.max_position_embeddings)


def _rotary_keys(shape: Shape) -> dict[str, object]:
    """Return the keys of RotaryJson and `tie_word_embeddings`."""
    config = shape.config
    rope = RopeJson(
        rope_type="default" if config.rope_scaling == "none" else "llama3",
        rope_theta=config.rope_theta,
        factor=config.rope_factor,
        low_freq_factor=config.rope_low_frequency_factor,
        high_freq_factor=config.rope_high_frequency_factor,
        original_max_position_embeddings=config.rope_original_seq_len,
    )
    return {
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.seq_len,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": head_dim_of(config),
        "intermediate_size": config.d_ff,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_embeddings,
    }


def read_llama(keys: LlamaJson, problems: list[str]) -> Shape:
    """Return the shape that a `config.json` of Llama describes; add to `problems`."""
    if keys.attention_bias != keys.mlp_bias:
        problems.append(
            f"mlp_bias: found {keys.mlp_bias}, expected {keys.attention_bias} as attention_bias"
        )
    shape = _read_rotary(keys)
    return shape._replace(config=replace(shape.config, has_biases=keys.attention_bias))


def write_llama(shape: Shape) -> LlamaJson:
    """Return the keys of Llama for `shape`, as far as they can express it."""
    has_biases = shape.config.has_biases
    keys = _rotary_keys(shape)
    return LlamaJson(**keys, attention_bias=has_biases, mlp_bias=has_biases)  # type: ignore[arg-type]


def read_qwen3(keys: Qwen3Json, problems: list[str]) -> Shape:
    """Return the shape that a `config.json` of Qwen-3 describes; add to `problems`."""
    window = keys.sliding_window if keys.use_sliding_window else 0
    num_layers, first = keys.num_hidden_layers, keys.max_window_layers
    by_number = [SLIDING if window and layer >= first else FULL for layer in range(num_layers)]
    types = list(keys.layer_types) or by_number
    group = types.index(FULL) + 1 if FULL in types else 0
    shape = _read_rotary(keys)
    config = replace(shape.config, has_qk_norm=True)
    if SLIDING in types:
        config = replace(config, sliding_window=window, full_attention_every=group)
    if (not window and SLIDING in types) or types != _layer_types(config):
        problems.append(
            f"layer_types: found {types} with a window of {window}, expected {num_layers} times"
            f" {FULL}, or with a window {SLIDING} except for the last of every so many layers"
        )
    return shape._replace(config=config)


def write_qwen3(shape: Shape) -> Qwen3Json:
    """Return the keys of Qwen-3 for `shape`, as far as they can express it."""
    config = shape.config
    keys = _rotary_keys(shape)
    return Qwen3Json(
        **keys,  # type: ignore[arg-type]
        use_sliding_window=config.sliding_window > 0,
        sliding_window=config.sliding_window,
        max_window_layers=0,
        layer_types=tuple(_layer_types(config)),
    )


def _layer_types(config: ModelConfig) -> list[str]:
    return [SLIDING if window_of(config, layer) else FULL for layer in range(config.num_layers)]


def read_gemma(keys: GemmaJson, problems: list[str]) -> Shape:
    """Return the shape that a `config.json` of Gemma describes."""
    shape = _read_rotary(keys)
    return shape._replace(config=replace(shape.config, mlp="geglu", is_embedding_scaled=True))


def write_gemma(shape: Shape) -> GemmaJson:
    """Return the keys of Gemma for `shape`, as far as they can express it."""
    return GemmaJson(**_rotary_keys(shape))  # type: ignore[arg-type]


def normalized_config(config: ModelConfig) -> ModelConfig:
    """Return `config` with defaults for settings that have no effect on logits."""
    defaults = ModelConfig()
    config = replace(
        config,
        head_dim=head_dim_of(config),
        dropout=defaults.dropout,
        init=defaults.init,
    )
    if config.positions == "learned":
        config = replace(config, rope_theta=defaults.rope_theta, rope_scaling="none")
    if config.rope_scaling == "none":
        config = replace(
            config,
            rope_factor=defaults.rope_factor,
            rope_low_frequency_factor=defaults.rope_low_frequency_factor,
            rope_high_frequency_factor=defaults.rope_high_frequency_factor,
            rope_original_seq_len=defaults.rope_original_seq_len,
        )
    has_windows = any(window_of(config, layer) for layer in range(config.num_layers))
    if not has_windows or config.full_attention_every > config.num_layers:
        config = replace(config, full_attention_every=0)
    return config if has_windows else replace(config, sliding_window=0)
