"""Direct preference optimization: of two answers, make the chosen likelier than the rejected.

Nothing is sampled and no reward model is trained: the reward of an answer is how much likelier the
model has made it than the reference, which is the starting model.

Source: Rafailov et al. 2023, "Direct Preference Optimization", arXiv:2305.18290.

    B  sequences    T  positions    M  pairs of the fullest sequence    D  pairs of a split
"""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed
from torch import Tensor
from torch.nn import functional as F

from llm.artifact import ArtifactWriter, Json, write_bytes_atomically
from llm.config import AlignConfig, DpoConfig
from llm.data.packed import PackedArrays
from llm.errors import Interrupted
from llm.model.loss import IGNORED, ModelWithLoss
from llm.model.precision import autocast, fp32_products
from llm.model.transformer import Transformer
from llm.runtime.job import STARTING_MODEL, Job
from llm.training.objectives import Batch, TrainingStart, sums
from llm.training.processes import sum_over_processes
from llm.training.run import train

DIGEST_BYTES = 32  # sha256


def dpo(
    job: Job, writer: ArtifactWriter, config: AlignConfig, model: Transformer
) -> dict[str, Json]:
    """Train on preference pairs from the starting model, which is the reference too."""
    make_objective = partial(preference_pairs, config=config.dpo)
    return train(job, writer, model, config, Path(job.inputs[STARTING_MODEL]), make_objective)


