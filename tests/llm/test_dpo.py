"""DPO on packed pairs: equal to the formula on each answer alone, in the loop and in validation."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llm.config import AlignConfig, DpoConfig, RuntimeConfig
from llm.data.packed import PackedSequences
from llm.model.loss import IGNORED, ModelWithLoss
from llm.model.transformer import Transformer
from llm.runtime.job import Job
from llm.tokenizer.bpe import ByteLevelBPE
from llm.tokenizer.load import load_tokenizer
from llm.training import dpo
from llm.training.dpo import PreferencePairs, answer_log_probs, pair_batch, reference_log_probs
from llm.training.objectives import TrainingStart
from tests.llm.training_setup import (
    PAIRS_SEQ_LEN,
    fresh_accelerator,
    tiny_model,
    write_preference_sequences,
)

pair_model = partial(tiny_model, seq_len=PAIRS_SEQ_LEN)
LEARNED = {"positions": "learned", "logit_soft_cap": 5.0, "tie_embeddings": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: ByteLevelBPE) -> Path:
    """Pairs of unequal lengths, several to a sequence."""
    pairs = [
        (f"add {n}", f"the sum is {n + 1}", "none" if n % 3 else "I do not know" * (1 + n % 2))
        for n in range(40)
    ]
    splits = {"train": pairs[:30], "validation": pairs[30:]}
    return write_preference_sequences(tmp_path_factory.mktemp("pairs"), tokenizer, splits)


def halves_alone(sequences: PackedSequences) -> list[list[tuple[Tensor, Tensor]]]:
    """The oracle's data: tokens and mask of each half of each pair, by the pair's ordinal."""
    arrays = sequences.read(range(sequences.num_sequences))
    found: list[list[tuple[Tensor, Tensor]]] = []
    for ordinal in range(sequences.info.num_documents):
        is_pair = arrays.document_ids == ordinal
        tokens, mask = (
            torch.from_numpy(arrays.tokens[is_pair]),
            torch.from_numpy(arrays.mask[is_pair]),
        )
        _, second = (tokens == sequences.layout.bos_id).nonzero().flatten().tolist()
        found.append([(tokens[:second], mask[:second]), (tokens[second:], mask[second:])])
    return found


def log_probs_alone(model: Transformer, pairs: list[list[tuple[Tensor, Tensor]]]) -> Tensor:
    """Sum of the answers' log-probabilities, each half a sequence of its own: (pairs, 2)."""
    rows = []
    for pair in pairs:
        for tokens, mask in pair:
            log_probs = model(tokens[None, :-1])[0].log_softmax(dim=-1)  # (T, V)
            of_targets = log_probs.gather(-1, tokens[1:, None]).squeeze(-1)
            rows.append((of_targets * mask[1:]).sum())
    return torch.stack(rows).view(-1, 2)


def trl_loss(policy: Tensor, reference: Tensor, config: DpoConfig) -> Tensor:
    """The losses as trl.DPOTrainer writes them (loss_type="sigmoid"), from (pairs, 2)."""
    chosen_logratios, rejected_logratios = (policy - reference).unbind(dim=1)
    delta_score = chosen_logratios - rejected_logratios
    return (
        -F.logsigmoid(config.beta * delta_score) * (1 - config.label_smoothing)
        - F.logsigmoid(-config.beta * delta_score) * config.label_smoothing
    )


