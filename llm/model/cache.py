"""The keys and values of positions already read, kept so that generation reads each token once.

Shapes: B rows, K key/value heads, S columns (positions), D head width.
"""

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
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (
            config.num_layers,
            num_rows,
            config.num_kv_heads,
            num_columns,
            head_dim_of(config),
        )
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(num_rows, dtype=torch.long, device=device)  # (B,)
        self.num_columns = (
            0  # the longest row's; a plain number, so that slicing waits for no device
        )

    def positions(self, num_tokens: int) -> Tensor:
        """Return the positions (B, T) of the next `num_tokens` of each row."""
        return self.lengths[:, None] + torch.arange(num_tokens, device=self.lengths.device)

    def append(
        self, layer: int, keys: Tensor, values: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store (B, K, T, D) at `positions` (B or 1, T) and return all columns so far,
        (B, K, S, D).
        """
        rows = torch.arange(len(keys), device=positions.device)[:, None]  # (B, 1)
        # indexing by (B, 1) and (B or 1, T) around a slice puts indexed axes first: (B, T, K, D)
        self.keys[layer][rows, :, positions] = keys.transpose(1, 2).to(self.keys.dtype)
        self.values[layer][rows, :, positions] = values.transpose(1, 2).to(self.values.dtype)
        end = self.num_columns + keys.shape[2]
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, num_tokens: int) -> None:
        """Count `num_tokens` more in every row, after all layers have appended them."""
        self.lengths = self.lengths + num_tokens
        self.num_columns += num_tokens

    def cut_padding(self, lengths: Tensor) -> None:
        """Say how long each row (B,) really is, after prompts padded on the right were read."""
        self.lengths = lengths.to(self.lengths)

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all rows but these, so that finished ones cost nothing."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.lengths = self.lengths[rows]
        self.num_columns = int(self.lengths.max())
