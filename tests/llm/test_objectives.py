"""Objectives own their loss: the loop trains with objectives it has never heard of."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from llm.config import OptimizationConfig
from llm.data.packed import PackedArrays, PackedSequences
from llm.model.loss import IGNORED, ModelWithLoss
from llm.model.transformer import Transformer
from llm.tokenizer.bpe import ByteLevelBPE
from llm.training.loop import Step, TrainingSetup, TrainState, training_steps
from llm.training.objectives import Batch, ModelWithObjective, NextToken, Objective
from llm.training.optimizers import make_optimizer
from llm.training.validation import Validation, validate
from tests.llm.training_setup import (
    fresh_accelerator,
    tiny_model,
    write_chat_sequences,
    write_text_sequences,
)

CONFIG = OptimizationConfig(num_steps=6, global_batch_size=8, warmup_steps=2, learning_rate=1e-3)


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(NextToken):
    """REINFORCE: each sequence's log-probability, weighted by its reward, per episode."""

    rewarded: int

    def make_batch(self, arrays: PackedArrays, samples: npt.NDArray[np.int64]) -> Batch:
        """Add rewards (B,): 1 where the first target is below the token `rewarded`, else -1."""
        batch = super().make_batch(arrays, samples)
        rewards = (batch.targets[:, 0] < self.rewarded).float() * 2 - 1
        return replace(batch, extras={"rewards": rewards})

    def count_targets(self, batch: Batch) -> Tensor:
        """Count episodes."""
        return (batch.targets != IGNORED).any(dim=1).long()

    def loss(self, model: ModelWithLoss, batch: Batch) -> Tensor:
        """Sum -reward * log p(sequence)."""
        losses = model(batch.inputs, batch.targets, batch.document_ids).sum(dim=1)
        return (batch.extras["rewards"] * losses).sum()


@pytest.fixture
def folder(tmp_path: Path, tokenizer: ByteLevelBPE, corpus: list[str]) -> Path:
    """Packed text."""
    return write_text_sequences(tmp_path / "text", tokenizer, corpus[:40])


def run(
    model: Transformer, sequences: PackedSequences, objective: Objective, micro_batch_size: int
) -> list[Step]:
    accelerator = fresh_accelerator()
    module = ModelWithObjective(ModelWithLoss(model), objective)
    training = TrainingSetup(
        accelerator=accelerator,
        model=accelerator.prepare_model(module),
        optimizer=make_optimizer(model, CONFIG),
        sequences=sequences,
        objective=objective,
        config=CONFIG,
        stage="pretrain",
        seed=3,
        micro_batch_size=micro_batch_size,
    )
    return list(training_steps(training, TrainState(), is_stopping=lambda: False))


def check(model: Transformer, folder: Path, objective: Objective) -> Validation:
    return validate(
        fresh_accelerator(),
        ModelWithLoss(model),
        PackedSequences(folder, "validation"),
        objective,
        np.ones(model.vocab_size, dtype=np.int64),
        precision="fp32",
        num_sequences=5,
        max_batch_size=2,
    )


def sequence_log_probs(model: Transformer, tokens: tuple[Tensor, Tensor]) -> Tensor:
    """The oracle: plain torch, all logits at once. Inputs and targets (B, T) -> (B,)."""
    inputs, targets = tokens
    log_probs = model(inputs).log_softmax(dim=-1)
    return log_probs.gather(-1, targets[..., None]).squeeze(-1).sum(dim=-1)


def test_a_policy_gradient_objective_raises_what_is_rewarded(folder: Path) -> None:
    sequences = PackedSequences(folder, "train")
    objective = PolicyGradient(document_mask=False, rewarded=200)
    model, before = tiny_model(), tiny_model()
    whole, parts = (run(tiny_model(), sequences, objective, size)[0] for size in (8, 3))
    assert whole.num_targets == parts.num_targets == 8, "episodes"
    # the same sums in another order; positive and negative rewards cancel
    assert whole.loss == pytest.approx(parts.loss, rel=1e-4, abs=1e-4)
    run(model, sequences, objective, 3)
    arrays = sequences.read(np.arange(sequences.num_sequences))
    batch = objective.make_batch(arrays, np.arange(sequences.num_sequences))
    pair = (batch.inputs, batch.targets)
    gains = (sequence_log_probs(model, pair) - sequence_log_probs(before, pair)).detach()
    rewards = batch.extras["rewards"]
    assert {-1.0, 1.0} == set(rewards.tolist())
    assert gains[rewards > 0].mean() > gains[rewards < 0].mean()
    assert check(model, folder, objective).metrics.keys() == {"bits_per_byte"}


def test_a_slice_of_a_batch_slices_every_tensor() -> None:
    tensor = torch.arange(12).view(4, 3)
    batch = Batch(
        inputs=tensor, targets=tensor + 1, document_ids=tensor + 2, extras={"rewards": tensor[:, 0]}
    )
    part = batch.sequences(1, 2)
    assert [t.tolist() for t in part.tensors()] == [t[1:3].tolist() for t in batch.tensors()]
    assert len(part.tensors()) == 4


def test_a_target_is_the_next_token_and_padding_is_none(
    tmp_path: Path, tokenizer: ByteLevelBPE
) -> None:
    sequences = PackedSequences(write_chat_sequences(tmp_path, tokenizer, 60), "train")
    arrays = sequences.read([0, 1])
    batch = NextToken(document_mask=False).make_batch(arrays, np.arange(2))
    mask = arrays.mask[:, 1:]
    assert np.array_equal(
        batch.inputs.numpy()[:, 1:][mask[:, :-1]], arrays.tokens[:, 1:-1][mask[:, :-1]]
    )
    assert np.array_equal(batch.targets.numpy()[mask], arrays.tokens[:, 1:][mask])
    assert (batch.targets.numpy()[~mask] == -100).all()
    assert (batch.targets != -100).sum() == mask.sum() > 0


def test_loss_on_all_learns_every_token_of_chats_but_the_first_and_no_other_of_text(
    tmp_path: Path, tokenizer: ByteLevelBPE, corpus: list[str]
) -> None:
    chats = PackedSequences(write_chat_sequences(tmp_path / "chats", tokenizer, 60), "train")
    text = PackedSequences(write_text_sequences(tmp_path / "text", tokenizer, corpus[:40]), "train")
    some = np.arange(8)
    objectives = [
        NextToken(document_mask=False, has_all_targets=has_all) for has_all in (False, True)
    ]
    answers, all_tokens = (each.make_batch(chats.read(some), some) for each in objectives)
    next_tokens = chats.read(some).tokens[:, 1:]
    is_learned = next_tokens != tokenizer.pad_id  # each sequence holds one chat
    assert all_tokens.targets.tolist() == np.where(is_learned, next_tokens, IGNORED).tolist()
    assert (answers.targets != IGNORED).sum() < is_learned.sum()
    of_text = [each.make_batch(text.read(some), some).targets.tolist() for each in objectives]
    assert of_text[0] == of_text[1]
