"""The language model: a decoder-only transformer in the Llama layout.

Read it from top to bottom; each part is used by the next. Shapes:

    B  rows in a micro-batch     H  query heads               F  feed-forward width
    T  positions in a row        K  key/value heads           V  vocabulary
    C  model width (d_model)     D  head width, C / H         S  positions a query may look at

The model reads tokens and scores, at every position, each token of the vocabulary as the next one:

    tokens (B, T) -> embedding (B, T, C) -> num_layers blocks (B, T, C) -> norm -> logits (B, T, V)

Source: "Attention Is All You Need" (arXiv 1706.03762) for the whole; "LLaMA" (arXiv 2302.13971) for
this choice of parts, each of which names its own paper below.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.config import ModelConfig
from llm.errors import ConfigError, DataError
from llm.model.cache import KeyValueCache

VOCABULARY_MULTIPLE = 64  # matrix sizes that are multiples of 64 fill the units of a GPU whole
INITIAL_STD = 0.02  # GPT-2's; see Transformer.initialize


class RMSNorm(nn.Module):
    """Scale each position's vector to a root mean square of 1, then each channel by a learned
    weight.

    Source: "Root Mean Square Layer Normalization" (arXiv 1910.07467): LayerNorm without centering.
    """

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (..., C) over its last axis."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class RotaryPositions(nn.Module):
    """Tell attention where things are by rotating queries and keys by an angle that grows with
    position.

    Channel d and channel d + D/2 of a head are one point in the plane, turned by position /
    theta^(2d/D) radians. The dot product of a query and a key then depends on their distance alone.

    Source: "RoFormer" (arXiv 2104.09864); halves instead of neighbors paired, as in transformers.
    """

    cosine: Tensor
    sine: Tensor

    def __init__(self, head_dim: int, seq_len: int, theta: float) -> None:
        super().__init__()
        wavelength = theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angles = torch.arange(seq_len, dtype=torch.float32)[:, None] / wavelength  # (T, D/2)
        angles = torch.cat((angles, angles), dim=-1)  # (T, D/2) -> (T, D): both halves turn alike
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine for `positions` (B or 1, T), shaped (B or 1, 1, T, D) to fit
        heads.
        """
        return self.cosine[positions].unsqueeze(1), self.sine[positions].unsqueeze(1)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn each pair of channels of (B, heads, T, D) by its position's angle."""
    first, second = x.chunk(2, dim=-1)  # (B, heads, T, D) -> 2 x (B, heads, T, D/2)
    turned = torch.cat((-second, first), dim=-1)  # a quarter turn of every pair
    return (x * cosine + turned * sine).to(x.dtype)


class Attention(nn.Module):
    """Let each position gather from itself and the positions before it, by how well query and key
    agree.

    Grouped: num_heads / num_kv_heads query heads share one key/value head, so the cache is that
    much smaller.

    Source: "Attention Is All You Need", section 3.2; "GQA" (arXiv 2305.13245).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.d_model // config.num_heads
        self.query = nn.Linear(config.d_model, self.num_heads * self.head_dim, bias=False)
        self.key = nn.Linear(config.d_model, self.num_kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(config.d_model, self.num_kv_heads * self.head_dim, bias=False)
        self.output = nn.Linear(self.num_heads * self.head_dim, config.d_model, bias=False)

    def forward(self, x: Tensor, reach: "Reach", cache: KeyValueCache | None) -> Tensor:
        """Mix positions of (B, T, C) within `reach`; with a cache, also with the positions it
        holds.
        """
        B, T, C = x.shape
        H, K, D = self.num_heads, self.num_kv_heads, self.head_dim
        q = self.query(x).view(B, T, H, D).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)
        k = self.key(x).view(B, T, K, D).transpose(1, 2)  # (B, T, C) -> (B, K, T, D)
        v = self.value(x).view(B, T, K, D).transpose(1, 2)  # (B, T, C) -> (B, K, T, D)
        q, k = rotate(q, reach.cosine, reach.sine), rotate(k, reach.cosine, reach.sine)
        if cache is not None:
            k, v = cache.append(self.layer, k, v, reach.positions)  # (B, K, T, D) -> (B, K, S, D)
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=reach.mask, is_causal=reach.mask is None, enable_gqa=H != K
        )  # softmax(q k^T / sqrt(D)) v, without the (T, S) scores ever standing in memory
        return self.output(mixed.transpose(1, 2).reshape(B, T, C))  # (B, H, T, D) -> (B, T, C)


class FeedForward(nn.Module):
    """Think about each position alone: widen, gate, narrow.

    Source: "GLU Variants Improve Transformer" (arXiv 2002.05202): SwiGLU, where one half of the
    widened vector decides, through SiLU, how much of the other passes.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position of (B, T, C)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))  # (B, T, C) -> (B, T, F) -> (B, T, C)


