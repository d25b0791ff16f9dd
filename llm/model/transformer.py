"""The language model: a decoder-only transformer, every part of it a choice of the settings.

Read the package in the order that llm/model/__init__.py gives; this file puts the parts together.

    B  rows in a micro-batch    C  model width (d_model)    V  vocabulary
    T  positions in a row

The model reads tokens and scores, at every position, each token of the vocabulary as the next one:

    tokens (B, T) -> embedding (B, T, C) -> num_layers blocks (B, T, C) -> norm -> logits (B, T, V)

Source: "Attention Is All You Need" (arXiv 1706.03762) for the whole; each part names its own paper.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn

from llm.config import ModelConfig, model_problems
from llm.errors import ConfigError, DataError
from llm.model.attention import Attention
from llm.model.attention_mask import Reach, Sight, soft_cap
from llm.model.cache import KeyValueCache
from llm.model.feed_forward import MLPS
from llm.model.linear import Linear
from llm.model.norms import NORMS
from llm.model.positions import POSITIONS

VOCABULARY_MULTIPLE = 64  # matrix sizes that are multiples of 64 fill the units of a GPU whole
INITIAL_STD = 0.02  # GPT-2's; see Transformer.initialize


class Block(nn.Module):
    """Attention, then feed-forward, each reading a normalized copy of the stream and adding to it.

    Source: normalization before instead of after, "On Layer Normalization in the Transformer
    Architecture" (arXiv 2002.04745): the stream itself is never rescaled, so deep models train.
    Dropout on what is added: "Dropout" (Srivastava et al., JMLR 2014; arXiv 1207.0580).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = NORMS[config.norm](config)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = NORMS[config.norm](config)
        self.feed_forward = MLPS[config.mlp](config)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, x: Tensor, reach: Reach, cache: KeyValueCache | None) -> Tensor:
        """Add what this block finds to the stream (B, T, C)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), reach, cache))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class Transformer(nn.Module):
    """The whole model: embed, run the blocks, normalize, score every token of the vocabulary."""

    def __init__(self, config: ModelConfig, vocab_size: int, seq_len: int) -> None:
        """Make the layers with torch's default weights; `initialize` or `load_model` gives the real
        ones.

        Raises:
            ConfigError: settings that do not go together, as heads that do not divide the width.
        """
        super().__init__()
        problems = model_problems(config, "model")
        if problems:
            raise ConfigError("; ".join(problems))
        self.config, self.vocab_size, self.seq_len = config, vocab_size, seq_len
        num_embeddings = -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        self.embedding = nn.Embedding(num_embeddings, config.d_model)
        # "Gemma" (arXiv 2403.08295): embeddings small enough to score with, large enough to read
        self.embedding_scale = math.sqrt(config.d_model) if config.is_embedding_scaled else 1.0
        self.positions = POSITIONS[config.positions](config, seq_len)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = NORMS[config.norm](config)
        self.head = Linear(config.d_model, num_embeddings, bias=False)
        if config.tie_embeddings:  # "Using the Output Embedding" (arXiv 1608.05859)
            self.head.weight = self.embedding.weight
        cap = config.logit_soft_cap  # "Gemma 2" (arXiv 2408.00118), section 2
        self.cap_logits = partial(soft_cap, cap=cap) if cap else nn.Identity()
        self.sight = Sight(config)

    def forward(
        self,
        tokens: Tensor,
        document_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Score the next token at every position: (B, T) -> (B, T, V).

        With `document_ids` (B, T) a token looks at its own document only. With a cache, `tokens`
        continue the rows it holds.

        Raises:
            DataError: more positions than the model's context.
            ConfigError: a cache for a model that is not causal.
        """
        return self.score(self.read(tokens, document_ids, cache))

    def read(
        self,
        tokens: Tensor,
        document_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Return what the model makes of each position, before scoring: (B, T) -> (B, T, C)."""
        reach = self._reach(tokens, document_ids, cache)
        x = self.embedding(tokens) * self.embedding_scale  # (B, T) -> (B, T, C)
        x = self.dropout(self.positions.add(x, reach.places))
        for block in self.blocks:
            x = block(x, reach, cache)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.norm(x)

    def score(self, x: Tensor) -> Tensor:
        """Score every token of the vocabulary: (..., C) -> (..., V). The padding stays behind."""
        logits = self.cap_logits(self.head(x))
        return logits if logits.shape[-1] == self.vocab_size else logits[..., : self.vocab_size]

    def initialize(self, generator: torch.Generator) -> None:
        """Draw first weights, all of them normal; norms are 1 and biases 0.

        `gpt2`: a deviation of 0.02, and for what adds to the stream, of which there are 2 *
        num_layers parts, less by the root of that, so that the sum keeps its variance whatever the
        depth. `zero`: one over the root of the inputs, so that a product keeps the size of what it
        reads, and zero for what adds to the stream and for an untied head, so that every block
        first passes on what it reads and every token is first as likely. Padding rows of the
        vocabulary start and stay at zero.

        Source: "Language Models are Unsupervised Multitask Learners" (GPT-2), section 2.3; zero:
        "Fixup Initialization" (arXiv 1901.09321), "Tensor Programs V" (arXiv 2203.03466), D.2.
        """
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 1:
                    parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
                else:
                    std = self._initial_std(name, parameter.shape[1])
                    parameter.normal_(0.0, std, generator=generator)
            self.embedding.weight[self.vocab_size :] = 0.0
            self.head.weight[self.vocab_size :] = 0.0

    def _initial_std(self, name: str, num_inputs: int) -> float:
        is_adding = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
        if self.config.init == "gpt2":
            return INITIAL_STD / math.sqrt(2 * self.config.num_layers) if is_adding else INITIAL_STD
        if is_adding or name == "head.weight":
            return 0.0
        if name.startswith("blocks."):
            return num_inputs**-0.5
        return INITIAL_STD if self.config.tie_embeddings else 1.0  # tied, they score as well

    def num_parameters(self) -> int:
        """Count the weights, tied ones once and padding of the vocabulary not at all."""
        padding = self.embedding.num_embeddings - self.vocab_size
        num_matrices = 1 if self.config.tie_embeddings else 2
        total = sum(parameter.numel() for parameter in self.parameters())
        return total - num_matrices * padding * self.config.d_model

    def _reach(
        self, tokens: Tensor, document_ids: Tensor | None, cache: KeyValueCache | None
    ) -> Reach:
        T = tokens.shape[1]
        start = 0 if cache is None else cache.num_columns
        if start + T > self.seq_len:
            raise DataError(
                f"found {start + T} tokens in a row, expected at most the model's context"
                f" of {self.seq_len}"
            )
        if cache is not None and not self.config.is_causal:
            raise ConfigError(
                "model.is_causal: found false, expected true to read token by token with a cache"
            )
        assert document_ids is None or cache is None, "a row in the cache is one document"
        if start == 0:  # nothing in the cache yet: as without one
            places = self.positions.places(tokens, document_ids)  # (1, T), or (B, T)
            attend = self.sight.over_rows(tokens, document_ids)
        else:
            assert cache is not None
            places = cache.positions(T)  # (B, T)
            attend = self.sight.over_cache(places, start + T, cache.is_even)
        return Reach(places=places, rotation=self.positions.rotation(places), attend=attend)
