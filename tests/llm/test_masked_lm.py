"""Masked language modeling: BERT's shares, reproducible masks, and losses equal to sums by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from llm.data.packed import PackedSequences
from llm.evaluation.masked import measure_filled_in, num_pseudo_sequences, pseudo_likelihood
from llm.model.loss import IGNORED
from llm.model.masked_lm import Masking, fill_in
from llm.tokenizer.base import Tokenizer
from llm.training.objectives import MaskedTokens
from tests.llm.training_setup import tiny_model, write_chat_sequences, write_text_sequences

VOCAB_SIZE, MASK = 600, 6


def masking(seed: int = 1, fraction: float = 0.15) -> Masking:
    """Of a vocabulary of 600 whose first seven tokens are control tokens."""
    return Masking(seed=seed, fraction=fraction, mask_id=MASK, is_text=np.arange(VOCAB_SIZE) > MASK)


def some_tokens(num_rows: int, T: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB_SIZE, (num_rows, T))


def test_tokens_of_text_are_masked_replaced_and_kept_in_the_shares_of_bert() -> None:
    tokens = some_tokens(4000)
    read, targets = masking().hide(tokens, np.ones(tokens.shape, bool), np.arange(4000))
    is_chosen = targets != IGNORED
    assert np.array_equal(targets[is_chosen], tokens[is_chosen])
    assert np.array_equal(read[~is_chosen], tokens[~is_chosen])
    assert tokens[is_chosen].min() > MASK, "control tokens are never masked"
    count = is_chosen.sum()
    # four standard deviations of a binomial share
    assert is_chosen.sum() / (tokens > MASK).sum() == pytest.approx(0.15, abs=0.003)
    assert (read == MASK)[is_chosen].sum() / count == pytest.approx(0.8, abs=0.009)
    is_replaced = is_chosen & (read != MASK) & (read != tokens)
    assert is_replaced.sum() / count == pytest.approx(0.1, abs=0.007)
    assert read[is_replaced].min() > MASK, "no control token replaces another"
    counts = np.bincount(read[is_replaced], minlength=VOCAB_SIZE)[MASK + 1 :]
    assert counts.std() == pytest.approx(math.sqrt(counts.mean()), rel=0.2), "Poisson: drawn evenly"


def test_masks_depend_on_seed_sample_and_position_alone() -> None:
    tokens, samples = some_tokens(20), np.arange(100, 120)
    whole = masking().hide(tokens, np.ones(tokens.shape, bool), samples)
    for row in (0, 7, 19):
        alone = masking().hide(
            tokens[row : row + 1], np.ones((1, 64), bool), samples[row : row + 1]
        )
        assert all(np.array_equal(a[0], w[row]) for a, w in zip(alone, whole, strict=True))
    for other in (masking(seed=2).hide(tokens, np.ones(tokens.shape, bool), samples),
                  masking().hide(tokens, np.ones(tokens.shape, bool), samples + 20)):  # fmt: skip
        assert not np.array_equal(other[1], whole[1])


def test_only_eligible_tokens_are_masked() -> None:
    tokens = some_tokens(50)
    is_eligible = np.random.default_rng(1).random(tokens.shape) < 0.5
    _, targets = masking(fraction=0.99).hide(tokens, is_eligible, np.arange(50))
    assert not (targets != IGNORED)[~is_eligible].any()
    assert (targets != IGNORED)[is_eligible & (tokens > MASK)].mean() > 0.97


def test_losses_at_masked_tokens_equal_those_of_all_logits() -> None:
    model = tiny_model(is_causal=False)
    tokens = some_tokens(3, 32)
    inputs, targets = map(
        torch.from_numpy, masking(fraction=0.5).hide(tokens, tokens >= 0, np.arange(3))
    )
    logits = model(inputs)
    nats, is_right = fill_in(model, inputs, targets, None)
    is_target = targets != IGNORED
    expected = F.cross_entropy(logits[is_target], targets[is_target], reduction="none")
    assert torch.allclose(nats, expected, atol=1e-5)  # the same products in another order
    assert torch.equal(is_right, logits[is_target].argmax(-1) == targets[is_target])


def test_no_masked_tokens_give_no_losses() -> None:
    inputs = torch.from_numpy(some_tokens(2, 32))
    nats, is_right = fill_in(
        tiny_model(is_causal=False), inputs, torch.full_like(inputs, IGNORED), None
    )
    assert nats.shape == is_right.shape == (0,)


@pytest.mark.parametrize("document_mask", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize("kind", ["text", "chats"])
def test_the_measures_of_a_split_equal_sums_by_hand(
    kind: str, document_mask: bool, tmp_path: Path, tokenizer: Tokenizer, corpus: list[str]
) -> None:
    """By hand no position is padding, and with a document mask each document is read alone."""
    if kind == "text":
        rows = PackedSequences(write_text_sequences(tmp_path, tokenizer, corpus[:10]), "validation")
    else:
        rows = PackedSequences(write_chat_sequences(tmp_path, tokenizer, 30), "validation")
        assert rows.info.num_padding_tokens
    model, hidden = tiny_model(is_causal=False).eval(), masking(fraction=0.4)
    with torch.no_grad():
        for parameter in model.parameters():  # large, so that an error in attention shows
            parameter.mul_(8.0)
    found = measure_filled_in(
        model,
        rows,
        hidden,
        document_mask=document_mask,
        precision="fp32",
        advance=lambda count: None,
    )
    nats = right = count = 0.0
    for row in range(rows.num_sequences):
        arrays = rows.read([row])
        inputs, targets = hidden.hide(arrays.tokens[:, :-1], arrays.mask[:, :-1], np.array([row]))
        is_text = inputs[0] != rows.layout.pad_id
        ids = arrays.document_ids[0, :-1] if document_mask else np.zeros_like(inputs[0])
        for document in np.unique(ids[is_text]):
            own = is_text & (ids == document)
            with torch.no_grad():
                log_probabilities = model(torch.from_numpy(inputs[:, own]))[0].log_softmax(-1)
            wanted = targets[0, own]
            for position in np.flatnonzero(wanted != IGNORED):
                nats -= float(log_probabilities[position, wanted[position]])
                right += float(log_probabilities[position].argmax() == wanted[position])
                count += 1
    assert found.loss.value == pytest.approx(nats / count, rel=1e-5)
    assert found.accuracy.value == pytest.approx(right / count, rel=1e-5)
    assert found.loss.standard_error is not None
    objective = MaskedTokens(document_mask=document_mask, masking=hidden)
    batch = objective.make_batch(
        rows.read(np.arange(rows.num_sequences)), np.arange(rows.num_sequences)
    )
    learned, _ = fill_in(model, batch.inputs, batch.targets, batch.document_ids)
    assert float(learned.detach().mean()) == pytest.approx(nats / count, rel=1e-5), "as in training"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "chats"])
def test_pseudo_perplexity_masks_each_token_of_a_row_in_turn(
    kind: str, tmp_path: Path, tokenizer: Tokenizer, corpus: list[str]
) -> None:
    if kind == "text":
        rows = PackedSequences(write_text_sequences(tmp_path, tokenizer, corpus[:6]), "validation")
    else:  # which end in padding
        rows = PackedSequences(write_chat_sequences(tmp_path, tokenizer, 10), "validation")
    model, hidden = tiny_model(is_causal=False).eval(), masking()
    with torch.no_grad():
        for parameter in model.parameters():  # large, so that an error in attention shows
            parameter.mul_(3.0)
    done: list[int] = []
    found = pseudo_likelihood(
        model, rows, hidden, document_mask=False, precision="fp32", advance=done.append
    ).perplexity
    assert len(done) == rows.num_sequences == num_pseudo_sequences(rows) == found.num_examples
    costs: list[float] = []
    for row in range(rows.num_sequences):
        arrays = rows.read([row])
        tokens = torch.from_numpy(arrays.tokens[0, :-1])
        tokens = tokens[tokens != rows.layout.pad_id]
        for position in range(1, len(tokens)):  # a row's first token ends the row before
            if tokens[position] > MASK and arrays.mask[0, position]:
                inputs = tokens.clone()
                inputs[position] = MASK
                with torch.no_grad():
                    log_probabilities = model(inputs[None])[0, position].log_softmax(-1)
                costs.append(-float(log_probabilities[tokens[position]]))
    assert found.value == pytest.approx(math.exp(np.mean(costs)), rel=1e-4)
    assert found.standard_error is not None and 0 < found.standard_error < found.value
