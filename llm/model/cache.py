"""The key/value cache: keys and values of past positions, so that generation reads each token once.

B  sequences    K  key/value heads    S  columns (positions)    D  head width
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llm.config import ModelConfig
from llm.model.positions import head_dim_of


class KeyValueCache:
    """Keys and values per layer; column s holds position s of each sequence.

    Sequences may have different lengths. Prompts are padded on the right; padding is masked by
    position and overwritten by the tokens that follow.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_sequences: int,
        max_columns: int,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self._shape = (num_sequences, config.num_kv_heads, max_columns, head_dim_of(config))
        # by layer, allocated at the first append, which knows the dtype (autocast chooses it)
        self.keys: list[Tensor | None] = [None] * config.num_layers
        self.values: list[Tensor | None] = [None] * config.num_layers
        self.lengths = torch.zeros(num_sequences, dtype=torch.long, device=device)  # (B,)
        self.num_columns = 0
        """Length of the longest sequence, on the host: slicing then waits for no device."""
        self._sequences = torch.arange(num_sequences, device=device)[:, None]  # (B, 1)
        self.is_even = True
        """All sequences have the same length, so that new columns are one slice."""

    def positions(self, num_tokens: int) -> Tensor:
        """Return the positions (B, T) of the next `num_tokens` of each sequence."""
        return self.lengths[:, None] + torch.arange(num_tokens, device=self.lengths.device)

    def append(
        self, layer: int, keys: Tensor, values: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store (B, K, T, D) at `positions` (B or 1, T); return all columns, (B, K, S, D)."""
        return (
            self._store(self.keys, layer, keys, positions),
            self._store(self.values, layer, values, positions),
        )

    def advance(self, num_tokens: int) -> None:
        """Add `num_tokens` to every length, after all layers have appended them."""
        self.lengths = self.lengths + num_tokens
        self.num_columns += num_tokens

    def truncate(self, lengths: Sequence[int]) -> None:
        """Set the true lengths: drops padding, and draft tokens that were rejected."""
        self.lengths = torch.tensor(lengths, device=self.lengths.device)
        self.num_columns, self.is_even = max(lengths), min(lengths) == max(lengths)

    def keep(self, sequences: Tensor) -> None:
        """Keep these sequences only, so that finished ones cost nothing; one may be named often."""
        for stored in (self.keys, self.values):
            # one copy per drop; each later step computes fewer sequences
            stored[:] = [each if each is None else each[sequences] for each in stored]
        self._sequences = torch.arange(len(sequences), device=sequences.device)[:, None]
        self.truncate(self.lengths[sequences].tolist())

    def _store(
        self, stored: list[Tensor | None], layer: int, new: Tensor, positions: Tensor
    ) -> Tensor:
        whole = stored[layer]
        if whole is None:
            _, *rest = self._shape
            # Full length at once: growing by a column a token would copy everything each time.
            # Zeros, since masked columns enter as 0 * v, and 0 * nan of stale memory is nan.
            whole = stored[layer] = new.new_zeros((len(new), *rest))
        end = self.num_columns + new.shape[2]
        if self.is_even:
            whole[:, :, self.num_columns : end] = new
        else:
            # indexing by (B, 1) and (B, T) around a slice puts indexed axes first: (B, T, K, D)
            whole[self._sequences, :, positions] = new.transpose(1, 2)
        return whole[:, :, :end]  # a view: nothing is copied for attention
