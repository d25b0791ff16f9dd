"""The language model: a decoder-only transformer whose parts are chosen by the settings.

    B  sequences in a micro-batch    C  model width (d_model)    V  vocabulary
    T  positions in a sequence

    tokens (B, T) -> embedding (B, T, C) -> num_layers blocks (B, T, C) -> norm -> logits (B, T, V)

Source: "Attention Is All You Need" (arXiv 1706.03762) for the whole; each part names its own paper.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn

from llm.config import ModelConfig
from llm.consistency import model_problems
from llm.errors import ConfigError, DataError
from llm.model.attention import Attention, AttentionContext, soft_cap
from llm.model.cache import KeyValueCache
from llm.model.feed_forward import MLPS
from llm.model.kernels.attention import AttentionKernels
from llm.model.kernels.linear import Linear
from llm.model.norms import NORMS
from llm.model.positions import POSITIONS

VOCABULARY_MULTIPLE = 64  # GPUs multiply in tiles: a matrix side that is no multiple wastes part
INITIAL_STD = 0.02  # GPT-2's; see Transformer.initialize


class Block(nn.Module):
    """Attention, then feed-forward; each adds to the residual stream what it finds in it.

    Source: "On Layer Normalization in the Transformer Architecture" (arXiv 2002.04745) for norms
    before instead of after; "Dropout" (Srivastava et al., JMLR 2014; arXiv 1207.0580).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = NORMS[config.norm](config)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = NORMS[config.norm](config)
        self.feed_forward = MLPS[config.mlp](config)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, x: Tensor, context: AttentionContext, cache: KeyValueCache | None) -> Tensor:
        """Return the residual stream (B, T, C) with this block's two contributions added."""
        # The norm acts on a copy: x itself is only ever added to, so gradients reach every layer
        # through the sum undiminished (arXiv 2002.04745, section 3).
        x = x + self.dropout(self.attention(self.attention_norm(x), context, cache))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class Transformer(nn.Module):
    """The whole model: embedding, blocks, final norm and the head over the vocabulary."""

    def __init__(self, config: ModelConfig, vocab_size: int, seq_len: int) -> None:
        """Build the layers; `initialize` or `load_model` then sets the weights.

        Raises:
            ConfigError: settings that contradict each other, as heads that do not divide the width.
        """
        super().__init__()
        problems = model_problems(config, "model")
        if problems:
            raise ConfigError("; ".join(problems))
        self.config, self.vocab_size, self.seq_len = config, vocab_size, seq_len
        num_embeddings = -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE  # rounded up
        self.embedding = nn.Embedding(num_embeddings, config.d_model)
        # A tied matrix has small entries, as a head needs; scaled, they enter the stream at size 1
        # ("Gemma", arXiv 2403.08295).
        self.embedding_scale = math.sqrt(config.d_model) if config.is_embedding_scaled else 1.0
        self.positions = POSITIONS[config.positions](config, seq_len)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = NORMS[config.norm](config)  # the sum of all blocks grows with depth
        # no bias in any published family here
        self.head = Linear(config.d_model, num_embeddings, bias=False)
        if config.tie_embeddings:  # "Using the Output Embedding" (arXiv 1608.05859)
            self.head.weight = self.embedding.weight
        cap = config.logit_soft_cap  # "Gemma 2" (arXiv 2408.00118), section 2
        self.cap_logits = partial(soft_cap, cap=cap) if cap else nn.Identity()
        self.attention_kernels = AttentionKernels(config)

    def forward(
        self,
        tokens: Tensor,
        document_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Return the logits of the next token at every position: (B, T) -> (B, T, V).

        With `document_ids` (B, T) attention stays within documents. With a cache, `tokens` continue
        the sequences it holds.

        Raises:
            DataError: more positions than the model's context.
            ConfigError: a cache for a model that is not causal.
        """
        return self.logits(self.hidden_states(tokens, document_ids, cache))

    def hidden_states(
        self,
        tokens: Tensor,
        document_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Return the normalized residual stream after the last block: (B, T) -> (B, T, C)."""
        context = self._context(tokens, document_ids, cache)
        x = self.embedding(tokens) * self.embedding_scale  # (B, T) -> (B, T, C)
        x = self.dropout(self.positions.embed(x, context.positions))
        for block in self.blocks:
            x = block(x, context, cache)
        if cache is not None:  # after all layers: each writes to the same columns
            cache.advance(tokens.shape[1])
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """Return a score for every token of the vocabulary: (..., C) -> (..., V)."""
        logits = self.cap_logits(self.head(x))
        # the padding of the vocabulary is cut off: no token, so no probability
        return logits if logits.shape[-1] == self.vocab_size else logits[..., : self.vocab_size]

    def initialize(self, generator: torch.Generator) -> None:
        """Draw the first weights from normal distributions; norms start at 1, biases at 0.

        Source: `gpt2`: "Language Models are Unsupervised Multitask Learners" (GPT-2), section 2.3;
        `zero`: "Fixup Initialization" (arXiv 1901.09321), "Tensor Programs V" (arXiv 2203.03466),
        appendix D.2.
        """
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 1:
                    parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
                else:
                    std = self._initial_std(name, parameter.shape[1])
                    parameter.normal_(0.0, std, generator=generator)
            # padding starts at zero and, without a gradient, stays there
            self.embedding.weight[self.vocab_size :] = 0.0
            self.head.weight[self.vocab_size :] = 0.0

    def _initial_std(self, name: str, num_inputs: int) -> float:
        is_residual = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
        if self.config.init == "gpt2":
            # 2 * num_layers outputs are summed into the stream; divided by the root of their
            # number, its variance does not depend on the depth
            return (
                INITIAL_STD / math.sqrt(2 * self.config.num_layers) if is_residual else INITIAL_STD
            )
        # "zero": every block starts as the identity, and an untied head gives all tokens the same
        # probability, so the first loss is ln V
        if is_residual or name == "head.weight":
            return 0.0
        if name.startswith("blocks."):
            return num_inputs**-0.5  # a sum over I inputs of size 1 then has size 1
        return INITIAL_STD if self.config.tie_embeddings else 1.0  # tied: it is the head as well

    def num_parameters(self) -> int:
        """Count the weights: tied ones once, padding of the vocabulary not at all."""
        # published counts have no padding (tests/llm/test_presets.py compares)
        padding = self.embedding.num_embeddings - self.vocab_size
        num_matrices = 1 if self.config.tie_embeddings else 2
        total = sum(parameter.numel() for parameter in self.parameters())
        return total - num_matrices * padding * self.config.d_model

    def _context(
        self, tokens: Tensor, document_ids: Tensor | None, cache: KeyValueCache | None
    ) -> AttentionContext:
        T = tokens.shape[1]
        start = 0 if cache is None else cache.num_columns
        if start + T > self.seq_len:
            raise DataError(
                f"found {start + T} tokens in a sequence, expected at most the model's context"
                f" of {self.seq_len}"
            )
        if cache is not None and not self.config.is_causal:
            # keys and values of earlier positions would change with each new token
            raise ConfigError(
                "model.is_causal: found false, expected true to generate with a key/value cache"
            )
        assert document_ids is None or cache is None, "a cached sequence is one document"
        # Kernels: one line each for `eager_attention` under `boolean_mask` or `cache_mask`.
        if start == 0:  # an empty cache adds nothing to attend to
            positions = self.positions.positions(tokens, document_ids)  # (1, T), or (B, T)
            attend = self.attention_kernels.for_sequences(tokens, document_ids)
        else:
            assert cache is not None
            positions = cache.positions(T)  # (B, T)
            attend = self.attention_kernels.for_cache(positions, start + T, cache.is_even)
        rotary = self.positions.rotary(positions)
        return AttentionContext(positions=positions, rotary=rotary, attend=attend)
