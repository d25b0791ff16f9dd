"""Who may look at whom, and the fastest way to compute attention where that is so.

    B  rows         K  key/value heads   T  positions of the queries (in a cache, the last of S)
    H  query heads  D  head width        S  positions a query may look at

All of it is said once, by a rule from the places of a query and a key to yes or no; a mask of
booleans, a block mask on a GPU and a key/value cache are made from that rule. Where the rule is so
simple that a kernel knows it (everything before; everything), there is no mask at all.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache as remember

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from llm.config import ModelConfig
from llm.model.shape import head_dim_of, window_of

# On a CPU, attending document by document took 0.2 to 0.7 of the time of one pass with a mask in
# rows of 256 and 1024 positions with 4 to 10 documents, but 2 to 4 times as long in rows of 64
# (docs/log.md).
SEGMENTED_POSITIONS = 256

# On a CPU, forward and backward through all scores written out took 0.2 of the kernel's time in
# bfloat16 for rows of 64 positions and 0.6 for 256; in fp32 0.7 for 64 and 1.3 for 256; for 1024
# more in both (docs/log.md).
SHORT_POSITIONS = {torch.bfloat16: 256, torch.float32: 128}

# Where flex_attention is compiled to a kernel that is right (see Flex), and from which head width D
# on: the matrix units that Triton's `dot` stands for take no fewer than 16 columns, and torch
# refuses narrower heads (torch/_inductor/kernel/flex/flex_attention.py).
FLEX_DEVICES = ("cuda",)
MIN_FLEX_HEAD_DIM = 16

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""From q (B, H, T, D), k and v (B, K, S, D) and the share to drop to what is mixed, (B, H, T, D).
"""

Rule = Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]
"""From row, head (no rule looks at it), a query's place and a key's place to true where it may
look; on whole tensors of places, or inside flex_attention on one of each.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reach:
    """Where the tokens of one forward pass stand and how each layer attends to them."""

    places: Tensor
    """(B or 1, T): the place of each token in its row."""
    rotation: tuple[Tensor, ...]
    """Cosine and sine by place, (B or 1, 1, T, D) each; nothing where positions are learned."""
    attend: Mapping[int, Attend]
    """By the layer's window: how to attend."""


class Sight:
    """Chooses, for each forward pass, how the layers attend."""

    def __init__(self, config: ModelConfig) -> None:
        self._windows = {window_of(config, layer) for layer in range(config.num_layers)}
        self._is_causal, self._soft_cap = config.is_causal, config.attention_soft_cap
        # flex_attention has no dropout
        self._is_for_flex = not config.dropout and head_dim_of(config) >= MIN_FLEX_HEAD_DIM

    def over_rows(self, tokens: Tensor, document_ids: Tensor | None) -> dict[int, Attend]:
        """Return, by window, how whole rows (B, T) attend, within documents if these are given."""
        return {window: self._over_rows(window, tokens, document_ids) for window in self._windows}

    def over_cache(self, places: Tensor, num_columns: int, is_even: bool) -> dict[int, Attend]:
        """Return, by window, how queries at `places` (B, T) attend to `num_columns` in a cache.

        `is_even`: all rows are of the same length, so that a single query sees all of its row.
        """
        sees_all = is_even and places.shape[1] == 1 and not self._soft_cap
        return {
            window: Unmasked(is_causal=False)
            if sees_all and (not window or window >= num_columns)
            else self._over_cache(window, places, num_columns)
            for window in self._windows
        }

    def _over_cache(self, window: int, places: Tensor, num_columns: int) -> Attend:
        columns = torch.arange(num_columns, device=places.device)
        rows = torch.zeros((), dtype=torch.long, device=places.device)  # documents are not kept
        rule = make_rule(True, window, None, places.device)
        return self._masked(rule(rows, None, places[:, :, None], columns))

    def _over_rows(self, window: int, tokens: Tensor, document_ids: Tensor | None) -> Attend:
        T, device = tokens.shape[1], tokens.device
        window = window if window < T else 0  # which sees all there is
        rule = make_rule(self._is_causal, window, document_ids, device)
        if not (window or self._soft_cap or document_ids is not None):
            kernel = Unmasked(self._is_causal)
            if device.type == "cpu" and max(SHORT_POSITIONS.values()) >= T:
                return Short(kernel, boolean_mask(rule, tokens, None).unsqueeze(1))
            return kernel
        if device.type in FLEX_DEVICES and self._is_for_flex:
            return Flex(rule, 1 if document_ids is None else len(tokens), T, device, self._soft_cap)
        if (
            document_ids is not None
            and not (window or self._soft_cap or torch.compiler.is_compiling())
            and device.type == "cpu"
            and T >= SEGMENTED_POSITIONS
        ):
            return Segmented(document_ids, self._is_causal)
        return self._masked(boolean_mask(rule, tokens, document_ids))

    def _masked(self, mask: Tensor) -> Attend:
        mask = mask.unsqueeze(1)  # (B or 1, T, S) -> (B or 1, 1, T, S)
        if self._soft_cap:
            return Written(mask, self._soft_cap)
        return Short(Masked(mask), mask) if mask.device.type == "cpu" else Masked(mask)


