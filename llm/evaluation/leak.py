"""Leak tests: five checks, on the real model and data, that no target is visible to the model.

1. *Future*: changing the tokens after position t changes no logit up to t.
2. *Total*: the probabilities given to all possible next tokens sum to one. A scorer that forgets
   the shift shows the model each target and gives every candidate a high probability.
3. *Repetition*: the model does not predict the token it has just read. A model trained on
   unshifted targets learns exactly that.
4. *Cache*: logits computed token by token with a key/value cache equal those of one full pass, so
   that answers come from the model that was scored.
5. *Documents*: under a document mask, changing the previous documents changes no logit of this one.

Shapes: T positions, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from llm.data.packed import PackedSequences
from llm.errors import ConfigError
from llm.evaluation.bits_per_byte import target_nats
from llm.evaluation.report import Metric, rounded
from llm.model.cache import KeyValueCache
from llm.model.loss import token_losses
from llm.model.transformer import Transformer

NUM_SEQUENCES = 4
CUTS_PER_SEQUENCE = 4
NUM_CACHED_TOKENS = 32  # more under a wide sliding window, so that some tokens leave the window
NUM_SINGLE_TOKENS = 16
PREFIX_TOKENS = 3
LOGITS_PER_SEQUENCE = 64_000_000  # 256 MB in fp32: longer sequences are truncated to this
CANDIDATE_TOKENS_PER_BATCH = 8_192
SHOWN_DIGITS = 2  # rounding errors: only their magnitude means something

# Shares of the largest logit. Logits before a changed future come from the same sums and should not
# differ at all; a cache changes the order of the sums, in fp32.
FUTURE_TOLERANCE = 1e-5
CACHE_TOLERANCE = 1e-4
TOTAL_TOLERANCE = 1e-3
# Measured: a tiny model with unshifted targets 0.66 after 60 steps and rising, sound models < 0.01
REPETITION_TOLERANCE = 0.25


NOT_APPLICABLE = (
    "The leak test does not apply: a model that fills in masked tokens sees both sides of them, so"
    " there is no future to hide."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LeakResult:
    """Results of the five checks on one model."""

    num_cuts: int
    """Positions after which the future was changed."""
    future_difference: float
    """Largest change of an earlier logit, as a share of the largest logit."""
    cache_difference: float
    """Largest difference between cached and full passes, as a share of the largest logit."""
    total_error: float
    """Absolute difference from one of the sum of all next-token probabilities."""
    repetition: float
    """Mean probability that the last token repeats, minus how often it does."""
    document_difference: float | None = None
    """Largest change of a logit by another document, as a share of the largest logit; None without
    a document mask.
    """

    @property
    def is_passed(self) -> bool:
        """Whether all checks pass."""
        return (
            self.future_difference <= FUTURE_TOLERANCE
            and self.cache_difference <= CACHE_TOLERANCE
            and self.total_error <= TOTAL_TOLERANCE
            and self.repetition <= REPETITION_TOLERANCE
            and (self.document_difference or 0.0) <= FUTURE_TOLERANCE
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedSequence:
    """One sequence to check: T inputs, their targets, and positions to change the future after."""

    tokens: Tensor
    """(T + 1,)"""
    documents: Tensor | None
    """(T + 1,); None without a document mask."""
    is_target: Tensor
    """(T,): not padding."""
    cuts: list[int]

    def logits(self, model: Transformer) -> Tensor:
        """Return the logits (T, V) of the inputs."""
        documents = None if self.documents is None else self.documents[None, :-1]
        return model(self.tokens[None, :-1], documents)[0]

    def with_other_future(self, cut: int, vocab_size: int) -> "CheckedSequence":
        """Replace every token after `cut` by another one, of another document."""
        is_future = torch.arange(len(self.tokens), device=self.tokens.device) > cut
        others = (self.tokens + 1 + cut % (vocab_size - 1)) % vocab_size
        tokens = torch.where(is_future, others, self.tokens)
        documents = None if self.documents is None else self.documents + is_future
        return replace(self, tokens=tokens, documents=documents)

    def cut_in_two(self, cut: int) -> "CheckedSequence":
        """Begin a new document after `cut`, beside the existing boundaries."""
        assert self.documents is not None
        is_second = torch.arange(len(self.tokens), device=self.tokens.device) > cut
        return replace(self, documents=2 * self.documents + is_second)

    def with_other_past(self, cut: int, vocab_size: int) -> "CheckedSequence":
        """Replace every token up to `cut` by another one of the same document."""
        is_past = torch.arange(len(self.tokens), device=self.tokens.device) <= cut
        others = (self.tokens + 1 + cut % (vocab_size - 1)) % vocab_size
        return replace(self, tokens=torch.where(is_past, others, self.tokens))


@torch.inference_mode()
def find_leaks(
    model: Transformer, sequences: PackedSequences, *, document_mask: bool, seed: int
) -> LeakResult:
    """Run all checks on randomly chosen sequences.

    Raises:
        ConfigError: the model is not causal.
    """
    if not model.config.is_causal:
        raise ConfigError(f"model.is_causal: found false. {NOT_APPLICABLE}")
    device = next(model.parameters()).device
    generator = np.random.default_rng(seed)
    count = min(NUM_SEQUENCES, sequences.num_sequences)
    chosen = np.sort(generator.choice(sequences.num_sequences, count, replace=False))
    arrays = sequences.read(chosen)
    length = min(sequences.seq_len, LOGITS_PER_SEQUENCE // model.vocab_size)
    texts = [
        CheckedSequence(
            tokens=torch.from_numpy(tokens[: length + 1]).to(device),
            documents=torch.from_numpy(documents[: length + 1]).to(device)
            if document_mask
            else None,
            is_target=torch.from_numpy(mask[1 : length + 1]).to(device),
            cuts=_cuts(length, generator),
        )
        for tokens, mask, documents in zip(*arrays, strict=True)
    ]
    return LeakResult(
        num_cuts=sum(len(text.cuts) for text in texts),
        future_difference=max(_future_difference(model, text) for text in texts),
        cache_difference=_cache_difference(model, texts[0]),
        total_error=_total_error(model, texts[0]),
        repetition=_repetition(model, texts),
        document_difference=max(_document_difference(model, text) for text in texts)
        if document_mask
        else None,
    )


def leak_metrics(leak: LeakResult) -> dict[str, Metric]:
    """Return the result of every check as a metric."""
    logit = "share of the largest logit"
    values = {
        "passed": (float(leak.is_passed), "1 passed, 0 failed"),
        "largest_difference": (leak.future_difference, logit),
        "cache_difference": (leak.cache_difference, logit),
        "total_error": (leak.total_error, "probability"),
        "repetition": (leak.repetition, "probability"),
    }
    if leak.document_difference is not None:
        values["document_difference"] = (leak.document_difference, logit)
    return {
        f"leak/{name}": Metric(
            value=rounded(value, SHOWN_DIGITS), unit=unit, num_examples=leak.num_cuts
        )
        for name, (value, unit) in values.items()
    }


def worst_metrics(by_model: Sequence[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Return, of every check, the worst result of several models."""
    num_cuts = sum(metrics["leak/passed"].num_examples for metrics in by_model)
    worst: dict[str, Metric] = {}
    for name in dict.fromkeys(name for metrics in by_model for name in metrics):
        measured = [metrics[name] for metrics in by_model if name in metrics]
        choose = min if name == "leak/passed" else max
        worst[name] = replace(choose(measured, key=_value), num_examples=num_cuts)
    return worst


