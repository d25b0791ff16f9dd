"""Attention: each position averages the values of others, weighted by how well query and key match.

B  sequences                 H  query heads        C  model width
T  positions of queries      K  key/value heads    D  head width
S  positions of keys and values: T, or with a cache all positions so far
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.config import ModelConfig
from llm.model.cache import KeyValueCache
from llm.model.kernels.linear import JoinedLinear, Linear
from llm.model.norms import RMSNorm
from llm.model.positions import apply_rotary, head_dim_of

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""From q (B, H, T, D), k and v (B, K, S, D) and the dropout to the mixed values (B, H, T, D)."""


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, *, mask: Tensor, cap: float = 0.0
) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v over the keys where `mask` (B or 1, 1, T, S) is true.

    This is the definition. llm/model/kernels/attention.py computes the same faster.

    Source: "Attention Is All You Need" (arXiv 1706.03762), section 3.2.
    """
    group = q.shape[1] // k.shape[1]  # query heads that share a key/value head
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # K -> H heads
    # A dot product of D independent numbers has variance D; 1 / sqrt(D) keeps scores near size 1,
    # where softmax still has a gradient. Scaling q costs T * D multiplications, the scores T * S.
    scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, H, T, D) x (B, H, D, S) -> (B, H, T, S)
    if cap:
        scores = soft_cap(scores.float(), cap)  # fp32: bf16 near a cap of 50 has steps of 0.25
    scores = scores.masked_fill_(~mask, -torch.inf)  # exp(-inf) = 0: no weight at all
    probabilities = scores.softmax(dim=-1)  # over the S keys
    if dropout:
        probabilities = F.dropout(probabilities, dropout)
    return probabilities.to(v.dtype) @ v  # (B, H, T, S) x (B, H, S, D) -> (B, H, T, D)


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """Return cap * tanh(x / cap): within (-cap, cap), and close to x where x is small.

    Source: "Gemma 2" (arXiv 2408.00118), section 2.
    """
    return cap * torch.tanh(x / cap)


def window_of(config: ModelConfig, layer: int) -> int:
    """Return how many positions a query of `layer` attends to, itself included; 0: no window.

    Source: "Longformer" (arXiv 2004.05150) for the window, "Gemma 2" (arXiv 2408.00118) for
    sliding and full layers in one model.
    """
    # The last layer of each group is full: sliding layers cost T * window instead of T * T, and
    # one full layer in a few is enough to carry information over any distance.
    is_full = config.full_attention_every and (layer + 1) % config.full_attention_every == 0
    return 0 if is_full else config.sliding_window


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionContext:
    """What all layers share in one forward pass."""

    positions: Tensor
    """(B or 1, T): the position of each token in its sequence."""
    rotary: tuple[Tensor, Tensor] | None
    """Cosine and sine of the rotary angles, (B or 1, 1, T, D/2); None with learned positions."""
    attend: Mapping[int, Attend]
    """By sliding window: `eager_attention` under the mask of that window, or an equal kernel."""


class Attention(nn.Module):
    """Multi-head attention with grouped queries: H / K query heads share a key/value head.

    Source: "Attention Is All You Need" (arXiv 1706.03762), section 3.2.2; one key/value head: "Fast
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
        self.key = Linear(C, K * D, bias=config.has_biases)  # K < H: the cache shrinks by H / K
        self.value = Linear(C, K * D, bias=config.has_biases)
        self.output = Linear(H * D, C, bias=config.has_biases)
        # Kernel: query(x), key(x) and value(x) as one product. It holds no weights of its own.
        self.project = JoinedLinear((self.query, self.key, self.value), config.has_biases)
        # Without a norm, large queries and keys can drive softmax onto one key, where its gradient
        # is zero and training diverges (arXiv 2302.05442, section 2).
        self.query_norm = RMSNorm(D, config.norm_eps) if config.has_qk_norm else nn.Identity()
        self.key_norm = RMSNorm(D, config.norm_eps) if config.has_qk_norm else nn.Identity()

    def forward(self, x: Tensor, context: AttentionContext, cache: KeyValueCache | None) -> Tensor:
        """Mix the positions of (B, T, C), and those in the cache, under this layer's mask."""
        B, T, _ = x.shape
        H, K, D = self.num_heads, self.num_kv_heads, self.head_dim
        qkv = self.project(x).view(B, T, H + 2 * K, D).transpose(1, 2)  # -> (B, H + 2 K, T, D)
        q, k, v = qkv.split((H, K, K), dim=1)  # -> (B, H, T, D) and 2 x (B, K, T, D)
        q, k = self.query_norm(q), self.key_norm(k)  # first the norm, then RoPE, as Qwen3
        if context.rotary is not None:  # values carry no position: only scores depend on it
            q, k = apply_rotary(q, *context.rotary), apply_rotary(k, *context.rotary)
        if cache is not None:  # keys are stored rotated, so old ones are never touched again
            k, v = cache.append(self.layer, k, v, context.positions)  # -> 2 x (B, K, S, D)
        # Kernel: equals eager_attention under the mask of this layer's window.
        mixed = context.attend[self.window](q, k, v, self.dropout * self.training)
        return self.output(mixed.transpose(1, 2).reshape(B, T, H * D))  # heads side by side -> C
