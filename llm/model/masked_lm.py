"""Masked language modeling: which tokens are hidden, and how well a model fills them in.

Of the tokens that stand for text, 15 % are to be filled in: of these 80 % are replaced by
`<|mask|>`, 10 % by a token drawn from all, and 10 % stay, so that a model has to make something of
every token it reads. Control tokens are never hidden.

Source: "BERT" (arXiv 1810.04805), section 3.1 and appendix C.2 for the shares.

Shapes: B rows, T positions, C model width, V vocabulary, N tokens to fill in.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from llm.data.permutation import splitmix64
from llm.model.loss import IGNORED
from llm.model.transformer import Transformer

SHARE_HIDDEN, SHARE_REPLACED = 0.8, 0.1
LOGITS_AT_ONCE = 1 << 24  # 64 MiB in fp32
STREAM_STEP = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's: 2**64 over the golden ratio


@dataclass(frozen=True, kw_only=True, slots=True)
class Masking:
    """How tokens are chosen: a function of the seed, the sample's number and the position alone.

    So there is no state to lose, and the number of processes changes nothing.
    """

    seed: int
    fraction: float
    """Share of the tokens of text to be filled in."""
    mask_id: int
    is_text: npt.NDArray[np.bool_]
    """(V,): which tokens stand for text. The others are never hidden, nor do they replace one."""

    def hide(
        self,
        tokens: npt.NDArray[np.int64],
        is_eligible: npt.NDArray[np.bool_],
        samples: npt.NDArray[np.int64],
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return what the model reads and what it is to fill in, or IGNORED: 2 x (B, T).

        `tokens` and `is_eligible` are (B, T); `samples` (B,) numbers the rows.
        """
        T = tokens.shape[1]
        places = samples[:, None] * T + np.arange(T)  # (B,) -> (B, T)
        with np.errstate(over="ignore"):  # 64 bits that wrap around are what is wanted
            bits = splitmix64(
                np.uint64(self.seed) + (places.astype(np.uint64) + np.uint64(1)) * STREAM_STEP
            )
        is_chosen = is_eligible & self.is_text[tokens] & (_uniform(bits, 0, 24) < self.fraction)
        fate = _uniform(bits, 24, 16)
        ordinary = np.flatnonzero(self.is_text)
        drawn = ordinary[(_uniform(bits, 40, 24) * len(ordinary)).astype(np.int64)]
        is_replaced = (fate >= SHARE_HIDDEN) & (fate < SHARE_HIDDEN + SHARE_REPLACED)
        read = np.where(is_chosen & (fate < SHARE_HIDDEN), self.mask_id, tokens)
        read = np.where(is_chosen & is_replaced, drawn, read)
        return read, np.where(is_chosen, tokens, IGNORED)


def fill_in(
    model: Transformer, inputs: Tensor, targets: Tensor, document_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return -log p of each target and whether it is the likeliest token: 2 x (N,).

    Only the positions to be filled in are scored: in the order of the rows.
    """
    is_target = targets != IGNORED
    read = model.read(inputs, document_ids)[is_target]  # (B, T, C) -> (N, C)
    at_once = max(1, LOGITS_AT_ONCE // model.vocab_size)
    nats: list[Tensor] = []
    is_right: list[Tensor] = []
    for x, wanted in zip(read.split(at_once), targets[is_target].split(at_once), strict=True):
        logits = model.score(x).float()
        nats.append(F.cross_entropy(logits, wanted, reduction="none"))
        is_right.append(logits.argmax(dim=-1) == wanted)
    return torch.cat(nats), torch.cat(is_right)


def _uniform(bits: npt.NDArray[np.uint64], start: int, count: int) -> npt.NDArray[np.float64]:
    """Return `count` of the 64 bits as numbers from 0 to below 1."""
    part = (bits >> np.uint64(start)) & np.uint64((1 << count) - 1)
    return part.astype(np.float64) / (1 << count)
