"""Embeddings in fine-tuning: noise in training (NEFTune), and the start of tokens never trained.

Shapes: B sequences, T positions, C model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llm.model.transformer import Transformer
from llm.tokenizer.base import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingNoise:
    """Uniform noise within alpha / sqrt(L C) on each entry, for a document of L tokens.

    The paper has one document per sequence. Of a packed one each counts by its own length, with or
    without a document mask, so packing changes no noise. The noise comes from torch's generator,
    which the loop seeds at each step, as for dropout.

    Source: "NEFTune" (arXiv 2310.05914), algorithm 1.
    """

    alpha: float
    bos_id: int
    pad_id: int

    def add_to(self, model: Transformer) -> None:
        """Add noise to the output of the model's embedding from now on, in training only."""
        # a hook: the scale of Gemma's embeddings comes after it, as in transformers
        model.embedding.register_forward_hook(self)

    def __call__(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        """Return the embeddings (B, T, C) of inputs (B, T), with noise if the module trains."""
        if not module.training:
            return output
        [tokens] = inputs
        size = self.alpha / (self.document_lengths(tokens) * output.shape[-1]).sqrt()  # (B, T)
        noise = torch.rand_like(output) * 2.0 - 1.0  # uniform within -1 and 1
        return output + noise * size[..., None]  # (B, T, C) x (B, T, 1)

    def document_lengths(self, tokens: Tensor) -> Tensor:
        """Return for each position the length of its document within the sequence: (B, T).

        Every document begins with `<|bos|>`; one that a sequence continues has the length of what
        is there.
        """
        is_real = (tokens != self.pad_id).long()
        ids = (tokens == self.bos_id).cumsum(dim=1)  # (B, T): 0 before the first `<|bos|>`
        lengths = ids.new_zeros(ids.shape[0], ids.shape[1] + 1).scatter_add_(1, ids, is_real)
        return lengths.gather(1, ids).clamp(min=1)  # padding alone has none


@torch.no_grad()
def set_to_mean(model: Transformer, tokens: Sequence[int], text_tokens: Sequence[int]) -> None:
    """Set the embeddings of `tokens` to the mean of those of `text_tokens`; of the head likewise.

    A token that training never saw has a random embedding, or one that only fell with all that
    were wrong. From the mean it starts as likely as an average token.

    Source: https://nlp.stanford.edu/~johnhew/vocab-expansion.html
    """
    # tied weights are one matrix: its rows are then set twice, to the same mean
    for weight in (model.embedding.weight, model.head.weight):
        weight[list(tokens)] = weight[list(text_tokens)].mean(dim=0)


def untrained_tokens(tokenizer: Tokenizer, is_causal: bool) -> list[int]:
    """Return the control tokens that training on text never shows a model.

    Those are all but `<|bos|>`, which begins documents, and `<|mask|>` of a masked language model.
    """
    seen = {tokenizer.bos_id} if is_causal else {tokenizer.bos_id, tokenizer.mask_id}
    return [index for index in tokenizer.control_ids if index not in seen]