def make_rule(
    is_causal: bool,
    window: int,
    document_ids: Tensor | None,
    device: torch.device | str = "cpu",
) -> Rule:
    """Say who may look at whom: backward only, no further than the window, in one's own document.

    A window of 0 is none. Of `document_ids` (B, T) two positions are compared for equality.
    """
    # a tensor, since torch compiles plain numbers that differ by layer into what CPUs fail on
    limit = torch.tensor(window, device=device) if window else None

    def may_look(row: Tensor, head: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        distance = query - key
        allowed = distance >= 0 if is_causal else distance == distance
        if limit is not None:
            allowed = allowed & (distance < limit) & (distance > -limit)
        if document_ids is not None:
            allowed = allowed & (document_ids[row, query] == document_ids[row, key])
        return allowed

    return may_look


def boolean_mask(rule: Rule, tokens: Tensor, document_ids: Tensor | None) -> Tensor:
    """Write a rule out for whole rows: true where a query may look at a key, (B or 1, T, T)."""
    places = torch.arange(tokens.shape[1], device=tokens.device)
    num_rows = 1 if document_ids is None else len(tokens)
    rows = torch.arange(num_rows, device=tokens.device)[:, None, None]
    return rule(rows, None, places[:, None], places).expand(num_rows, -1, -1)


class Unmasked:
    """Attend to all before, or to all: softmax(q k^T / sqrt(D)) v by a kernel that knows the rule.

    Source: "FlashAttention" (arXiv 2205.14135): the (T, S) scores never stand in memory.
    """

    def __init__(self, is_causal: bool) -> None:
        self._is_causal = is_causal

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        is_grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=self._is_causal, enable_gqa=is_grouped
        )


class Masked:
    """Attend where a mask (B or 1, 1, T, S) is true."""

    def __init__(self, mask: Tensor) -> None:
        self._mask = mask

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        is_grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=self._mask, dropout_p=dropout, enable_gqa=is_grouped
        )


class Segmented:
    """Attend document by document, each as if it stood alone: no work where nobody may look.

    A document's positions stand next to each other.
    """

    def __init__(self, document_ids: Tensor, is_causal: bool) -> None:
        B, T = document_ids.shape
        is_first = torch.ones(B, T, dtype=torch.bool)  # so a row never goes on with the one before
        is_first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        starts = torch.cat([is_first.flatten().nonzero().flatten(), torch.tensor([B * T])])
        self._lengths: list[int] = starts.diff().tolist()
        self._unmasked = Unmasked(is_causal)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        B, H, T, D = q.shape
        documents = zip(self._cut(q), self._cut(k), self._cut(v), strict=True)
        mixed = [self._unmasked(*qkv, dropout) for qkv in documents]
        return torch.cat(mixed, dim=2).view(H, B, T, D).transpose(0, 1)  # -> (B, H, T, D)

    def _cut(self, x: Tensor) -> tuple[Tensor, ...]:
        """Lay rows end to end, (B, heads, T, D) -> (1, heads, B * T, D), and cut by document."""
        B, heads, T, D = x.shape
        return x.transpose(0, 1).reshape(1, heads, B * T, D).split(self._lengths, dim=2)


class Written:
    """Attend where a mask (B or 1, 1, T, S) is true, in plain matrix products.

    For scores that cannot pass a cap, as in "Gemma 2" (arXiv 2408.00118), section 2; and for short
    rows on a CPU, where all scores fit its cache and the kernel that avoids them is slower.
    """

    def __init__(self, mask: Tensor, cap: float = 0.0) -> None:
        self._mask, self._cap = mask, cap
        self._bias: dict[torch.dtype, Tensor] = {}  # 0 or -inf; by precision, made once for layers

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        group = q.shape[1] // k.shape[1]
        if group > 1:
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # K -> H
        scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (B, H, T, D) x (B, H, D, S) -> (B, H, T, S)
        if self._cap:
            scores = soft_cap(scores.float(), self._cap)
        if scores.dtype not in self._bias:
            nothing = torch.zeros(self._mask.shape, dtype=scores.dtype, device=scores.device)
            self._bias[scores.dtype] = nothing.masked_fill_(~self._mask, -torch.inf)
        weights = scores.add_(self._bias[scores.dtype]).softmax(dim=-1)
        weights = F.dropout(weights, dropout) if dropout else weights
        return weights.to(v.dtype) @ v  # (B, H, T, S) x (B, H, S, D) -> (B, H, T, D)


class Short:
    """Attend in the faster of two ways on a CPU, which depends on precision and length."""

    def __init__(self, kernel: Attend, mask: Tensor) -> None:
        self._kernel, self._written = kernel, Written(mask)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        is_short = k.shape[2] <= SHORT_POSITIONS.get(q.dtype, 0)
        return (self._written if is_short else self._kernel)(q, k, v, dropout)


class Flex:
    """Attend by a rule, compiled into one kernel that skips the blocks where nobody may look.

    For GPUs: compiled for a CPU, torch 2.13 gave wrong values inside a larger graph (docs/log.md).

    Source: "Flex Attention" (arXiv 2412.05496).
    """

    def __init__(
        self, rule: Rule, num_rows: int, num_positions: int, device: torch.device, cap: float
    ) -> None:
        self._mask = create_block_mask(
            rule, num_rows, None, num_positions, num_positions, device=device
        )
        self._cap_scores = _capped_scores(cap) if cap else None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        assert not dropout, "Sight chooses another way where there is dropout"
        # inside a compiled model it is compiled with the rest
        attend = flex_attention if torch.compiler.is_compiling() else _compiled_flex_attention()
        return attend(
            q,
            k,
            v,
            block_mask=self._mask,
            score_mod=self._cap_scores,
            enable_gqa=q.shape[1] != k.shape[1],
        )


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """Press x smoothly into (-cap, cap), nearly unchanged where it is small."""
    return cap * torch.tanh(x / cap)


def _capped_scores(cap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return soft_cap(score, cap)

    return capped


@remember
def _compiled_flex_attention() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)  # uncompiled it writes all scores out
