"""Attention kernels, each equal to `eager_attention`, and the choice of the fastest.

B  sequences      K  key/value heads    T  positions of queries
H  query heads    D  head width         S  positions of keys
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from llm.config import ModelConfig
from llm.model.attention import Attend, eager_attention, soft_cap, window_of
from llm.model.attention_mask import MaskRule, boolean_mask, cache_mask, mask_rule
from llm.model.positions import head_dim_of

# On a CPU, document by document took 0.2 to 0.7 of the time of one pass with a mask in sequences of
# 256 and 1024 positions with 4 to 10 documents, but 2 to 4 times as long at 64 (docs/log.md).
MIN_VARLEN_POSITIONS = 256

# On a CPU, forward and backward of eager attention took 0.2 of SDPA's time in bfloat16 for
# sequences of 64 positions and 0.6 for 256; in fp32 0.7 for 64 and 1.3 for 256; for 1024 more in
# both (docs/log.md).
MAX_EAGER_POSITIONS = {torch.bfloat16: 256, torch.float32: 128}

# Devices where compiled flex_attention is right (see Flex), and its narrowest heads: Triton's `dot`
# takes no fewer than 16 columns (torch/_inductor/kernel/flex/flex_attention.py).
FLEX_DEVICES = ("cuda",)
MIN_FLEX_HEAD_DIM = 16


class AttentionKernels:
    """Chooses, for each forward pass, the kernel of each sliding window."""

    def __init__(self, config: ModelConfig) -> None:
        # layers with the same window share one mask
        self._windows = {window_of(config, layer) for layer in range(config.num_layers)}
        self._is_causal, self._soft_cap = config.is_causal, config.attention_soft_cap
        # flex_attention has no dropout
        self._fits_flex = not config.dropout and head_dim_of(config) >= MIN_FLEX_HEAD_DIM

    def for_sequences(self, tokens: Tensor, document_ids: Tensor | None) -> dict[int, Attend]:
        """Return, by window, the kernel for whole sequences (B, T), within documents if given."""
        return {window: self._choose(window, tokens, document_ids) for window in self._windows}

    def for_cache(self, positions: Tensor, num_cached: int, is_even: bool) -> dict[int, Attend]:
        """Return, by window, the kernel for queries at `positions` (B, T) over a cache.

        `is_even`: all sequences have the same length.
        """
        # one query at the end of even sequences attends to everything: no mask to make or read
        is_unmasked = is_even and positions.shape[1] == 1 and not self._soft_cap
        return {
            window: SDPA()
            if is_unmasked and (not window or window >= num_cached)
            else self._masked(cache_mask(window, positions, num_cached))
            for window in self._windows
        }

    def _choose(self, window: int, tokens: Tensor, document_ids: Tensor | None) -> Attend:
        T, device = tokens.shape[1], tokens.device
        window = window if window < T else 0  # a window as long as the sequence is none
        rule = mask_rule(self._is_causal, window, document_ids, device)
        if not (window or self._soft_cap or document_ids is not None):
            kernel = SDPA(is_causal=self._is_causal)
            if device.type == "cpu" and max(MAX_EAGER_POSITIONS.values()) >= T:
                return ShortOnCPU(kernel, boolean_mask(rule, tokens, None))
            return kernel
        if device.type in FLEX_DEVICES and self._fits_flex:
            # without documents one block mask serves all sequences
            return Flex(rule, 1 if document_ids is None else len(tokens), T, device, self._soft_cap)
        if (
            document_ids is not None
            # document lengths are values of a tensor: a break in a compiled graph, a wait on a GPU
            and not (window or self._soft_cap or torch.compiler.is_compiling())
            and device.type == "cpu"
            and T >= MIN_VARLEN_POSITIONS
        ):
            return Varlen(document_ids, self._is_causal)
        return self._masked(boolean_mask(rule, tokens, document_ids))

    def _masked(self, mask: Tensor) -> Attend:
        if self._soft_cap:  # SDPA has no cap
            return partial(eager_attention, mask=mask, cap=self._soft_cap)
        kernel = SDPA(mask)
        return ShortOnCPU(kernel, mask) if mask.device.type == "cpu" else kernel


class SDPA:
    """torch's scaled_dot_product_attention: causal, unmasked, or with a mask (B or 1, 1, T, S).

    Source: "FlashAttention" (arXiv 2205.14135): the (T, S) scores are never all in memory.
    """

    def __init__(self, mask: Tensor | None = None, *, is_causal: bool = False) -> None:
        self.mask, self.is_causal = mask, is_causal

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=self.mask,
            dropout_p=dropout,
            is_causal=self.is_causal,  # the kernel skips the upper triangle: half the work
            enable_gqa=q.shape[1] != k.shape[1],  # k and v are not copied for each query head
        )


class Varlen:
    """Attention within documents as one SDPA call per document: no work across documents.

    The positions of a document are contiguous.
    """

    def __init__(self, document_ids: Tensor, is_causal: bool) -> None:
        B, T = document_ids.shape
        is_first = torch.ones(B, T, dtype=torch.bool)  # every sequence starts a new segment
        is_first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        starts = torch.cat([is_first.flatten().nonzero().flatten(), torch.tensor([B * T])])
        self._lengths: list[int] = starts.diff().tolist()
        self._sdpa = SDPA(is_causal=is_causal)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        B, H, T, D = q.shape
        documents = zip(self._split(q), self._split(k), self._split(v), strict=True)
        mixed = [self._sdpa(*qkv, dropout) for qkv in documents]
        return torch.cat(mixed, dim=2).view(H, B, T, D).transpose(0, 1)  # -> (B, H, T, D)

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Concatenate sequences, (B, heads, T, D) -> (1, heads, B * T, D); split by document."""
        B, heads, T, D = x.shape
        return x.transpose(0, 1).reshape(1, heads, B * T, D).split(self._lengths, dim=2)


