"""Measure a model that fills in masked tokens: how often it is right, and pseudo-perplexity.

It does not say the next token, so it has no bits per byte that would compare with a compressor, no
samples, no answers, and nothing that could leak from the future.

B rows in a batch, T positions, N documents.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from llm.data.packed import PackedSequences
from llm.errors import ArtifactError
from llm.evaluation.bits_per_byte import ratio
from llm.evaluation.leak import NOT_APPLICABLE
from llm.evaluation.report import Metric, rounded
from llm.model.loss import IGNORED
from llm.model.masked_lm import Masking, fill_in
from llm.model.precision import Precision, autocast
from llm.model.transformer import Transformer

TOKENS_PER_BATCH = 16_384
PSEUDO_TOKENS = 1 << 19  # read for the pseudo-perplexity: T times T for each row
MIN_PSEUDO_ROWS, MAX_PSEUDO_ROWS = 2, 64  # one has no standard error

Advance = Callable[[int], None]
"""Takes the number of rows that were just done."""

NOTES = (
    "These models fill in masked tokens and do not say what comes next. So there are no bits per"
    " byte to set beside the compressors', no samples and no answers to instructions.",
    NOT_APPLICABLE,
    "Pseudo-perplexity is no perplexity: each token is told by all the others of its row, also by"
    " those after it. It compares models that fill in, with the same tokenizer, with each other.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class FilledIn:
    """How a model filled in the tokens that were hidden in a split."""

    loss: Metric
    """Nats per hidden token."""
    accuracy: Metric
    """Share of them that the model thought the likeliest."""


@torch.inference_mode()
def measure_filled_in(
    model: Transformer,
    rows: PackedSequences,
    masking: Masking,
    *,
    document_mask: bool,
    precision: Precision,
    advance: Advance,
) -> FilledIn:
    """Hide tokens in every row of a split, as in training, and have them filled in.

    Which ones follows from the masking's seed and the row: the same for every model.

    Raises:
        ArtifactError: a loss is not finite, or nothing was hidden.
    """
    device = next(model.parameters()).device
    num_documents = rows.info.num_documents
    nats, num_right, num_tokens = (np.zeros(num_documents) for _ in range(3))
    batch_rows = max(1, TOKENS_PER_BATCH // rows.seq_len)
    for start in range(0, rows.num_rows, batch_rows):
        indices = np.arange(start, min(start + batch_rows, rows.num_rows))
        arrays = rows.read(indices)
        inputs, targets = masking.hide(arrays.tokens[:, :-1], arrays.mask[:, :-1], indices)
        ids = arrays.attention_ids(document_mask)[:, :-1]  # (B, T + 1) -> (B, T)
        with autocast(precision, device.type):
            costs, is_right = fill_in(
                model,
                torch.from_numpy(inputs).to(device),
                torch.from_numpy(targets).to(device),
                torch.from_numpy(ids).to(device),
            )
        owners = arrays.document_ids[:, :-1][targets != IGNORED]
        np.add.at(nats, owners, costs.double().cpu().numpy())
        np.add.at(num_right, owners, is_right.double().cpu().numpy())
        np.add.at(num_tokens, owners, 1.0)
        advance(len(indices))
    if not num_tokens.any():
        raise ArtifactError("no token of the validation rows was hidden; give more data")
    if not np.isfinite(nats).all():
        raise ArtifactError(
            "the model gave a loss that is not finite, so its training diverged; lower"
            " pretrain.learning_rate or finetune.learning_rate"
        )
    return FilledIn(
        loss=ratio(nats, num_tokens, "nats per masked token"),
        accuracy=ratio(num_right, num_tokens, "share of masked tokens"),
    )


def num_pseudo_sequences(rows: PackedSequences) -> int:
    """Return how many rows the pseudo-perplexity is measured on: as many as the work allows."""
    affordable = PSEUDO_TOKENS // rows.seq_len**2
    return min(rows.num_rows, max(MIN_PSEUDO_ROWS, min(MAX_PSEUDO_ROWS, affordable)))


@torch.inference_mode()
def pseudo_perplexity(
    model: Transformer,
    rows: PackedSequences,
    masking: Masking,
    *,
    document_mask: bool,
    precision: Precision,
    advance: Advance,
) -> Metric:
    """Return exp of the mean nats of every token of text, each masked alone, in a sample of rows.

    The standard error is by row, carried through the exponential to first order.

    Source: "Masked Language Model Scoring" (arXiv 1910.14659), section 2.
    """
    device = next(model.parameters()).device
    count = num_pseudo_sequences(rows)
    generator = np.random.default_rng(masking.seed)
    chosen = np.sort(generator.choice(rows.num_rows, count, replace=False))
    arrays = rows.read(chosen)
    attention_ids = arrays.attention_ids(document_mask)
    nats, num_tokens = np.zeros(count), np.zeros(count)
    batch_rows = max(1, TOKENS_PER_BATCH // rows.seq_len)
    for row in range(count):
        tokens = torch.from_numpy(arrays.tokens[row, :-1]).to(device)  # (T + 1,) -> (T,)
        ids = torch.from_numpy(attention_ids[row, :-1]).to(device)
        is_eligible = arrays.mask[row, :-1] & masking.is_text[arrays.tokens[row, :-1]]
        for places in torch.from_numpy(np.flatnonzero(is_eligible)).to(device).split(batch_rows):
            B = len(places)
            copies = torch.arange(B, device=device)
            inputs = tokens.repeat(B, 1)  # (T,) -> (B, T)
            inputs[copies, places] = masking.mask_id
            targets = torch.full_like(inputs, IGNORED)
            targets[copies, places] = tokens[places]
            with autocast(precision, device.type):
                costs, _ = fill_in(model, inputs, targets, ids.expand(B, -1))
            nats[row] += float(costs.double().sum())
            num_tokens[row] += B
        advance(1)
    mean = ratio(nats, num_tokens, "nats per token")
    value = math.exp(mean.value)
    error = mean.standard_error
    return Metric(
        value=rounded(value),
        unit="pseudo-perplexity",
        num_examples=mean.num_examples,
        standard_error=None if error is None else rounded(value * error),
    )
