"""Bits per byte: the loss of every token of a split, summed by document.

The loss of all text tokens in bits, over the bytes they encode, compares models across tokenizers.
Control tokens encode no bytes and count on neither side.

Shapes: B sequences in a batch, T positions, V vocabulary, N documents.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from llm.data.packed import PackedSequences
from llm.errors import ArtifactError
from llm.evaluation.report import Metric, rounded
from llm.model.loss import token_losses
from llm.model.precision import Precision, autocast
from llm.model.transformer import Transformer

LOGITS_PER_BATCH = 16_000_000  # 64 MB in fp32, a few times that during the softmax
DIVERGED = (
    "the model gave a loss that is not finite, so its training diverged; lower the learning_rate of"
    " its stage"
)


class DocumentScores:
    """Sums by document, (N,) each: independent examples, whose spread gives the standard error."""

    def __init__(self, num_documents: int) -> None:
        self.nats = np.zeros(num_documents, dtype=np.float64)
        self.num_tokens = np.zeros(num_documents, dtype=np.int64)
        self.num_bytes = np.zeros(num_documents, dtype=np.int64)

    def add(self, documents: np.ndarray, nats: np.ndarray, num_bytes: np.ndarray) -> None:
        """Add scored targets, one entry each, to their documents.

        Raises:
            ArtifactError: a loss is not finite.
        """
        if not np.isfinite(nats).all():
            raise ArtifactError(DIVERGED)
        ordinals, indices = np.unique(documents, return_inverse=True)
        self.nats[ordinals] += np.bincount(indices, weights=nats)
        self.num_tokens[ordinals] += np.bincount(indices)
        weights = num_bytes.astype(np.float64)  # exact below 2**53
        self.num_bytes[ordinals] += np.bincount(indices, weights=weights).astype(np.int64)

    @property
    def bits(self) -> np.ndarray:
        """The loss of each document in bits, (N,)."""
        return self.nats / math.log(2)

    def bits_per_byte(self) -> Metric:
        """Return the bits of all targets over their bytes, with the standard error by document."""
        return ratio(self.bits, self.num_bytes, "bits per byte")

    def nats_per_token(self) -> Metric:
        """Return the mean loss of a target."""
        return ratio(self.nats, self.num_tokens, "nats per token")


def score_documents(
    model: Transformer,
    sequences: PackedSequences,
    token_bytes: np.ndarray,
    *,
    document_mask: bool,
    has_control_targets: bool,
    precision: Precision = "fp32",
    advance: Callable[[int], None] = lambda count: None,
) -> DocumentScores:
    """Score every target of a split exactly once, in the order of the sequences.

    `token_bytes` (V,) is the number of bytes of each id. `has_control_targets` also scores the ends
    of answers, which a chat model learns. `precision` is that of training.
    """
    scores = DocumentScores(sequences.info.num_documents)
    batch_size = max(1, LOGITS_PER_BATCH // (sequences.seq_len * len(token_bytes)))
    for start in range(0, sequences.num_sequences, batch_size):
        indices = np.arange(start, min(start + batch_size, sequences.num_sequences))
        arrays = sequences.read(indices)
        targets = arrays.tokens[:, 1:]  # (B, T + 1) -> (B, T)
        num_bytes = token_bytes[targets]
        is_scored = arrays.mask[:, 1:] & (has_control_targets | (num_bytes > 0))
        with autocast(precision, next(model.parameters()).device.type):
            nats = target_nats(
                model,
                torch.from_numpy(arrays.tokens),
                torch.from_numpy(arrays.document_ids) if document_mask else None,
            )
        scores.add(
            arrays.document_ids[:, 1:][is_scored],
            nats.double().cpu().numpy()[is_scored],
            num_bytes[is_scored],
        )
        advance(len(indices))
    return scores


@torch.inference_mode()
def target_nats(model: Transformer, tokens: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """Return -log p of each token given those before it: (B, T + 1) -> (B, T).

    The only code of the evaluation that shifts targets against inputs.
    """
    device = next(model.parameters()).device
    tokens = tokens.to(device)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]  # (B, T + 1) -> 2 x (B, T)
    documents = None if document_ids is None else document_ids[:, :-1].to(device)
    x = model.hidden_states(inputs, documents)  # (B, T, C)
    # positions per logits tensor
    chunk = max(1, LOGITS_PER_BATCH // (len(tokens) * model.vocab_size))
    chunks = zip(x.split(chunk, dim=1), targets.split(chunk, dim=1), strict=True)
    return torch.cat([token_losses(model.logits(part), t) for part, t in chunks], dim=1)


def ratio(numerators: np.ndarray, denominators: np.ndarray, unit: str) -> Metric:
    """Return the ratio of two sums over documents, with its standard error.

    The error is that of the linearized ratio estimator, because long documents weigh more and a
    document's two numbers are correlated. Documents without a target are not counted.

    Source: Cochran, Sampling Techniques, 3rd edition, section 2.11.
    """
    has_targets = denominators > 0
    count = int(has_targets.sum())
    total = float(denominators.sum())
    value = float(numerators.sum()) / total
    residuals = (numerators - value * denominators)[has_targets]
    error: float | None = None
    if count > 1:
        error = rounded(math.sqrt(count / (count - 1) * float((residuals**2).sum())) / total)
    return Metric(value=rounded(value), unit=unit, num_examples=count, standard_error=error)
