"""Positions: how the model knows the order of what it reads, which attention alone does not see.

B  rows    T  positions in a row    C  model width    D  head width
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.config import ModelConfig
from llm.model.shape import head_dim_of


class LearnedPositions(nn.Module):
    """Add to each token's vector a learned one that stands for its place in the row.

    A place means the same wherever a document stands: where attention is kept within documents,
    places are counted from each document's first token, as if it stood in a row of its own.

    Source: "Language Models are Unsupervised Multitask Learners" (GPT-2); "Convolutional Sequence
    to Sequence Learning" (arXiv 1705.03122), section 3.1.
    """

    def __init__(self, config: ModelConfig, seq_len: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(seq_len, config.d_model).normal_())

    def places(self, tokens: Tensor, document_ids: Tensor | None) -> Tensor:
        """Return the place of each token of (B, T) in its row or its document: (1 or B, T)."""
        places = torch.arange(tokens.shape[1], device=tokens.device)[None]  # (1, T)
        if document_ids is None:
            return places
        is_first = document_ids[:, 1:] != document_ids[:, :-1]  # (B, T - 1)
        starts = F.pad(is_first, (1, 0)) * places  # (B, T): its own place, or 0
        return places - starts.cummax(dim=1).values

    def add(self, x: Tensor, places: Tensor) -> Tensor:
        """Add the vectors of `places` to the embedded tokens (B, T, C)."""
        return x + F.embedding(places, self.weight)  # (1 or B, T) -> (1 or B, T, C)

    def rotation(self, places: Tensor) -> tuple[Tensor, ...]:
        """Return nothing: queries and keys stay as they are."""
        return ()

    @staticmethod
    def turn(x: Tensor) -> Tensor:
        """Return the queries or keys as they are."""
        return x


class RotaryPositions(nn.Module):
    """Rotate queries and keys by an angle that grows with the position.

    Channel d and channel d + D/2 of a head are one point in the plane, turned by position /
    theta^(2d/D) radians. The dot product of a query and a key then depends on their distance alone,
    so where in a row a document begins does not matter.

    Source: "RoFormer" (arXiv 2104.09864); halves instead of neighbors paired, as in transformers.
    """

    cosine: Tensor
    sine: Tensor

    def __init__(self, config: ModelConfig, seq_len: int) -> None:
        super().__init__()
        frequencies = SCALINGS[config.rope_scaling](_frequencies(config), config)  # (D/2,)
        angles = torch.arange(seq_len, dtype=torch.float32)[:, None] * frequencies  # (T, D/2)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def places(self, tokens: Tensor, document_ids: Tensor | None) -> Tensor:
        """Return the place of each token of (B, T) in its row: (1, T)."""
        return torch.arange(tokens.shape[1], device=tokens.device)[None]

    def add(self, x: Tensor, places: Tensor) -> Tensor:
        """Return the embedded tokens as they are: positions show in attention alone."""
        return x

    def rotation(self, places: Tensor) -> tuple[Tensor, ...]:
        """Return cosine and sine for `places` (B or 1, T), each (B or 1, 1, T, D/2)."""
        return self.cosine[places].unsqueeze(1), self.sine[places].unsqueeze(1)

    @staticmethod
    def turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Turn each pair of channels of (B, heads, T, D) by its position's angle."""
        cosine, sine = cosine.to(x.dtype), sine.to(x.dtype)  # (B or 1, 1, T, D/2)
        first, second = x.chunk(2, dim=-1)  # (B, heads, T, D) -> 2 x (B, heads, T, D/2)
        turned = (first * cosine - second * sine, second * cosine + first * sine)
        return torch.cat(turned, dim=-1)  # 2 x (B, heads, T, D/2) -> (B, heads, T, D)


def _frequencies(config: ModelConfig) -> Tensor:
    """Return by how many radians a position turns each pair of channels, (D/2,)."""
    head_dim = head_dim_of(config)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / config.rope_theta**exponents


def _stretch_long_waves(frequencies: Tensor, config: ModelConfig) -> Tensor:
    """Divide low frequencies by `rope_factor`, leave high ones, and blend those between.

    Wavelengths that were seen whole in the original context mean nearness and stay; longer ones
    would reach angles never seen, and are stretched so that they do not.

    Source: "The Llama 3 Herd of Models" (arXiv 2407.21783); the blend as Meta published it with
    Llama 3.1, after "YaRN" (arXiv 2309.00071), section 3.2.
    """
    low, high = config.rope_low_frequency_factor, config.rope_high_frequency_factor
    turns = config.rope_original_seq_len * frequencies / (2 * math.pi)  # in the original context
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)  # 0: stretch whole, 1: leave alone
    return kept * frequencies + (1 - kept) * frequencies / config.rope_factor


def _leave(frequencies: Tensor, config: ModelConfig) -> Tensor:
    return frequencies


SCALINGS = {"none": _leave, "llama3": _stretch_long_waves}
POSITIONS: dict[str, type[LearnedPositions] | type[RotaryPositions]] = {
    "learned": LearnedPositions,
    "rope": RotaryPositions,
}