def _cuts(length: int, generator: np.random.Generator) -> list[int]:
    """Choose where the future begins: after the first position, before the last, and at random."""
    between = generator.integers(0, length - 1, CUTS_PER_SEQUENCE - 2)
    return sorted({0, length - 2, *between.tolist()})


def _future_difference(model: Transformer, text: CheckedSequence) -> float:
    """Return the largest change of a logit before a cut when all tokens after it change."""
    before = text.logits(model)
    changes = (
        text.with_other_future(cut, model.vocab_size).logits(model)[: cut + 1] - before[: cut + 1]
        for cut in text.cuts
    )
    return max(map(_largest, changes)) / (_largest(before) or 1.0)


def _document_difference(model: Transformer, text: CheckedSequence) -> float:
    """Return the largest change of a logit of one document when all tokens before it change."""
    largest, scale = 0.0, 0.0
    for cut in text.cuts:
        apart = text.cut_in_two(cut)
        before = apart.logits(model)
        after = apart.with_other_past(cut, model.vocab_size).logits(model)
        largest = max(largest, _largest((after - before)[cut + 1 :]))
        scale = max(scale, _largest(before))
    return largest / (scale or 1.0)


def _cache_difference(model: Transformer, text: CheckedSequence) -> float:
    """Return the largest difference between the logits of a full pass and of a pass with a cache,
    whose last tokens come one by one.
    """
    num_tokens = max(NUM_CACHED_TOKENS, model.config.sliding_window + NUM_SINGLE_TOKENS)
    tokens = text.tokens[None, : min(num_tokens, len(text.tokens) - 1)]  # (T + 1,) -> (1, T)
    whole = model(tokens)
    T = tokens.shape[1]
    cache = KeyValueCache(model.config, 1, T, device=tokens.device)
    start = max(T // 2, T - NUM_SINGLE_TOKENS)
    parts = [tokens[:, :start], *tokens[:, start:].split(1, dim=1)]
    cached = torch.cat([model(part, cache=cache) for part in parts], dim=1)
    return _largest(cached - whole) / (_largest(whole) or 1.0)


def _total_error(model: Transformer, text: CheckedSequence) -> float:
    """Return |1 - sum of the probabilities of all tokens after a short prefix|."""
    prefix = text.tokens[:PREFIX_TOKENS]
    batch_size = CANDIDATE_TOKENS_PER_BATCH // (PREFIX_TOKENS + 1)
    total = 0.0
    for candidates in torch.arange(model.vocab_size, device=prefix.device).split(batch_size):
        starts = prefix.expand(len(candidates), -1)
        nats = target_nats(model, torch.cat([starts, candidates[:, None]], dim=1))[:, -1]
        total += float(torch.exp(-nats.double()).sum())
    return abs(1 - total)


def _repetition(model: Transformer, texts: Sequence[CheckedSequence]) -> float:
    """Return how much the model overestimates, on average, that the last token repeats."""
    excess: list[Tensor] = []
    for text in texts:
        inputs, targets = text.tokens[:-1], text.tokens[1:]
        nats = token_losses(text.logits(model)[None], inputs[None])[0]  # (T, V) -> (T,)
        excess.append((torch.exp(-nats) - (inputs == targets).float())[text.is_target])
    return float(torch.cat(excess).mean())


def _value(metric: Metric) -> float:
    return metric.value


def _largest(x: Tensor) -> float:
    return float(x.abs().max())