class Block(nn.Module):
    """Attention, then feed-forward, each reading a normalized copy of the stream and adding to it.

    Source: normalization before instead of after, "On Layer Normalization in the Transformer
    Architecture" (arXiv 2002.04745): the stream itself is never rescaled, so deep models train.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, reach: "Reach", cache: KeyValueCache | None) -> Tensor:
        """Add what this block finds to the stream (B, T, C)."""
        x = x + self.attention(self.attention_norm(x), reach, cache)
        return x + self.feed_forward(self.feed_forward_norm(x))


@dataclass(frozen=True, kw_only=True, slots=True)
class Reach:
    """Where the tokens of one forward pass stand and what each may look at: the same for all
    layers.
    """

    positions: Tensor
    """(B or 1, T): the place of each token in its row."""
    cosine: Tensor
    """(B or 1, 1, T, D): rotation by position."""
    sine: Tensor
    """(B or 1, 1, T, D): rotation by position."""
    mask: Tensor | None
    """(B, 1, T, S), true where a query may look at a key. None: at itself and all before it."""


class Transformer(nn.Module):
    """The whole model: embed, run the blocks, normalize, score every token of the vocabulary."""

    def __init__(self, config: ModelConfig, vocab_size: int, seq_len: int) -> None:
        """Make the layers with torch's default weights; `initialize` or `load_model` gives the real
        ones.

        Raises:
            ConfigError: the heads do not divide the width, or each other.
        """
        super().__init__()
        _check(config)
        self.config, self.vocab_size, self.seq_len = config, vocab_size, seq_len
        num_embeddings = -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        self.embedding = nn.Embedding(num_embeddings, config.d_model)
        self.rotary = RotaryPositions(
            config.d_model // config.num_heads, seq_len, config.rope_theta
        )
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = nn.Linear(config.d_model, num_embeddings, bias=False)
        if config.tie_embeddings:  # "Using the Output Embedding" (arXiv 1608.05859)
            self.head.weight = self.embedding.weight

    def forward(
        self,
        tokens: Tensor,
        document_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Score the next token at every position: (B, T) -> (B, T, V).

        With `document_ids` (B, T) a token looks at its own document only. With a cache, `tokens`
        continue the rows it holds.

        Raises:
            DataError: more positions than the model's context.
        """
        return self.score(self.read(tokens, document_ids, cache))

    def read(
        self,
        tokens: Tensor,
        document_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Return what the model makes of each position, before scoring: (B, T) -> (B, T, C)."""
        assert document_ids is None or cache is None, "a row in the cache is one document"
        reach = self._reach(tokens, document_ids, cache)
        x = self.embedding(tokens)  # (B, T) -> (B, T, C)
        for block in self.blocks:
            x = block(x, reach, cache)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.norm(x)

    def score(self, x: Tensor) -> Tensor:
        """Score every token of the vocabulary: (..., C) -> (..., V). The padding stays behind."""
        logits = self.head(x)
        return logits if logits.shape[-1] == self.vocab_size else logits[..., : self.vocab_size]

    def initialize(self, generator: torch.Generator) -> None:
        """Draw first weights: normal with deviation 0.02; what adds to the stream, less with depth.

        2 * num_layers parts add to the stream, so each is scaled by 1 / sqrt(2 * num_layers) and
        the sum keeps its variance whatever the depth. Padding rows of the vocabulary start and stay
        at zero.

        Source: "Language Models are Unsupervised Multitask Learners" (GPT-2), section 2.3.
        """
        adding_std = INITIAL_STD / math.sqrt(2 * self.config.num_layers)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 1:
                    parameter.fill_(1.0)
                    continue
                is_adding = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
                parameter.normal_(
                    0.0, adding_std if is_adding else INITIAL_STD, generator=generator
                )
            self.embedding.weight[self.vocab_size :] = 0.0
            self.head.weight[self.vocab_size :] = 0.0

    def num_parameters(self) -> int:
        """Count the weights, tied ones once and padding of the vocabulary not at all."""
        padding = self.embedding.num_embeddings - self.vocab_size
        num_matrices = 1 if self.config.tie_embeddings else 2
        total = sum(parameter.numel() for parameter in self.parameters())
        return total - num_matrices * padding * self.config.d_model

    def _reach(
        self, tokens: Tensor, document_ids: Tensor | None, cache: KeyValueCache | None
    ) -> Reach:
        T = tokens.shape[1]
        start = 0 if cache is None else cache.num_columns
        if start + T > self.seq_len:
            raise DataError(
                f"found {start + T} tokens in a row, expected at most the model's context"
                f" of {self.seq_len}"
            )
        if cache is None:
            positions = torch.arange(T, device=tokens.device)[None]  # (1, T)
        else:
            positions = cache.positions(T)  # (B, T)
        mask = None
        if document_ids is not None:
            is_same = document_ids[:, :, None] == document_ids[:, None, :]  # (B, T) -> (B, T, T)
            mask = is_same.tril().unsqueeze(1)  # (B, T, T) -> (B, 1, T, T)
        if cache is not None:
            columns = torch.arange(start + T, device=tokens.device)
            mask = (columns <= positions[:, :, None]).unsqueeze(1)  # (B, T) -> (B, 1, T, S)
        cosine, sine = self.rotary(positions)
        return Reach(positions=positions, cosine=cosine, sine=sine, mask=mask)


def _check(config: ModelConfig) -> None:
    if config.d_model % config.num_heads or (config.d_model // config.num_heads) % 2:
        raise ConfigError(
            f"model.d_model: found {config.d_model}, expected an even multiple of model.num_heads ="
            f" {config.num_heads}"
        )
    if config.num_heads % config.num_kv_heads:
        raise ConfigError(
            f"model.num_kv_heads: found {config.num_kv_heads}, expected a divisor of"
            f" model.num_heads = {config.num_heads}"
        )
