"""Sampling: filters from logits to logits, and the draw of the next token.

A filter removes tokens by setting their logits to minus infinity, never the most probable one.

Shapes: B sequences, V vocabulary.
"""

import math

import torch
from torch import Tensor

from llm.inference.options import GenerationOptions


def filter_logits(logits: Tensor, options: GenerationOptions, is_seen: Tensor | None) -> Tensor:
    """Apply the penalty, the temperature and the filters to logits (B, V), in transformers' order.

    `is_seen` (B, V) marks the tokens already in each sequence; None without a repetition penalty.
    """
    logits = logits.float()
    if is_seen is not None:
        logits = penalize_repetition(logits, is_seen, options.repetition_penalty)
    if options.temperature == 0:
        return logits
    logits = logits / options.temperature
    if options.top_k:
        logits = keep_top_k(logits, options.top_k)
    if options.top_p < 1:
        logits = keep_top_p(logits, options.top_p)
    if options.min_p:
        logits = keep_min_p(logits, options.min_p)
    return logits


def penalize_repetition(logits: Tensor, is_seen: Tensor, penalty: float) -> Tensor:
    """Divide positive logits of seen tokens by `penalty` and multiply negative ones by it.

    Source: "CTRL" (arXiv 1909.05858), section 4.1.
    """
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(is_seen, penalized, logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the `k` most probable tokens, and any tied with the last of them.

    Source: "Hierarchical Neural Story Generation" (arXiv 1805.04833), section 5.4.
    """
    least = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]  # (B, V) -> (B, 1)
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the nucleus: the fewest most probable tokens whose probabilities sum to `p` or more.

    Source: "The Curious Case of Neural Text Degeneration" (arXiv 1904.09751), section 3.1.
    """
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.double().softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # total of all more probable tokens
    is_out = before >= p
    is_out[:, 0] = False
    return logits.masked_fill(torch.zeros_like(is_out).scatter(1, ids, is_out), -torch.inf)


def keep_min_p(logits: Tensor, share: float) -> Tensor:
    """Keep tokens whose probability is at least `share` of the most probable one's.

    Source: "Turning Up the Heat: Min-p Sampling" (arXiv 2407.01082).
    """
    least = logits.amax(dim=-1, keepdim=True) + math.log(share)  # (B, V) -> (B, 1)
    return logits.masked_fill(logits < least, -torch.inf)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Sample from logits (B, V) by inverting the cumulative distribution at `uniform` (B,)."""
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    total = cumulative[:, -1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # for a number that was rounded to 1
    thresholds = (uniform.to(cumulative)[:, None] * total).minimum(below)
    return torch.searchsorted(cumulative, thresholds, right=True).squeeze(1)