@pytest.mark.parametrize("shape", [{}, LEARNED], ids=["rope", "learned"])
@pytest.mark.parametrize(
    "config",
    [
        DpoConfig(),
        DpoConfig(beta=0.5, label_smoothing=0.2),
        DpoConfig(beta=2.0, is_length_normalized=True),
    ],
    ids=["plain", "smoothed", "normalized"],
)
def test_loss_and_gradients_of_packed_pairs_equal_trls_formula_on_each_answer_alone(
    folder: Path, config: DpoConfig, shape: dict[str, Any]
) -> None:
    sequences = PackedSequences(folder, "train")
    assert sequences.num_sequences < sequences.info.num_documents / 1.5, "several to a sequence"
    model, pairs = pair_model(**shape), halves_alone(sequences)
    with torch.no_grad():  # so that margins are of both signs
        noise = torch.randn(len(pairs), 2, generator=torch.Generator().manual_seed(0))
        reference = log_probs_alone(model, pairs) + 3 * noise
    objective = PreferencePairs(config=config, bos_id=sequences.layout.bos_id, references=reference)
    batch = objective.make_batch(sequences.read(range(sequences.num_sequences)), np.arange(0))
    assert objective.count_targets(batch).sum() == len(pairs)
    found = objective.loss(ModelWithLoss(model), batch)["loss"]
    found.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    policy = log_probs_alone(model, pairs)
    if config.is_length_normalized:
        lengths = torch.tensor([[mask.sum() for _, mask in pair] for pair in pairs])
        policy, reference = policy / lengths, reference / lengths
    expected = trl_loss(policy, reference, config).sum()
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-5)

    with torch.no_grad():
        measured = objective.measure(ModelWithLoss(model), batch, torch.zeros(0))
    rewards = config.beta * (policy - reference).detach()
    margins = rewards[:, 0] - rewards[:, 1]
    assert {name: float(both[0] / both[1]) for name, both in measured.items()} == pytest.approx(
        {
            "loss": expected.item() / len(pairs),
            "preference_accuracy": (margins > 0).float().mean().item(),
            "reward_margin": margins.mean().item(),
            "chosen_reward": rewards[:, 0].mean().item(),
            "rejected_reward": rewards[:, 1].mean().item(),
        },
        rel=1e-4,
        abs=1e-5,  # means of rewards of both signs
    )
    assert 0 < float(measured["preference_accuracy"][0]) < len(pairs), "some of each"


@torch.no_grad()
def test_an_answer_is_seen_alone(folder: Path) -> None:
    sequences = PackedSequences(folder, "train")
    batch = pair_batch(sequences.read([0]), sequences.layout.bos_id)
    model = ModelWithLoss(pair_model(positions="learned"))
    before = answer_log_probs(model, batch)
    assert batch.document_ids is not None
    is_other = (batch.document_ids != 1) & (batch.inputs != sequences.layout.bos_id)
    changed = replace(batch, inputs=torch.where(is_other, batch.inputs ^ 1, batch.inputs))
    after = answer_log_probs(model, changed)
    assert after[0, 0, 1] == before[0, 0, 1]
    assert (after != before).sum() == before.numel() - 1


@torch.no_grad()
def test_sequences_without_targets_add_nothing(folder: Path) -> None:
    sequences = PackedSequences(folder, "train")
    references = torch.randn(sequences.info.num_documents, 2)
    objective = PreferencePairs(
        config=DpoConfig(), bos_id=sequences.layout.bos_id, references=references
    )
    model = ModelWithLoss(pair_model())
    one = objective.make_batch(sequences.read([1]), np.arange(1))
    both = objective.make_batch(sequences.read([1, 0]), np.arange(2))
    both.targets[1:] = IGNORED
    assert objective.count_targets(both).tolist() == [*objective.count_targets(one).tolist(), 0]
    found, expected = objective.loss(model, both), objective.loss(model, one)
    for name, each in found.items():
        assert each.item() == pytest.approx(expected[name].item(), rel=1e-5), name
    for name, sums in objective.measure(model, both, torch.zeros(0)).items():
        alone = objective.measure(model, one, torch.zeros(0))[name]
        torch.testing.assert_close(sums, alone, rtol=1e-5, atol=1e-5)


@pytest.fixture
def start(folder: Path, tmp_path: Path, tokenizer_folder: Path) -> TrainingStart:
    """A training of 3 sequences in a batch, which do not divide those of the split."""
    return TrainingStart(
        job=Job(stage="align", settings={}, work=tmp_path, runtime=RuntimeConfig()),
        config=AlignConfig(precision="fp32"),
        accelerator=fresh_accelerator(),
        model=ModelWithLoss(pair_model()),
        tokenizer=load_tokenizer(tokenizer_folder),
        sequences=PackedSequences(folder, "train"),
        micro_batch_size=3,
        seed=0,
    )


def test_references_are_those_of_every_answer_alone_and_are_computed_once(
    start: TrainingStart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = reference_log_probs(start)
    with torch.no_grad():
        expected = log_probs_alone(start.model.model, halves_alone(start.sequences))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert not found.requires_grad

    file = tmp_path / "references-train.bin"
    content = file.read_bytes()
    later = replace(start, model=ModelWithLoss(pair_model(seed=1)))  # weights of a checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(dpo, "answer_log_probs", None)  # calling it would fail
        assert torch.equal(reference_log_probs(later), found)
    for damaged in (b"", content[:-4], content[:40] + b"\0" + content[41:]):
        file.write_bytes(damaged)
        assert torch.equal(reference_log_probs(start), found)
        assert file.read_bytes() == content
