"""Attention: each position gathers from others, by how well its query agrees with their keys.

B  rows                  H  query heads         C  model width
T  positions in a row    K  key/value heads     D  head width
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llm.config import ModelConfig
from llm.model.attention_mask import Reach
from llm.model.cache import KeyValueCache
from llm.model.linear import Linear, linear
from llm.model.norms import RMSNorm
from llm.model.positions import POSITIONS
from llm.model.shape import head_dim_of, window_of


class Joined:
    """Several linear layers of one input as one: one product, not several."""

    def __init__(self, parts: Sequence[nn.Linear], has_biases: bool) -> None:
        self.parts, self._has_biases = tuple(parts), has_biases

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """Return the weights, and the biases if there are any, one part's after another's."""
        bias = torch.cat([part.bias for part in self.parts]) if self._has_biases else None
        return torch.cat([part.weight for part in self.parts]), bias

    def __call__(self, x: Tensor) -> Tensor:
        """Return (..., in) -> (..., sum of out)."""
        return linear(x, *self.weight_and_bias())


class Attention(nn.Module):
    """Let each position gather from those in its reach.

    Grouped: num_heads / num_kv_heads query heads share one key/value head, so the cache is that
    much smaller. Queries and keys may be normalized, which keeps scores from growing until softmax
    picks one position and learns no more; they are normalized first, then rotated.

    Source: "Attention Is All You Need" (arXiv 1706.03762), section 3.2; one key/value head: "Fast
    Transformer Decoding" (arXiv 1911.02150); groups: "GQA" (arXiv 2305.13245); normalized queries
    and keys: "Scaling Vision Transformers to 22 Billion Parameters" (arXiv 2302.05442), per head as
    in Qwen3 (arXiv 2505.09388).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        C, H, K, D = config.d_model, config.num_heads, config.num_kv_heads, head_dim_of(config)
        self.layer, self.window = layer, window_of(config, layer)
        self.num_heads, self.num_kv_heads, self.head_dim = H, K, D
        self.dropout = config.dropout
        self.query = Linear(C, H * D, bias=config.has_biases)
        self.key = Linear(C, K * D, bias=config.has_biases)
        self.value = Linear(C, K * D, bias=config.has_biases)
        self.project = Joined((self.query, self.key, self.value), config.has_biases)
        self.output = Linear(H * D, C, bias=config.has_biases)
        self.query_norm = RMSNorm(D, config.norm_eps) if config.has_qk_norm else nn.Identity()
        self.key_norm = RMSNorm(D, config.norm_eps) if config.has_qk_norm else nn.Identity()
        self.turn = POSITIONS[config.positions].turn

    def forward(self, x: Tensor, reach: Reach, cache: KeyValueCache | None) -> Tensor:
        """Mix positions of (B, T, C) within `reach`; with a cache, also with the positions it
        holds.
        """
        B, T, _ = x.shape
        H, K, D = self.num_heads, self.num_kv_heads, self.head_dim
        qkv = self.project(x).view(B, T, H + 2 * K, D).transpose(1, 2)
        q, k, v = qkv.split((H, K, K), dim=1)  # (B, H + 2 K, T, D) -> (B, H, T, D), 2 (B, K, T, D)
        q = self.turn(self.query_norm(q), *reach.rotation)
        k = self.turn(self.key_norm(k), *reach.rotation)
        if cache is not None:
            k, v = cache.append(self.layer, k, v, reach.places)  # (B, K, T, D) -> (B, K, S, D)
        mixed = reach.attend[self.window](q, k, v, self.dropout * self.training)
        return self.output(mixed.transpose(1, 2).reshape(B, T, H * D))  # -> (B, T, C)
