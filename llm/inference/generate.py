"""Batched generation with a key/value cache: each token is read once.

`stream` and `stream_texts` yield tokens or text as they are made; `generate` and `generate_texts`
collect them.

Shapes: B sequences in a batch, T positions, C model width, V vocabulary.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm.errors import DataError
from llm.inference.options import GenerationOptions
from llm.inference.packed import packed
from llm.inference.sampling import draw, filter_logits
from llm.inference.stopping import (
    Output,
    StoppingCriterion,
    TextStoppingCriterion,
    id_stopping_criterion,
)
from llm.model.cache import KeyValueCache
from llm.model.transformer import Transformer
from llm.seeds import derive_seed
from llm.tokenizer.base import Tokenizer

SEQUENCES_PER_BATCH = 64  # bounds the cache; larger batches were no faster on a CPU


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    seeds: Sequence[int] | None = None,
    sequences_per_batch: int = SEQUENCES_PER_BATCH,
) -> list[list[int]]:
    """Return the new tokens of each prompt, without the stop that ended it.

    A completion ends at the latest where the model's context does: its last token is predicted from
    `model.seq_len` tokens, as in training. What is sampled depends on the seed and on the prompt's
    index, or on its own one of `seeds`, not on the other prompts. Equal prompts are read once. On a
    CPU the weights are repacked first; a caller that generates often passes a `packed` model. Short
    answers to many prompts are faster in larger batches, whose cache takes more memory.

    Raises:
        DataError: a prompt is empty, longer than the context, or has ids outside the vocabulary.
        ConfigError: a stop is a text.
    """
    results: list[list[int]] = [[] for _ in prompts]
    criteria = [id_stopping_criterion(options) for _ in prompts]
    found = _stream(model, prompts, options, criteria, seeds, sequences_per_batch)
    for index, ids in found:
        results[index].extend(ids)
    return results


def stream(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
) -> Iterator[tuple[int, int]]:
    """Yield (prompt index, new token) as tokens are made.

    Raises:
        DataError, ConfigError: as `generate`.
    """
    criteria = [id_stopping_criterion(options) for _ in prompts]
    for index, ids in _stream(model, prompts, options, criteria):
        yield from ((index, token) for token in ids)


def generate_texts(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
) -> list[str]:
    """Return the completion of each prompt as text; stops may be texts.

    Raises:
        DataError: as `generate`.
    """
    results = [""] * len(prompts)
    for index, text in stream_texts(model, tokenizer, prompts, options):
        results[index] += text
    return results


def stream_texts(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
) -> Iterator[tuple[int, str]]:
    """Yield (prompt index, text) as soon as characters are complete and cannot begin a stop.

    Raises:
        DataError: as `generate`.
    """
    criteria = [TextStoppingCriterion(options, tokenizer) for _ in prompts]
    yield from _stream(model, prompts, options, criteria)


@dataclass(kw_only=True, slots=True)
class DecodedSequence:
    """A prompt and the tokens added to it."""

    index: int
    """Of the prompt."""
    tokens: list[int]
    num_cached: int = 0
    """Leading tokens that the cache holds."""
    num_left: int
    """How many tokens may still be added."""
    uniform: list[float]
    """A number between 0 and 1 for each token to sample."""


class DecodingBatch:
    """Sequences that are decoded together, one token per step, until they are dropped."""

    def __init__(
        self, model: Transformer, sequences: Sequence[DecodedSequence], options: GenerationOptions
    ) -> None:
        self.sequences = list(sequences)
        self._model, self._options = model, options
        self._device = model.embedding.weight.device
        num_columns = max(len(each.tokens) + each.num_left - 1 for each in sequences)
        self._cache = KeyValueCache(model.config, len(sequences), num_columns, device=self._device)
        self._is_seen: Tensor | None = None  # (B, V)
        if options.repetition_penalty != 1:
            shape = (len(sequences), model.vocab_size)
            self._is_seen = torch.zeros(shape, dtype=torch.bool, device=self._device)

    @torch.inference_mode()
    def step(self) -> list[int]:
        """Add a token to every sequence and return the new tokens."""
        unread = [each.tokens[each.num_cached :] for each in self.sequences]
        if any(each.num_cached for each in self.sequences):
            x = self._read(unread)  # (B, C)
        else:
            x = self._read_prompts(unread)  # (B, C)
        chosen = self._choose(self._model.logits(x), unread)  # (B, C) -> (B, V) -> (B,)
        for each, token in zip(self.sequences, chosen, strict=True):
            each.num_cached = len(each.tokens)
            each.tokens.append(token)
            each.num_left -= 1
        self._cache.truncate([each.num_cached for each in self.sequences])  # drops the padding
        return chosen

    def drop(self, indices: Collection[int]) -> None:
        """Remove sequences, given by their indices in `sequences`."""
        kept = [b for b in range(len(self.sequences)) if b not in indices]
        self.sequences = [self.sequences[b] for b in kept]
        if indices and kept:
            kept_indices = torch.tensor(kept, device=self._device)
            self._cache.keep(kept_indices)
            self._is_seen = None if self._is_seen is None else self._is_seen[kept_indices]

    def _read(self, unread: Sequence[Sequence[int]]) -> Tensor:
        """Append tokens to the cache; return the hidden state of the last of each: (B, C)."""
        tokens = _padded(unread).to(self._device)  # (B, T)
        x = self._model.hidden_states(tokens, cache=self._cache)  # (B, T) -> (B, T, C)
        last = torch.tensor([len(ids) - 1 for ids in unread], device=self._device)  # (B,)
        return x[torch.arange(len(unread), device=self._device), last]  # (B, T, C) -> (B, C)

    def _read_prompts(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read equal prompts once, as of several answers to one question: (B, C)."""
        numbers = {ids: number for number, ids in enumerate(dict.fromkeys(map(tuple, prompts)))}
        x = self._read(list(numbers))  # (distinct prompts, C)
        if len(numbers) == len(prompts):
            return x
        owners = torch.tensor([numbers[tuple(ids)] for ids in prompts], device=self._device)  # (B,)
        self._cache.keep(owners)  # a copy of its prompt's keys and values to each
        return x[owners]

    def _choose(self, logits: Tensor, unread: Sequence[Sequence[int]]) -> list[int]:
        """Choose a token for each sequence: (B, V) -> B ids."""
        if self._is_seen is not None:
            for b, ids in enumerate(unread):
                self._is_seen[b, ids] = True
        logits = filter_logits(logits, self._options, self._is_seen)
        if self._options.temperature == 0:
            return logits.argmax(dim=-1).tolist()
        uniform = torch.tensor([each.uniform[-each.num_left] for each in self.sequences])  # (B,)
        return draw(logits, uniform.to(self._device)).tolist()


