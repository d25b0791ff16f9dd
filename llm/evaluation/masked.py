"""Metrics of masked language models: loss and accuracy of masked tokens, and pseudo-perplexity.

Such a model predicts no next token, so it has no bits per byte to compare with a compressor, no
samples, no answers, and no future to leak.

Shapes: B sequences in a batch, T positions, N documents.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from llm.data.packed import PackedSequences
from llm.errors import ArtifactError
from llm.evaluation.bits_per_byte import DIVERGED, ratio
from llm.evaluation.items import hashed_id
from llm.evaluation.leak import NOT_APPLICABLE
from llm.evaluation.report import Metric, rounded
from llm.model.loss import IGNORED
from llm.model.masked_lm import Masking, fill_in
from llm.model.precision import Precision, autocast
from llm.model.transformer import Transformer

TOKENS_PER_BATCH = 16_384
PSEUDO_TOKENS = 1 << 19  # processed for the pseudo-perplexity: T times T per sequence
MIN_PSEUDO_SEQUENCES, MAX_PSEUDO_SEQUENCES = 2, 64  # one has no standard error

Advance = Callable[[int], None]
"""Takes the number of sequences just done."""

NOTES = (
    "These models fill in masked tokens and do not predict the next token: there are no bits per"
    " byte to compare with compressors, no samples and no answers to instructions.",
    NOT_APPLICABLE,
    "Pseudo-perplexity is no perplexity: each token is predicted from all others of its sequence,"
    " including later ones. It compares masked language models with the same tokenizer.",
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FilledIn:
    """How well a model predicts the masked tokens of a split, by document (N,)."""

    nats: np.ndarray
    num_right: np.ndarray
    """Masked tokens that the model ranks first."""
    num_tokens: np.ndarray
    """Masked tokens."""

    @property
    def loss(self) -> Metric:
        """Nats per masked token."""
        return ratio(self.nats, self.num_tokens, "nats per masked token")

    @property
    def accuracy(self) -> Metric:
        """Share of masked tokens that the model ranks first."""
        return ratio(self.num_right, self.num_tokens, "share of masked tokens")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PseudoLikelihood:
    """Nats of text tokens, each masked alone, by sequence (N,)."""

    ids: tuple[str, ...]
    """A hash of each sequence's tokens."""
    nats: np.ndarray
    num_tokens: np.ndarray

    @property
    def loss(self) -> Metric:
        """Nats per token."""
        return ratio(self.nats, self.num_tokens, "nats per token, each masked alone")

    @property
    def perplexity(self) -> Metric:
        """exp of the loss; its standard error is propagated to first order."""
        value, error = math.exp(self.loss.value), self.loss.standard_error
        return replace(
            self.loss,
            value=rounded(value),
            unit="pseudo-perplexity",
            standard_error=None if error is None else rounded(value * error),
        )


@torch.inference_mode()
def measure_filled_in(
    model: Transformer,
    sequences: PackedSequences,
    masking: Masking,
    *,
    document_mask: bool,
    precision: Precision,
    advance: Advance,
) -> FilledIn:
    """Mask tokens in every sequence of a split, as in training, and let the model predict them.

    The seed and the sequence decide which tokens are masked: the same for every model.

    Raises:
        ArtifactError: a loss is not finite, or no token was masked.
    """
    device = next(model.parameters()).device
    num_documents = sequences.info.num_documents
    nats, num_right, num_tokens = (np.zeros(num_documents) for _ in range(3))
    batch_size = max(1, TOKENS_PER_BATCH // sequences.seq_len)
    for start in range(0, sequences.num_sequences, batch_size):
        indices = np.arange(start, min(start + batch_size, sequences.num_sequences))
        arrays = sequences.read(indices)
        inputs, targets = masking.hide(arrays.tokens[:, :-1], arrays.mask[:, :-1], indices)
        ids = arrays.attention_ids(document_mask)[:, :-1]  # (B, T + 1) -> (B, T)
        with autocast(precision, device.type):
            costs, is_right = fill_in(
                model,
                torch.from_numpy(inputs).to(device),
                torch.from_numpy(targets).to(device),
                torch.from_numpy(ids).to(device),
            )
        documents = arrays.document_ids[:, :-1][targets != IGNORED]
        np.add.at(nats, documents, costs.double().cpu().numpy())
        np.add.at(num_right, documents, is_right.double().cpu().numpy())
        np.add.at(num_tokens, documents, 1.0)
        advance(len(indices))
    if not num_tokens.any():
        raise ArtifactError("no token of the validation data was masked; provide more data")
    if not np.isfinite(nats).all():
        raise ArtifactError(DIVERGED)
    return FilledIn(nats=nats, num_right=num_right, num_tokens=num_tokens)


def num_pseudo_sequences(sequences: PackedSequences) -> int:
    """Return how many sequences the pseudo-perplexity is measured on: as many as affordable."""
    affordable = PSEUDO_TOKENS // sequences.seq_len**2
    return min(
        sequences.num_sequences, max(MIN_PSEUDO_SEQUENCES, min(MAX_PSEUDO_SEQUENCES, affordable))
    )


@torch.inference_mode()
def pseudo_likelihood(
    model: Transformer,
    sequences: PackedSequences,
    masking: Masking,
    *,
    document_mask: bool,
    precision: Precision,
    advance: Advance,
) -> PseudoLikelihood:
    """Measure the nats of text tokens, each masked alone, on a sample of sequences.

    Source: "Masked Language Model Scoring" (arXiv 1910.14659), section 2.
    """
    device = next(model.parameters()).device
    count = num_pseudo_sequences(sequences)
    generator = np.random.default_rng(masking.seed)
    chosen = np.sort(generator.choice(sequences.num_sequences, count, replace=False))
    arrays = sequences.read(chosen)
    attention_ids = arrays.attention_ids(document_mask)
    nats, num_tokens = np.zeros(count), np.zeros(count)
    batch_size = max(1, TOKENS_PER_BATCH // sequences.seq_len)
    for n in range(count):
        tokens = torch.from_numpy(arrays.tokens[n, :-1]).to(device)  # (T + 1,) -> (T,)
        ids = torch.from_numpy(attention_ids[n, :-1]).to(device)
        is_eligible = arrays.mask[n, :-1] & masking.is_text[arrays.tokens[n, :-1]]
        for positions in torch.from_numpy(np.flatnonzero(is_eligible)).to(device).split(batch_size):
            B = len(positions)
            copies = torch.arange(B, device=device)
            inputs = tokens.repeat(B, 1)  # (T,) -> (B, T)
            inputs[copies, positions] = masking.mask_id
            targets = torch.full_like(inputs, IGNORED)
            targets[copies, positions] = tokens[positions]
            with autocast(precision, device.type):
                costs, _ = fill_in(model, inputs, targets, ids.expand(B, -1))
            nats[n] += float(costs.double().sum())
            num_tokens[n] += B
        advance(1)
    ids = tuple(hashed_id(tokens) for tokens in arrays.tokens.tolist())
    return PseudoLikelihood(ids=ids, nats=nats, num_tokens=num_tokens)