def preference_pairs(start: TrainingStart, config: DpoConfig) -> "PreferencePairs":
    """Make the objective of a split, with the reference's log-probabilities of its pairs."""
    return PreferencePairs(
        config=config,
        bos_id=start.sequences.layout.bos_id,
        references=reference_log_probs(start),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferencePairs:
    """DPO's loss, per pair: -log sigmoid(chosen reward - rejected reward)."""

    config: DpoConfig
    bos_id: int
    references: Tensor
    """(D, 2): log-probabilities of each pair's chosen and rejected answer under the reference."""

    def make_batch(self, arrays: PackedArrays, samples: npt.NDArray[np.int64]) -> Batch:
        """Make a batch whose pairs carry their references."""
        batch = pair_batch(arrays, self.bos_id)
        pairs = batch.extras["pairs"]  # (B, M)
        references = self.references[pairs.clamp(min=0)]  # -> (B, M, 2); absent ones do not count
        return replace(batch, extras={"pairs": pairs, "references": references})

    def count_targets(self, batch: Batch) -> Tensor:
        """Return the number of pairs of each sequence, (B,)."""
        return _is_pair(batch).sum(dim=1)  # (B, M) -> (B,)

    def loss(self, model: ModelWithLoss, batch: Batch) -> dict[str, Tensor]:
        """Return the sum of the losses of all pairs, and those of the other measures."""
        found, is_pair = self._measures(model, batch), _is_pair(batch)
        totals = {name: (each * is_pair).sum() for name, each in found.items()}
        loss = totals.pop("loss")
        return {"loss": loss, **{f"train/{name}": each.detach() for name, each in totals.items()}}

    def measure(
        self, model: ModelWithLoss, batch: Batch, token_bytes: Tensor
    ) -> Mapping[str, Tensor]:
        """Return sums of the loss, of the pairs in the right order, and of the rewards."""
        found, is_pair = self._measures(model, batch), _is_pair(batch)
        return {name: sums(each * is_pair, is_pair) for name, each in found.items()}

    def _measures(self, model: ModelWithLoss, batch: Batch) -> dict[str, Tensor]:
        """Return loss and measures of each pair, by name, (B, M) each."""
        rewards = self._rewards(model, batch)  # (B, M, 2)
        margins = rewards[..., 0] - rewards[..., 1]  # (B, M, 2) -> (B, M)
        return {
            "loss": self._losses(margins),
            "preference_accuracy": margins > 0,  # at the start all are 0: none counts as right
            "reward_margin": margins,
            "chosen_reward": rewards[..., 0],
            "rejected_reward": rewards[..., 1],
        }

    def _losses(self, margins: Tensor) -> Tensor:
        """Return the loss of each pair, (B, M), from the differences of its rewards."""
        # "Conservative DPO": with a share s of pairs labeled the wrong way round, the loss is least
        # where sigmoid(margin) = 1 - s; without it a margin grows forever (Mitchell 2023, "A note
        # on DPO with noisy preferences")
        share = self.config.label_smoothing
        return -(1 - share) * F.logsigmoid(margins) - share * F.logsigmoid(-margins)

    def _rewards(self, model: ModelWithLoss, batch: Batch) -> Tensor:
        """Return beta log(p / p_reference) of each answer, (B, M, 2)."""
        # without dropout, as the reference: a margin would be mostly its noise
        model.eval()
        gains = answer_log_probs(model, batch) - batch.extras["references"]
        if self.config.is_length_normalized:  # else a long answer moves a margin most
            gains = gains / _num_targets(batch).clamp(min=1)
        return self.config.beta * gains


def reference_log_probs(start: TrainingStart) -> Tensor:
    """Return the log-probabilities of a split's answers under the starting model, (D, 2).

    They are computed once, by all processes together, and kept in the work folder: a training that
    resumes no longer has the starting weights, and the reference costs no memory in training.
    """
    path = start.job.work / f"references-{start.sequences.split}.bin"
    shape = (start.sequences.info.num_documents, 2)
    found = _read_references(path, shape)
    # the processes compute together or not at all: one alone would wait for the others forever
    num_found = sum_over_processes(start.accelerator, found is not None)[0]
    if found is None or num_found < start.accelerator.num_processes:
        found = _compute_references(start, torch.zeros(shape))
        if start.accelerator.is_main_process:
            data = found.numpy().astype("<f4").tobytes()
            write_bytes_atomically(path, hashlib.sha256(data).digest() + data)
    return found


def _compute_references(start: TrainingStart, references: Tensor) -> Tensor:
    """Fill in `references` (D, 2), each process those of its share of the sequences."""
    accelerator, sequences, size = start.accelerator, start.sequences, start.micro_batch_size
    device, precision = accelerator.device, start.config.precision
    num_sequences = sequences.num_sequences
    start.model.eval()
    with (
        # A margin of the first step must be 0 in bf16 too, whose rounding depends on the code that
        # runs: hence batches of the size of training, and gradients enabled, since `torch.compile`
        # makes other code without them.
        torch.set_grad_enabled(sequences.split == "train"),
        autocast(precision, device.type),
        fp32_products(precision, device.type),
    ):
        for first in range(0, num_sequences, size * accelerator.num_processes):
            if sum_over_processes(accelerator, start.job.is_stopping)[0]:
                raise Interrupted(f"{start.job.stage} was asked to stop before its first step")
            if accelerator.is_main_process:
                with suppress(Interrupted):  # all processes stop together, above
                    start.job.report_progress(first, num_sequences, "reference sequences")
            mine = first + accelerator.process_index * size + np.arange(size)
            # the last batch is filled up with the last sequence, again and again the same numbers
            batch = pair_batch(
                sequences.read(np.minimum(mine, num_sequences - 1)), sequences.layout.bos_id
            )
            batch.targets[mine >= num_sequences] = IGNORED
            found = answer_log_probs(start.model, batch.to(device)).detach().cpu()  # (B, M, 2)
            is_pair = _is_pair(batch)
            references[batch.extras["pairs"][is_pair]] = found[is_pair]
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(references)  # each is 0 but on one process: a union
    return references


def _read_references(path: Path, shape: tuple[int, int]) -> Tensor | None:
    """Return what an earlier attempt wrote; None if that is nothing, or damaged."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    digest, data = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    if hashlib.sha256(data).digest() != digest or len(data) != 4 * shape[0] * shape[1]:
        return None
    return torch.from_numpy(np.frombuffer(data, dtype="<f4").astype(np.float32)).view(shape)


def pair_batch(arrays: PackedArrays, bos_id: int) -> Batch:
    """Make a batch of pairs, as numbered in the split: extras `pairs` (B, M), absent ones -1."""
    halves = arrays.half_ids(bos_id)  # (B, T+1)
    pairs = np.full((len(halves), int(halves.max()) // 2 + 1), -1, dtype=np.int64)  # (B, M)
    sequences, positions = np.nonzero((arrays.tokens == bos_id) & (halves % 2 == 0))
    of_sequence = halves[sequences, positions] // 2
    pairs[sequences, of_sequence] = arrays.document_ids[sequences, positions]
    targets = np.where(arrays.mask[:, 1:], arrays.tokens[:, 1:], IGNORED)
    return Batch(
        inputs=torch.from_numpy(arrays.tokens[:, :-1]),  # (B, T+1) -> (B, T)
        targets=torch.from_numpy(targets),  # (B, T+1) -> (B, T)
        # attention stays within a half: the rejected answer must not see the chosen one
        document_ids=torch.from_numpy(halves[:, :-1]),  # (B, T+1) -> (B, T)
        extras={"pairs": torch.from_numpy(pairs)},
    )


def answer_log_probs(model: ModelWithLoss, batch: Batch) -> Tensor:
    """Return the log-probability of each pair's chosen and rejected answer, (B, M, 2)."""
    # the gradient of a pair is weighted by sigmoid(-margin), which all its tokens decide
    losses = model(batch.inputs, batch.targets, batch.document_ids, is_weighted=True)  # (B, T)
    return -_sum_halves(losses, batch)


def _num_targets(batch: Batch) -> Tensor:
    """Return the number of tokens of each answer, its end included, (B, M, 2)."""
    return _sum_halves((batch.targets != IGNORED).long(), batch)


def _is_pair(batch: Batch) -> Tensor:
    """Tell which of the M pairs are there, (B, M), and not in a sequence that fills up a batch."""
    return (_num_targets(batch) > 0).all(dim=2)


def _sum_halves(values: Tensor, batch: Batch) -> Tensor:
    """Sum values (B, T) over the positions of each half: (B, M, 2)."""
    assert batch.document_ids is not None
    num_pairs = batch.extras["pairs"].shape[1]
    sums = values.new_zeros(len(values), 2 * num_pairs)
    # padding, of value 0, is added to the first half
    sums = sums.scatter_add(1, batch.document_ids.clamp(min=0), values)  # (B, T) -> (B, 2M)
    return sums.unflatten(1, (num_pairs, 2))
