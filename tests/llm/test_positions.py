"""RoPE equals complex rotation and transformers; learned positions count by document."""

import cmath
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from llm.config import ModelConfig
from llm.model.positions import LearnedPositionEmbedding, RotaryEmbedding, apply_rotary
from tests.llm.training_setup import TINY


@pytest.mark.parametrize(
    "shape", [{}, {"rope_scaling": "llama3", "rope_original_seq_len": 16}], ids=["plain", "llama3"]
)
def test_rotation_equals_multiplication_by_a_complex_exponential(shape: dict[str, Any]) -> None:
    config = replace(TINY, **shape)
    half = config.d_model // config.num_heads // 2
    frequencies = [config.rope_theta ** (-channel / half) for channel in range(half)]
    if shape:
        frequencies = llama3_frequencies(config)
    x = torch.randn(2, 3, 20, 2 * half, generator=torch.Generator().manual_seed(0))
    positions = torch.stack([torch.arange(20), torch.arange(20).flip(0)])  # (B, T)
    found = apply_rotary(x, *RotaryEmbedding(config, 32).rotary(positions))
    points = torch.complex(x[..., :half], x[..., half:])
    factors = torch.tensor(
        [[[cmath.exp(1j * int(t) * f) for f in frequencies] for t in row] for row in positions]
    )
    rotated = points * factors[:, None].to(points.dtype)  # (B, 1, T, D/2)
    torch.testing.assert_close(
        found, torch.cat([rotated.real, rotated.imag], dim=-1), rtol=1e-5, atol=1e-5
    )


def llama3_frequencies(config: ModelConfig) -> list[float]:
    """By the conditions of Meta's own code, channel by channel."""
    head_dim = config.head_dim or config.d_model // config.num_heads
    low, high = config.rope_low_frequency_factor, config.rope_high_frequency_factor
    found: list[float] = []
    for channel in range(head_dim // 2):
        frequency = config.rope_theta ** (-2 * channel / head_dim)
        wavelength = 2 * math.pi / frequency
        if wavelength < config.rope_original_seq_len / high:
            found.append(frequency)
        elif wavelength > config.rope_original_seq_len / low:
            found.append(frequency / config.rope_factor)
        else:
            smooth = (config.rope_original_seq_len / wavelength - low) / (high - low)
            found.append((1 - smooth) * frequency / config.rope_factor + smooth * frequency)
    return found


def test_scaled_rotations_equal_those_of_transformers() -> None:
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    transformers = pytest.importorskip("transformers")
    config = replace(TINY, d_model=512, rope_theta=500_000.0, rope_scaling="llama3")
    theirs = modeling.LlamaRotaryEmbedding(
        transformers.LlamaConfig(
            hidden_size=512,
            num_attention_heads=4,
            max_position_embeddings=131_072,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500_000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        )
    )
    positions = torch.arange(200)[None]
    cosine, sine = theirs(torch.zeros(1), positions)
    found = RotaryEmbedding(config, 200).rotary(positions)
    # angles up to 200, so that fp32 leaves 2e-5 of them
    half = cosine.shape[-1] // 2  # theirs repeats the first half
    torch.testing.assert_close(found[0][:, 0], cosine[..., :half], rtol=0, atol=3e-5)
    torch.testing.assert_close(found[1][:, 0], sine[..., :half], rtol=0, atol=3e-5)


def test_learned_positions_count_from_the_start_of_each_document() -> None:
    tokens = torch.zeros(2, 7, dtype=torch.long)
    documents = torch.tensor([[0, 0, 1, 2, 2, 2, 2], [2, 2, 2, 2, 2, 3, 3]])
    embedding = LearnedPositionEmbedding(TINY, 32)
    assert embedding.positions(tokens, None).tolist() == [list(range(7))]
    assert embedding.positions(tokens, documents).tolist() == [
        [0, 1, 0, 0, 1, 2, 3],
        [0, 1, 2, 3, 4, 0, 1],
    ]
