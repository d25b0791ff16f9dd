"""Prompts and sampled answers as packed sequences, so that little of a forward pass is padding.

B  sequences    T  positions    A  answers
"""

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from llm.config import GrpoConfig
from llm.data.packed import PADDING_ID, PackedArrays
from llm.data.packing import pack_best_fit
from llm.training.rollouts import Group
from llm.training.shares import even_size

MIN_POSITIONS = 64  # of a sequence: shorter ones leave matrix products too small


class PackedAnswers:
    """The answers of one process's groups, each after its prompt, packed into sequences."""

    def __init__(
        self, groups: Sequence[Group], config: GrpoConfig, pad_id: int, seq_len: int
    ) -> None:
        self.groups = [group for group in groups if has_gradient(group, config)]
        self._pad_id = pad_id
        self._answers = [
            (group.prompt, answer) for group in self.groups for answer in group.answers
        ]
        self.advantages = [
            [advantage] * len(answer)
            for group in self.groups
            for answer, advantage in zip(
                group.answers,
                group.advantages(divides_by_spread=config.divides_by_spread),
                strict=True,
            )
        ]
        """Of each token of each answer."""
        lengths = np.array([len(prompt) + len(ids) for prompt, ids in self._answers], np.int64)
        longest = int(lengths.max(initial=0))
        # powers of two: few shapes for a compiled model, and several answers in most sequences
        enough = 1 << (longest - 2).bit_length() if longest > 2 else 1
        self._positions = min(max(enough, MIN_POSITIONS), seq_len)
        segments = pack_best_fit(lengths, self._positions)
        order = np.argsort(segments.document)
        self._sequences, self._starts = segments.sequence[order], segments.start[order]  # 2 x (A,)

    def filled_up(self, num_positions: int) -> tuple[PackedArrays, int]:
        """Return the sequences and the size of a micro-batch of at most `num_positions`.

        The last micro-batch is filled up with padding. One without any answer is there if there is
        none: each process must take part in the backward pass.
        """
        num_sequences = max(1, int(self._sequences.max(initial=-1)) + 1)
        size = even_size(num_sequences, max(1, num_positions // self._positions))
        shape = (-(-num_sequences // size) * size, self._positions + 1)
        arrays = PackedArrays(
            tokens=np.full(shape, self._pad_id, dtype=np.int64),
            mask=np.zeros(shape, dtype=np.bool_),
            document_ids=np.full(shape, PADDING_ID, dtype=np.int64),
        )
        for number, (prompt, answer) in enumerate(self._answers):
            row, start = self._sequences[number], self._starts[number]
            middle, end = start + len(prompt), start + len(prompt) + len(answer)
            arrays.tokens[row, start:end] = [*prompt, *answer]
            arrays.mask[row, middle:end] = True
            arrays.document_ids[row, start:end] = number
        return arrays, size

    def per_token(self, values: Sequence[Sequence[float]], num_sequences: int) -> Tensor:
        """Return values of each answer's tokens at the positions of their targets, (B, T)."""
        found = torch.zeros(num_sequences, self._positions)
        for number, some in enumerate(values):
            found[self._sequences[number], self._span(number)] = torch.tensor(some)
        return found

    def per_answer(self, values: Tensor) -> list[list[list[float]]]:
        """Return the values (B, T) of each answer's tokens, by group."""
        on_host = values.cpu()
        flat = iter(
            cast(list[float], on_host[self._sequences[number], self._span(number)].tolist())
            for number in range(len(self._answers))
        )
        return [[next(flat) for _ in group.answers] for group in self.groups]

    def _span(self, number: int) -> slice:
        prompt, answer = self._answers[number]
        # the token at position t + 1 is the target at t
        first = int(self._starts[number]) + len(prompt) - 1
        return slice(first, first + len(answer))


def has_gradient(group: Group, config: GrpoConfig) -> bool:
    """Tell whether training on a group changes anything."""
    # with a divergence to reduce, equal rewards have a gradient too
    return not group.is_failed and (bool(config.kl_coefficient) or not group.is_equal)
