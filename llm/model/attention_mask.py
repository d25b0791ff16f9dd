"""Attention masks: causal, sliding-window and per-document, written once as a rule.

    B  sequences    T  positions of queries    S  positions of keys

A rule maps the positions of a query and a key to true or false. The boolean mask of eager
attention, the block mask of FlexAttention and the mask over a key/value cache all come from it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

MaskRule = Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]
"""From sequence, head (ignored), query position and key position to true where the query may
attend to the key. Works on tensors of positions, and inside FlexAttention on single ones.
"""


def mask_rule(
    is_causal: bool,
    window: int,
    document_ids: Tensor | None,
    device: torch.device | str = "cpu",
) -> MaskRule:
    """Return the rule: no later keys, within `window` (0: unlimited), in the same document.

    `document_ids` (B, T) are compared for equality.
    """
    # a tensor: from plain numbers that differ by layer torch.compile makes code that fails on CPUs
    limit = torch.tensor(window, device=device) if window else None

    def may_attend(sequence: Tensor, head: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        distance = query - key
        # position t predicts token t + 1 from tokens 0 .. t: it must not see t + 1
        allowed = distance >= 0 if is_causal else distance == distance
        if limit is not None:  # both sides, for models that are not causal
            allowed = allowed & (distance < limit) & (distance > -limit)
        if document_ids is not None:  # packed neighbors are unrelated text
            allowed = allowed & (document_ids[sequence, query] == document_ids[sequence, key])
        return allowed

    return may_attend


def boolean_mask(rule: MaskRule, tokens: Tensor, document_ids: Tensor | None) -> Tensor:
    """Evaluate a rule on whole sequences (B, T): (B or 1, 1, T, T), the same for every head."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    # without documents all sequences share one mask: B times less memory
    num_sequences = 1 if document_ids is None else len(tokens)
    sequences = torch.arange(num_sequences, device=tokens.device)[:, None, None]
    mask = rule(sequences, None, positions[:, None], positions)  # (B or 1, T, T), or (T, T)
    return mask.expand(num_sequences, -1, -1).unsqueeze(1)


def cache_mask(window: int, positions: Tensor, num_cached: int) -> Tensor:
    """Return the causal mask of queries at `positions` (B, T) over S cached ones: (B, 1, T, S)."""
    keys = torch.arange(num_cached, device=positions.device)
    # column s of the cache holds position s of its sequence; documents are not kept in it
    sequence = torch.zeros((), dtype=torch.long, device=positions.device)
    rule = mask_rule(True, window, None, positions.device)
    return rule(sequence, None, positions[:, :, None], keys).unsqueeze(1)
