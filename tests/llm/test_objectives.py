"""Objectives own their loss: the loop trains with objectives it has never heard of."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llm.config import OptimizationConfig
from llm.data.packed import PackedArrays, PackedSequences
from llm.model.loss import IGNORED, ModelWithLoss
from llm.model.transformer import Transformer
from llm.tokenizer.bpe import ByteLevelBPE
from llm.training.loop import Step, TrainingSetup, TrainState, training_steps
from llm.training.objectives import Batch, ModelWithObjective, NextToken, Objective
from llm.training.optimizers import make_optimizer
from llm.training.sequences import sample_sequences
from llm.training.validation import Validation, validate
from tests.llm.training_setup import (
    fresh_accelerator,
    tiny_model,
    write_chat_sequences,
    write_text_sequences,
)

CONFIG = OptimizationConfig(num_steps=6, global_batch_size=8, warmup_steps=2, learning_rate=1e-3)


@dataclass(frozen=True, kw_only=True)
class Preference:
    """DPO (arXiv 2305.18290): of two continuations, make the first likelier than the second.

    A packed sequence is cut in half here: the halves are the chosen and the rejected text.
    """

    reference: ModelWithLoss
    beta: float = 0.5

    def make_batch(self, arrays: PackedArrays, samples: npt.NDArray[np.int64]) -> Batch:
        """Make pairs (B, 2, T/2)."""
        inputs = torch.from_numpy(arrays.tokens[:, :-1]).unflatten(1, (2, -1))  # -> (B, 2, T/2)
        targets = torch.from_numpy(arrays.tokens[:, 1:]).unflatten(1, (2, -1))
        return Batch(inputs=inputs, targets=targets.clone(), document_ids=None)

    def count_targets(self, batch: Batch) -> Tensor:
        """Count pairs, not tokens."""
        return self._is_pair(batch).long()

    def loss(self, model: ModelWithLoss, batch: Batch) -> Tensor:
        """Sum -log sigmoid(beta * margin) over the pairs."""
        return (-F.logsigmoid(self.beta * self._margins(model, batch)) * self._is_pair(batch)).sum()

    def measure(self, model: ModelWithLoss, batch: Batch, token_bytes: Tensor) -> Tensor:
        """Return losses, pairs, pairs ranked right, and pairs again."""
        margins, count = self._margins(model, batch), self._is_pair(batch).sum()
        is_right = (margins > 0) & self._is_pair(batch)
        return torch.stack([self.loss(model, batch), count, is_right.sum(), count]).double()

    def metrics(self, total: float, count: float) -> dict[str, float]:
        """Return the share of pairs ranked right."""
        return {"preference_accuracy": total / count}

    def _is_pair(self, batch: Batch) -> Tensor:
        return (batch.targets != IGNORED).any(dim=(1, 2))  # (B, 2, T/2) -> (B,)

    def _margins(self, model: ModelWithLoss, batch: Batch) -> Tensor:
        with torch.no_grad():
            expected = self._log_probs(self.reference, batch)
        gains = self._log_probs(model, batch) - expected
        return gains[:, 0] - gains[:, 1]

    def _log_probs(self, model: ModelWithLoss, batch: Batch) -> Tensor:
        losses = model(batch.inputs.flatten(0, 1), batch.targets.flatten(0, 1), None)
        return -losses.sum(dim=1).unflatten(0, (-1, 2))  # (2B, T/2) -> (B, 2)


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


@pytest.mark.parametrize("micro_batch_size", [8, 3])  # at 3 the last is filled up
def test_a_preference_objective_trains_in_the_loop_as_it_is(
    folder: Path, micro_batch_size: int
) -> None:
    sequences = PackedSequences(folder, "train")
    model, reference = tiny_model(), tiny_model()
    objective = Preference(reference=ModelWithLoss(reference))
    steps = run(model, sequences, objective, micro_batch_size)
    assert steps[0].loss == pytest.approx(np.log(2), abs=1e-6), "model and reference are equal"
    assert [step.num_targets for step in steps] == [8] * 6, "pairs, not tokens"
    assert check(model, folder, objective).metrics.keys() == {"preference_accuracy"}

    expected = tiny_model()
    optimizer = make_optimizer(expected, CONFIG)
    for number, step in enumerate(steps[:2]):
        indices = sample_sequences(3, np.arange(8) + 8 * number, sequences.num_sequences)
        tokens = torch.from_numpy(sequences.read(indices).tokens)
        inputs, targets = (part.unflatten(1, (2, -1)) for part in (tokens[:, :-1], tokens[:, 1:]))
        halves = [(inputs[:, half], targets[:, half]) for half in range(2)]
        gains = [
            sequence_log_probs(expected, half) - sequence_log_probs(reference, half).detach()
            for half in halves
        ]
        loss = -F.logsigmoid(0.5 * (gains[0] - gains[1])).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
        # sums of log-probabilities near -100 in fp32, of which differences of 1e-3 remain
        assert step.loss == pytest.approx(loss.item(), rel=1e-4)
        assert step.gradient_norm == pytest.approx(norm.item(), rel=1e-3)
        optimizer.set_learning_rates((number + 1) / 3)
        optimizer.step()
        optimizer.zero_grad()


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