class ShortOnCPU:
    """Eager attention for sequences up to MAX_EAGER_POSITIONS, else `kernel`.

    Short scores fit the CPU's cache, where SDPA saves nothing. Beside `eager_attention` it adds the
    mask as a bias of 0 and -inf, which needs no pass of its own in the backward pass.
    """

    def __init__(self, kernel: Attend, mask: Tensor) -> None:
        self._kernel, self._mask = kernel, mask
        self._bias: dict[torch.dtype, Tensor] = {}  # made once for all layers, by their dtype

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        if k.shape[2] > MAX_EAGER_POSITIONS.get(q.dtype, 0):
            return self._kernel(q, k, v, dropout)
        group = q.shape[1] // k.shape[1]
        if group > 1:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # K -> H
        scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, H, T, D) x (B, H, D, S) -> (B, H, T, S)
        if scores.dtype not in self._bias:
            # score + 0 is the score, score - inf is -inf
            zeros = torch.zeros(self._mask.shape, dtype=scores.dtype, device=scores.device)
            self._bias[scores.dtype] = zeros.masked_fill_(~self._mask, -torch.inf)
        probabilities = scores.add_(self._bias[scores.dtype]).softmax(dim=-1)
        probabilities = F.dropout(probabilities, dropout) if dropout else probabilities
        return probabilities.to(v.dtype) @ v  # (B, H, T, S) x (B, H, S, D) -> (B, H, T, D)


class Flex:
    """FlexAttention: the rule compiled into one kernel that skips blocks without allowed pairs.

    For GPUs: compiled for a CPU, torch 2.13 gave wrong values inside a larger graph (docs/log.md).

    Source: "Flex Attention" (arXiv 2412.05496).
    """

    def __init__(
        self,
        rule: MaskRule,
        num_sequences: int,
        num_positions: int,
        device: torch.device,
        cap: float,
    ) -> None:
        self._mask = create_block_mask(
            rule, num_sequences, None, num_positions, num_positions, device=device
        )
        self._score_mod = _capped_scores(cap) if cap else None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        assert not dropout, "AttentionKernels chooses another kernel where there is dropout"
        # inside a compiled model it is compiled with the rest
        attend = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
        return attend(
            q,
            k,
            v,
            block_mask=self._mask,
            score_mod=self._score_mod,
            enable_gqa=q.shape[1] != k.shape[1],
        )


def _capped_scores(cap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, sequence: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return soft_cap(score, cap)

    return capped


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)  # uncompiled it holds all scores in memory
