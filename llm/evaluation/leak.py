"""Does a model see what it is asked to predict? Five checks on the real model and real rows.

1. *Future*: other tokens after position t leave every logit up to t as it was.
2. *Total*: the probabilities that the evaluation gives to all tokens that could stand at one place
   sum to one. A scorer that shows the model its target (a shift forgotten) rewards each of them.
3. *Repetition*: the model does not expect the token it has just read to come again. One trained on
   targets that were not shifted against its inputs learns exactly that, and nothing else.
4. *Cache*: logits with a key/value cache, token by token, equal those of one whole pass, so answers
   come from the model that was scored.
5. *Documents*: where attention is kept within documents, other tokens in the documents before leave
   every logit of this one as it was.

T positions, V vocabulary.
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

NUM_ROWS = 4
CUTS_PER_ROW = 4
NUM_CACHED_TOKENS = 32  # and more where a layer's window is wider, so that something leaves it
NUM_SINGLE_TOKENS = 16
PREFIX_TOKENS = 3
LOGITS_PER_ROW = 64_000_000  # 256 MB in fp32: longer rows are cut to what gives so many
TOKENS_PER_BATCH = 8_192
SHOWN_DIGITS = 2  # of rounding errors: their size says something, their digits do not

# Tolerances are shares of the largest logit. What stands before a changed future is computed by the
# same sums, so it should not differ at all; with a cache the order of the sums differs, in fp32.
FUTURE_TOLERANCE = 1e-5
CACHE_TOLERANCE = 1e-4
TOTAL_TOLERANCE = 1e-3
# Measured: targets not shifted, a tiny model, 60 steps: 0.66 and rising; sound models: below 0.01.
REPETITION_TOLERANCE = 0.25


NOT_APPLICABLE = (
    "The leak test is not applicable: a model that fills in masked tokens is meant to see both"
    " sides of them, so there is no future to hide."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LeakResult:
    """What the five checks measured on one model."""

    num_cuts: int
    """Places where the future was changed."""
    future_difference: float
    """Largest change of an earlier logit, as a share of the largest logit."""
    cache_difference: float
    """Largest difference between cached and whole passes, as a share of the largest logit."""
    total_error: float
    """How far the probabilities of all possible next tokens are from summing to one."""
    repetition: float
    """Mean probability of the token just read to come again, less the share of times it does."""
    document_difference: float | None = None
    """Largest change of a logit by another document, as a share of the largest logit; None where
    the model may look at the documents before.
    """

    @property
    def is_passed(self) -> bool:
        """Whether all checks hold."""
        return (
            self.future_difference <= FUTURE_TOLERANCE
            and self.cache_difference <= CACHE_TOLERANCE
            and self.total_error <= TOTAL_TOLERANCE
            and self.repetition <= REPETITION_TOLERANCE
            and (self.document_difference or 0.0) <= FUTURE_TOLERANCE
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """One row to test on: T inputs and their targets, and the places to change the future after."""

    tokens: Tensor
    """(T + 1,)"""
    documents: Tensor | None
    """(T + 1,), where the model attends within a document only."""
    is_target: Tensor
    """(T,): not padding."""
    cuts: list[int]

    def logits(self, model: Transformer) -> Tensor:
        """Return what the model makes of the inputs, (T, V)."""
        documents = None if self.documents is None else self.documents[None, :-1]
        return model(self.tokens[None, :-1], documents)[0]

    def with_other_future(self, cut: int, vocab_size: int) -> "Text":
        """Return the row with every token after `cut` another one, of another document."""
        is_future = torch.arange(len(self.tokens), device=self.tokens.device) > cut
        others = (self.tokens + 1 + cut % (vocab_size - 1)) % vocab_size
        tokens = torch.where(is_future, others, self.tokens)
        documents = None if self.documents is None else self.documents + is_future
        return replace(self, tokens=tokens, documents=documents)

    def cut_in_two(self, cut: int) -> "Text":
        """Return the row with a new document after `cut`, beside those that begin there anyway."""
        assert self.documents is not None
        is_second = torch.arange(len(self.tokens), device=self.tokens.device) > cut
        return replace(self, documents=2 * self.documents + is_second)

    def with_other_past(self, cut: int, vocab_size: int) -> "Text":
        """Return the row with every token up to `cut` another one, of the documents they were."""
        is_past = torch.arange(len(self.tokens), device=self.tokens.device) <= cut
        others = (self.tokens + 1 + cut % (vocab_size - 1)) % vocab_size
        return replace(self, tokens=torch.where(is_past, others, self.tokens))


@torch.inference_mode()
def find_leaks(
    model: Transformer, rows: PackedSequences, *, document_mask: bool, seed: int
) -> LeakResult:
    """Run all checks on some rows of real text.

    Raises:
        ConfigError: the model is not causal, so that the test is not applicable.
    """
    if not model.config.is_causal:
        raise ConfigError(f"model.is_causal: found false. {NOT_APPLICABLE}")
    device = next(model.parameters()).device
    generator = np.random.default_rng(seed)
    num_rows = min(NUM_ROWS, rows.num_rows)
    arrays = rows.read(np.sort(generator.choice(rows.num_rows, num_rows, replace=False)))
    length = min(rows.seq_len, LOGITS_PER_ROW // model.vocab_size)
    texts = [
        Text(
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
    """Choose where the future begins: after the first position, before the last, and between."""
    between = generator.integers(0, length - 1, CUTS_PER_ROW - 2)
    return sorted({0, length - 2, *between.tolist()})


def _future_difference(model: Transformer, text: Text) -> float:
    """Return the largest change of a logit up to a cut when all tokens after it change."""
    before = text.logits(model)
    changes = (
        text.with_other_future(cut, model.vocab_size).logits(model)[: cut + 1] - before[: cut + 1]
        for cut in text.cuts
    )
    return max(map(_largest, changes)) / (_largest(before) or 1.0)


def _document_difference(model: Transformer, text: Text) -> float:
    """Return the largest change of a logit of one document when all tokens before it change."""
    largest, scale = 0.0, 0.0
    for cut in text.cuts:
        apart = text.cut_in_two(cut)
        before = apart.logits(model)
        after = apart.with_other_past(cut, model.vocab_size).logits(model)
        largest = max(largest, _largest((after - before)[cut + 1 :]))
        scale = max(scale, _largest(before))
    return largest / (scale or 1.0)


def _cache_difference(model: Transformer, text: Text) -> float:
    """Return the largest difference of a logit read at once and read with a cache, the last tokens
    singly.
    """
    num_tokens = max(NUM_CACHED_TOKENS, model.config.sliding_window + NUM_SINGLE_TOKENS)
    tokens = text.tokens[None, : min(num_tokens, len(text.tokens) - 1)]  # (T + 1,) -> (1, T)
    whole = model(tokens)
    T = tokens.shape[1]
    cache = KeyValueCache(model.config, 1, T, device=tokens.device)
    start = max(T // 2, T - NUM_SINGLE_TOKENS)
    pieces = [tokens[:, :start], *tokens[:, start:].split(1, dim=1)]
    cached = torch.cat([model(piece, cache=cache) for piece in pieces], dim=1)
    return _largest(cached - whole) / (_largest(whole) or 1.0)


def _total_error(model: Transformer, text: Text) -> float:
    """Return |1 - sum over all tokens of the probability to be the next after a short prefix|."""
    prefix = text.tokens[:PREFIX_TOKENS]
    batch_rows = TOKENS_PER_BATCH // (PREFIX_TOKENS + 1)
    total = 0.0
    for candidates in torch.arange(model.vocab_size, device=prefix.device).split(batch_rows):
        starts = prefix.expand(len(candidates), -1)
        nats = target_nats(model, torch.cat([starts, candidates[:, None]], dim=1))[:, -1]
        total += float(torch.exp(-nats.double()).sum())
    return abs(1 - total)


def _repetition(model: Transformer, texts: Sequence[Text]) -> float:
    """Return by how much the model overrates that the token just read comes again, on average."""
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