def _stream(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    criteria: Sequence[StoppingCriterion[Output]],
    seeds: Sequence[int] | None = None,
    sequences_per_batch: int = SEQUENCES_PER_BATCH,
) -> Iterator[tuple[int, Output]]:
    """Yield (prompt index, output) as each prompt's stopping criterion releases it."""
    _check_prompts(model, prompts)
    if seeds is None:
        seeds = [derive_seed(options.seed, "generate", index) for index in range(len(prompts))]
    model = packed(model)
    # prompts of similar length together, so that little is padding
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(prompts) if options.max_new_tokens else 0, sequences_per_batch):
        indices = by_length[start : start + sequences_per_batch]
        sequences = [
            _start(model, index, prompts[index], options, seeds[index]) for index in indices
        ]
        batch = DecodingBatch(model, sequences, options)
        while batch.sequences:
            tokens, ended = batch.step(), set[int]()
            for b, (sequence, token) in enumerate(zip(batch.sequences, tokens, strict=True)):
                criterion = criteria[sequence.index]
                output, is_stopped = criterion.add((token,))
                if output:
                    yield sequence.index, output
                if is_stopped:
                    ended.add(b)
                elif not sequence.num_left:
                    ended.add(b)
                    if output := criterion.flush():
                        yield sequence.index, output
            batch.drop(ended)


def _start(
    model: Transformer, index: int, prompt: Sequence[int], options: GenerationOptions, seed: int
) -> DecodedSequence:
    num_left = min(options.max_new_tokens, model.seq_len + 1 - len(prompt))
    # drawn in advance from the prompt's own generator, so that no other prompt matters
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(num_left if options.temperature else 0, generator=generator).tolist()
    return DecodedSequence(index=index, tokens=list(prompt), num_left=num_left, uniform=uniform)


def _padded(ids: Sequence[Sequence[int]]) -> Tensor:
    """Return ids as one tensor (B, T), padded on the right."""
    T = max(map(len, ids))
    return torch.tensor([[*each, *[0] * (T - len(each))] for each in ids])


def _check_prompts(model: Transformer, prompts: Sequence[Sequence[int]]) -> None:
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= model.seq_len:
            raise DataError(
                f"prompt {index}: found {len(prompt)} tokens, expected 1 to {model.seq_len}, the"
                " model's context"
            )
        if not 0 <= min(prompt) <= max(prompt) < model.vocab_size:
            raise DataError(
                f"prompt {index}: found ids from {min(prompt)} to {max(prompt)}, expected 0 to"
                f" {model.vocab_size - 1}, the model's vocabulary"
            )
