"""Batches of steps: slices of one endless sequence, however many processes read it."""

from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.config import OptimizationConfig
from llm.data.packed import PackedArrays, PackedSequences, sequence_order
from llm.recipes import load_config, recipe_names
from llm.training.batches import batches_of_steps
from llm.training.objectives import NextToken
from llm.training.shares import even_size, share_of


class NumberedSequences:
    """Sequences of five tokens that encode their own number; odd ones end in padding."""

    seq_len = 4

    def __init__(self, num_rows: int) -> None:
        self.num_sequences = num_rows

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> PackedArrays:
        """Return sequences as `PackedSequences` does."""
        numbers = np.asarray(indices)[:, None]
        tokens = numbers * 10 + np.arange(5)
        mask = (np.arange(5) < 5 - numbers % 2) & (np.arange(5) > 0)
        return PackedArrays(tokens, mask, np.zeros_like(tokens))


@settings(max_examples=60)
@given(
    num_rows=st.integers(1, 12),
    num_processes=st.integers(1, 8),
    room=st.integers(1, 7),
    tokens_at_once=st.integers(1, 200),
    first_step=st.integers(0, 9),
)
def test_steps_are_the_slices_of_one_sequence_however_they_are_read(
    num_rows: int, num_processes: int, room: int, tokens_at_once: int, first_step: int
) -> None:
    """The oracle holds the whole sequence: epoch after epoch, each a permutation."""
    config = OptimizationConfig(num_steps=9, global_batch_size=6)
    epochs = [sequence_order(7, epoch, np.arange(num_rows), num_rows) for epoch in range(9 * 6)]
    expected = np.concatenate(epochs)[: 9 * 6].reshape(9, 6)[first_step:]
    sequences = NumberedSequences(num_rows)
    size = even_size(-(-6 // num_processes), room)
    found: list[list[list[int]]] = [[] for _ in expected]
    num_targets = [0 for _ in expected]
    shapes: set[tuple[int, int]] = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm.training.batches.READ_TOKENS", tokens_at_once)
        for process in range(num_processes):
            steps = batches_of_steps(
                cast(PackedSequences, sequences),
                NextToken(document_mask=False),
                config,
                seed=7,
                first_step=first_step,
                process=process,
                num_processes=num_processes,
                micro_batch_size=size,
                device=torch.device("cpu"),
            )
            for number, step in enumerate(steps):
                shapes |= {(len(step.micro_batches), len(b.inputs)) for b in step.micro_batches}
                inputs = torch.cat([batch.inputs for batch in step.micro_batches])
                targets = torch.cat([batch.targets for batch in step.micro_batches])
                is_learned = (targets != -100).any(dim=1)  # each of these sequences has a target
                found[number] += inputs[is_learned].tolist()
                num_targets[number] += step.num_targets
                assert step.num_targets == int((targets != -100).sum())
    assert found == [sequences.read(numbers).tokens[:, :-1].tolist() for numbers in expected]
    assert num_targets == [int(sequences.read(numbers).mask.sum()) for numbers in expected]
    assert len(shapes) == min(1, len(expected)), "equal numbers of forward passes, of one shape"
    assert all(height <= room for _, height in shapes)


@given(share=st.integers(1, 600), room=st.integers(1, 600))
def test_an_even_size_fits_wastes_little_and_takes_few_passes(share: int, room: int) -> None:
    size = even_size(share, room)
    passes = -(-share // size)
    assert size <= room
    assert passes <= 2 * -(-share // room)
    divisors = [each for each in range(1, room + 1) if share % each == 0 and 2 * each > room]
    assert size == min(share, room) if share <= room else not divisors or size == max(divisors)
    assert passes * size - share < passes, "less than one sequence of padding a pass"


@pytest.mark.parametrize(
    ("share", "room", "expected"),
    [(512, 50, 32), (512, 28, 16), (64, 28, 16), (512, 8, 8), (509, 50, 34), (7, 100, 7)],
)
def test_even_sizes_of_known_machines(share: int, room: int, expected: int) -> None:
    assert even_size(share, room) == expected


@pytest.mark.parametrize("recipe", recipe_names())
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_every_recipe_trains_on_1_to_8_devices(recipe: str, stage: str) -> None:
    """Each process has a share, the shares are the step, and none is longer by two."""
    num_sequences = getattr(load_config(recipe), stage).global_batch_size
    for num_processes in range(1, 9):
        load_config(recipe, [f"runtime.num_processes={num_processes}"])
        shares = [share_of(num_sequences, rank, num_processes) for rank in range(num_processes)]
        assert [index for share in shares for index in share] == list(range(num_sequences))
        assert len(shares[0]) > 0
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
