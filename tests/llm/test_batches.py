"""Which rows a step learns from: slices of one sequence, however many read it and how."""

from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.config import OptimizationConfig
from llm.data.rows import RowArrays, Rows, row_order
from llm.training.batches import NextToken, batches_of_steps


class NumberedRows:
    """Rows of five tokens, each of which says which row it is; odd rows end in padding."""

    seq_len = 4

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> RowArrays:
        """Return the rows as `Rows` does."""
        numbers = np.asarray(indices)[:, None]
        tokens = numbers * 10 + np.arange(5)
        mask = (np.arange(5) < 5 - numbers % 2) & (np.arange(5) > 0)
        return RowArrays(tokens, mask, np.zeros_like(tokens))


@settings(max_examples=30)
@given(
    num_rows=st.integers(1, 12),
    num_processes=st.sampled_from([1, 2, 3]),
    micro_batch_rows=st.integers(1, 7),
    tokens_at_once=st.integers(1, 200),
    first_step=st.integers(0, 9),
)
def test_steps_are_the_slices_of_one_sequence_however_they_are_read(
    num_rows: int,
    num_processes: int,
    micro_batch_rows: int,
    tokens_at_once: int,
    first_step: int,
) -> None:
    """The oracle holds the whole sequence: epoch after epoch, each a permutation."""
    config = OptimizationConfig(num_steps=9, rows_per_step=6)
    epochs = [row_order(7, epoch, np.arange(num_rows), num_rows) for epoch in range(9 * 6)]
    sequence = np.concatenate(epochs)[: 9 * 6].reshape(9, num_processes, -1)
    rows = NumberedRows(num_rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm.training.batches.TOKENS_AT_ONCE", tokens_at_once)
        for process in range(num_processes):
            steps = batches_of_steps(
                cast(Rows, rows),
                NextToken(is_document_masked=False),
                config,
                seed=7,
                first_step=first_step,
                process=process,
                num_processes=num_processes,
                micro_batch_rows=micro_batch_rows,
                device=torch.device("cpu"),
            )
            expected = sequence[first_step:, process]
            for step, row_numbers in zip(steps, expected, strict=True):
                sizes = [len(batch.inputs) for batch in step.micro_batches]
                assert sum(sizes) == 6 // num_processes and set(sizes[:-1]) <= {micro_batch_rows}
                inputs = torch.cat([batch.inputs for batch in step.micro_batches])
                targets = torch.cat([batch.targets for batch in step.micro_batches])
                assert inputs.tolist() == rows.read(row_numbers).tokens[:, :-1].tolist()
                assert step.num_targets == int((targets != -100).sum())
