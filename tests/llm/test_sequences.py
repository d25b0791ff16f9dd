"""The sequences of steps: the stage's data and replayed text, each in its own endless order."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.config import OptimizationConfig
from llm.data.packed import PackedArrays, PackedSequences, sequence_order
from llm.tokenizer.bpe import ByteLevelBPE
from llm.training.batches import batches_of_steps
from llm.training.objectives import NextToken
from llm.training.sequences import Source, read_samples
from tests.llm.training_setup import SEQ_LEN, write_chat_sequences, write_text_sequences


class Numbered:
    """Sequences of two tokens: the number of the source, and the sequence's own."""

    def __init__(self, source: int, num_sequences: int) -> None:
        self.source, self.num_sequences = source, num_sequences

    def read(self, indices: npt.NDArray[np.int64]) -> PackedArrays:
        """Return sequences as `PackedSequences` does."""
        tokens = np.stack([np.full(len(indices), self.source), indices], axis=1)
        return PackedArrays(tokens, tokens > 0, tokens)


def endless_order(seed: int, num_sequences: int) -> Iterator[int]:
    """Every epoch's order, one after the other."""
    for epoch in count():
        yield from sequence_order(seed, epoch, np.arange(num_sequences), num_sequences).tolist()


@settings(max_examples=40)
@given(
    sources=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=3),
    samples=st.lists(st.integers(0, 60), min_size=1, max_size=20),
)
def test_every_step_takes_the_next_sequences_of_each_source(
    sources: list[tuple[int, int]], samples: list[int]
) -> None:
    """The oracle writes all steps down, one after the other."""
    orders = [endless_order(seed, n) for seed, (_, n) in enumerate(sources)]
    endless: list[list[int]] = []
    while len(endless) <= 60:
        for number, (per_step, _) in enumerate(sources):
            endless += [[number, next(orders[number])] for _ in range(per_step)]
    made = [
        Source(sequences=cast(PackedSequences, Numbered(seed, n)), seed=seed, per_step=per_step)
        for seed, (per_step, n) in enumerate(sources)
    ]
    found = read_samples(made, np.array(samples))
    assert found.tokens.tolist() == [endless[sample] for sample in samples]


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_replayed_text_has_all_its_tokens_as_targets_and_chats_their_answers(
    num_processes: int, tmp_path: Path, tokenizer: ByteLevelBPE, corpus: list[str]
) -> None:
    text_folder = write_text_sequences(tmp_path / "text", tokenizer, corpus[:20])
    text = PackedSequences(text_folder, "train")
    chats = PackedSequences(write_chat_sequences(tmp_path / "chats", tokenizer, 20), "train")
    replay = Source(sequences=text, seed=9, per_step=2)
    shares = [
        batches_of_steps(
            chats,
            NextToken(document_mask=True),
            OptimizationConfig(num_steps=4, global_batch_size=6),
            seed=7,
            first_step=1,
            process=process,
            num_processes=num_processes,
            micro_batch_size=1,
            device=torch.device("cpu"),
            replay=replay,
        )
        for process in range(num_processes)
    ]
    own = Source(sequences=chats, seed=7, per_step=4)
    for number, parts in enumerate(zip(*shares, strict=True), start=1):
        batches = [batch for part in parts for batch in part.micro_batches]
        targets = torch.cat([batch.targets for batch in batches])
        expected = read_samples([own, replay], np.arange(6) + 6 * number)
        # filled-up passes have no targets, and each sequence has some
        targets = targets[(targets >= 0).any(dim=1)]
        is_target = torch.from_numpy(expected.mask[:, 1:])
        assert torch.equal(targets >= 0, is_target)
        assert torch.equal(targets[is_target], torch.from_numpy(expected.tokens[:, 1:])[is_target])
        assert is_target[4:].sum() >= 2 * SEQ_LEN - 2 and is_target[:4].sum() < 2 * SEQ_LEN
        assert sum(part.num_targets for part in parts) == int(is_target.sum())
        assert all(batch.document_ids is not None for batch in batches)


def test_epochs_count_the_sequences_of_their_source_alone() -> None:
    source = Source(sequences=cast(PackedSequences, Numbered(0, 8)), seed=1, per_step=2)
    assert source.epochs(6) == 1.5
