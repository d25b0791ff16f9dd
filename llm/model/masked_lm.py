"""Masked language modeling: choose and replace tokens, and the loss at the masked positions.

Of the tokens of text, a fraction (BERT: 15 %) becomes targets. Of these 80 % are replaced by
`<|mask|>`, 10 % by a random token and 10 % stay, so that the model cannot rely on `<|mask|>` to
know which positions count. Control tokens are never masked.

Source: "BERT" (arXiv 1810.04805), section 3.1 and appendix C.2 for the shares.

    B  sequences    T  positions    C  model width    V  vocabulary    N  targets
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
    """Choice of masked tokens: a function of seed, sample number and position alone.

    It has no state to save, and the number of processes does not change it.
    """

    seed: int
    fraction: float
    """Share of the tokens of text that become targets."""
    mask_id: int
    is_text: npt.NDArray[np.bool_]
    """(V,): tokens that stand for text. Only these are masked, or drawn as replacements."""

    def hide(
        self,
        tokens: npt.NDArray[np.int64],
        is_eligible: npt.NDArray[np.bool_],
        samples: npt.NDArray[np.int64],
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return inputs and targets (IGNORED where not masked), 2 x (B, T).

        `tokens` and `is_eligible` are (B, T); `samples` (B,) are the numbers of the sequences.
        """
        T = tokens.shape[1]
        # one counter per position of the training run: every epoch masks other tokens
        counters = samples[:, None] * T + np.arange(T)  # (B,) -> (B, T)
        # + 1: splitmix64(0) is 0, so seed 0 would always mask the first position
        with np.errstate(over="ignore"):  # SplitMix64 wraps around at 64 bits
            bits = splitmix64(
                np.uint64(self.seed) + (counters.astype(np.uint64) + np.uint64(1)) * STREAM_STEP
            )
        # disjoint bits of one number serve as independent draws: 24 + 16 + 24
        is_chosen = is_eligible & self.is_text[tokens] & (_uniform(bits, 0, 24) < self.fraction)
        action = _uniform(bits, 24, 16)
        text_ids = np.flatnonzero(self.is_text)
        drawn = text_ids[(_uniform(bits, 40, 24) * len(text_ids)).astype(np.int64)]
        is_replaced = (action >= SHARE_HIDDEN) & (action < SHARE_HIDDEN + SHARE_REPLACED)
        inputs = np.where(is_chosen & (action < SHARE_HIDDEN), self.mask_id, tokens)
        inputs = np.where(is_chosen & is_replaced, drawn, inputs)
        return inputs, np.where(is_chosen, tokens, IGNORED)


def fill_in(
    model: Transformer, inputs: Tensor, targets: Tensor, document_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return -log p of each target and whether it is the most probable token: 2 x (N,).

    In the order of the positions (B, T).
    """
    is_target = targets != IGNORED
    # only the masked positions reach the head: 15 % of the logits
    hidden = model.hidden_states(inputs, document_ids)[is_target]  # (B, T, C) -> (N, C)
    at_once = max(1, LOGITS_AT_ONCE // model.vocab_size)
    nats: list[Tensor] = []
    is_right: list[Tensor] = []
    for x, wanted in zip(hidden.split(at_once), targets[is_target].split(at_once), strict=True):
        logits = model.logits(x).float()
        nats.append(F.cross_entropy(logits, wanted, reduction="none"))
        is_right.append(logits.argmax(dim=-1) == wanted)
    return torch.cat(nats), torch.cat(is_right)


def _uniform(bits: npt.NDArray[np.uint64], start: int, count: int) -> npt.NDArray[np.float64]:
    """Return `count` of the 64 bits as numbers in [0, 1)."""
    part = (bits >> np.uint64(start)) & np.uint64((1 << count) - 1)
    return part.astype(np.float64) / (1 << count)
