"""Position encodings: rotary embedding (RoPE), or a learned position embedding as in GPT-2.

    B  sequences    T  positions    C  model width    D  head width

Attention alone treats its keys as a set: without one of these, word order would be invisible.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.config import ModelConfig


def head_dim_of(config: ModelConfig) -> int:
    """Return the width D of a head."""
    return config.head_dim or config.d_model // config.num_heads


class RotaryEmbedding(nn.Module):
    """RoPE: rotate queries and keys by angles proportional to their position.

    Channels d and d + D/2 of a head form a point in the plane, rotated by position /
    theta^(2d/D) radians. A dot product of two rotated vectors depends on the difference of their
    positions alone, so the offset at which a document starts does not matter.

    Source: "RoFormer" (arXiv 2104.09864). Channels are paired in halves, as in transformers; the
    paper pairs neighbors, which is the same up to a permutation of channels.
    """

    cosine: Tensor
    sine: Tensor

    def __init__(self, config: ModelConfig, seq_len: int) -> None:
        super().__init__()
        frequencies = ROPE_SCALINGS[config.rope_scaling](_frequencies(config), config)  # (D/2,)
        # fp32 whatever the model computes in: bf16 has no odd number above 256
        angles = torch.arange(seq_len, dtype=torch.float32)[:, None] * frequencies  # (T, D/2)
        # not persistent: they follow from the config, and checkpoints stay free of them
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def positions(self, tokens: Tensor, document_ids: Tensor | None) -> Tensor:
        """Return the position of each token of (B, T) in its sequence: (1, T)."""
        return torch.arange(tokens.shape[1], device=tokens.device)[None]

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return the token embeddings unchanged: positions enter in attention alone."""
        return x

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine at `positions` (B or 1, T), each (B or 1, 1, T, D/2)."""
        return self.cosine[positions].unsqueeze(1), self.sine[positions].unsqueeze(1)


def apply_rotary(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate each pair of channels of (B, heads, T, D) by the angle of its position."""
    cosine, sine = cosine.to(x.dtype), sine.to(x.dtype)  # (B or 1, 1, T, D/2)
    first, second = x.chunk(2, dim=-1)  # (B, heads, T, D) -> 2 x (B, heads, T, D/2)
    # the rotation matrix [[cos, -sin], [sin, cos]] for each pair
    rotated = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.cat(rotated, dim=-1)  # 2 x (B, heads, T, D/2) -> (B, heads, T, D)


class LearnedPositionEmbedding(nn.Module):
    """Add a learned vector for each position to the token embeddings.

    Source: "Language Models are Unsupervised Multitask Learners" (GPT-2); "Convolutional Sequence
    to Sequence Learning" (arXiv 1705.03122), section 3.1.
    """

    def __init__(self, config: ModelConfig, seq_len: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(seq_len, config.d_model).normal_())

    def positions(self, tokens: Tensor, document_ids: Tensor | None) -> Tensor:
        """Return the position of each token of (B, T) in its sequence, or document: (1 or B, T)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]  # (1, T)
        if document_ids is None:
            return positions
        # With a document mask each document counts from 0, as it would in a sequence of its own;
        # otherwise its embeddings would depend on what happens to be packed before it.
        is_first = document_ids[:, 1:] != document_ids[:, :-1]  # (B, T - 1)
        starts = F.pad(is_first, (1, 0)) * positions  # (B, T): at a first token its position, or 0
        return positions - starts.cummax(dim=1).values

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """Add the vectors of `positions` to the token embeddings (B, T, C)."""
        return x + F.embedding(positions, self.weight)  # (1 or B, T) -> (1 or B, T, C)

    def rotary(self, positions: Tensor) -> None:
        """Return None: queries and keys are not rotated."""


def _frequencies(config: ModelConfig) -> Tensor:
    """Return the angle in radians by which each pair of channels turns per position, (D/2,).

    Geometric from 1 down to almost 1 / theta: the fast pairs tell neighbors apart, the slow ones
    far positions. At theta = 10,000 and D = 64 the slowest pair turns once in 47,000 positions.
    """
    head_dim = head_dim_of(config)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / config.rope_theta**exponents


def _scale_llama3(frequencies: Tensor, config: ModelConfig) -> Tensor:
    """Divide low frequencies by `rope_factor`, keep high ones, and interpolate between.

    Source: "The Llama 3 Herd of Models" (arXiv 2407.21783); the interpolation as Meta published it
    with Llama 3.1, after "YaRN" (arXiv 2309.00071), section 3.2.
    """
    low, high = config.rope_low_frequency_factor, config.rope_high_frequency_factor
    # Pairs that turned many times in the original context encode nearness and were seen at every
    # angle; the others would meet angles that training never showed, and are slowed down.
    num_turns = config.rope_original_seq_len * frequencies / (2 * math.pi)
    kept = ((num_turns - low) / (high - low)).clamp(0.0, 1.0)  # 0: divide, 1: keep
    return kept * frequencies + (1 - kept) * frequencies / config.rope_factor


def _unscaled(frequencies: Tensor, config: ModelConfig) -> Tensor:
    return frequencies


ROPE_SCALINGS = {"none": _unscaled, "llama3": _scale_llama3}
POSITIONS: dict[str, type[LearnedPositionEmbedding] | type[RotaryEmbedding]] = {
    "learned": LearnedPositionEmbedding,
    "rope": RotaryEmbedding,
}
