"""The keys and values of positions already read, kept so that generation reads each token once.

Shapes: B rows, K key/value heads, S columns (positions), D head width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llm.config import ModelConfig
from llm.model.shape import head_dim_of


class KeyValueCache:
    """Per layer, the keys and values of every row; column s holds position s of its row.

    Rows may be of unequal length: `lengths` says how many columns of each are real. Prompts are
    padded on the right; what padding leaves in a column is never looked at and is overwritten by
    the next token.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_rows: int,
        num_columns: int,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self._shape = (num_rows, config.num_kv_heads, num_columns, head_dim_of(config))
        # of every layer, made when it first has something to keep, in that one's type
        self.keys: list[Tensor | None] = [None] * config.num_layers
        self.values: list[Tensor | None] = [None] * config.num_layers
        self.lengths = torch.zeros(num_rows, dtype=torch.long, device=device)  # (B,)
        self.num_columns = 0
        """The longest row's; a plain number, so that slicing waits for no device."""
        self._rows = torch.arange(num_rows, device=device)[:, None]  # (B, 1)
        self.is_even = True
        """All rows are of the same length, so that a column is one slice."""

    def positions(self, num_tokens: int) -> Tensor:
        """Return the positions (B, T) of the next `num_tokens` of each row."""
        return self.lengths[:, None] + torch.arange(num_tokens, device=self.lengths.device)

    def append(
        self, layer: int, keys: Tensor, values: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store (B, K, T, D) at `positions` (B or 1, T) and return all columns so far,
        (B, K, S, D).
        """
        return (
            self._store(self.keys, layer, keys, positions),
            self._store(self.values, layer, values, positions),
        )

    def advance(self, num_tokens: int) -> None:
        """Count `num_tokens` more in every row, after all layers have appended them."""
        self.lengths = self.lengths + num_tokens
        self.num_columns += num_tokens

    def cut(self, lengths: Sequence[int]) -> None:
        """Say how long each row really is: padding on its right, or what is taken back, goes."""
        self.lengths = torch.tensor(lengths, device=self.lengths.device)
        self.num_columns, self.is_even = max(lengths), min(lengths) == max(lengths)

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all rows but these, so that finished ones cost nothing."""
        for stored in (self.keys, self.values):
            stored[:] = [each if each is None else each[rows] for each in stored]
        self._rows = self._rows[: len(rows)]
        self.cut(self.lengths[rows].tolist())

    def _store(
        self, stored: list[Tensor | None], layer: int, new: Tensor, positions: Tensor
    ) -> Tensor:
        whole = stored[layer]
        if whole is None:
            _, *rest = self._shape
            whole = stored[layer] = new.new_zeros((len(new), *rest))
        end = self.num_columns + new.shape[2]
        if self.is_even:
            whole[:, :, self.num_columns : end] = new
        else:
            # indexing by (B, 1) and (B, T) around a slice puts indexed axes first: (B, T, K, D)
            whole[self._rows, :, positions] = new.transpose(1, 2)
        return whole[:, :, :end]
