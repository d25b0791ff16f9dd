"""Generation: from prompts to continuations, many prompts at once, each token read once.

`Continuation` makes tokens step by step; `stream` and `stream_texts` yield them as they are made,
`generate` and `generate_texts` collect what these yield.

Shapes: B rows in a batch, T positions, C model width, V vocabulary, M positions to choose from.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from llm.errors import ConfigError, DataError
from llm.inference.packed import packed
from llm.inference.sampling import Sampling, draw, filter_logits
from llm.inference.stopping import Ending, IdEnding, TextEnding
from llm.model.cache import KeyValueCache
from llm.model.precision import Precision
from llm.model.transformer import Transformer
from llm.seeds import derive_seed
from llm.tokenizer.base import Tokenizer

ROWS_PER_BATCH = 64  # bounds the cache; more rows at once were not faster on a CPU
NGRAM_TOKENS = 3  # that must have stood in a text before, for what followed them to be guessed
GREEDY = Sampling()

Piece = TypeVar("Piece", str, tuple[int, ...])


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    sampling: Sampling = GREEDY,
    precision: Precision = "fp32",
    num_guessed: int = 0,
) -> list[list[int]]:
    """Return the new tokens of each prompt, up to a stop (not included) or `max_new_tokens`.

    A continuation also ends where the model's context does: its last token is chosen from
    `model.seq_len` tokens before it, as in training. What is drawn depends on the seed and the
    prompt's place in the list, not on the other prompts. On a CPU the model's matrices are laid out
    for this first; who generates often does that once and gives a `packed` model.

    `num_guessed` tokens a step are guessed from the text so far and read together with the last
    one; those that greedy choice confirms are kept, so that repetitive text takes fewer steps.

    Raises:
        DataError: a prompt is empty, longer than the context, or holds an id the model has not.
        ConfigError: `max_new_tokens` or `num_guessed` is below 0, tokens are guessed that are not
            chosen greedily, or a stop is a text.
    """
    results: list[list[int]] = [[] for _ in prompts]
    for index, token in stream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        sampling=sampling,
        precision=precision,
        num_guessed=num_guessed,
    ):
        results[index].append(token)
    return results


def stream(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    sampling: Sampling = GREEDY,
    precision: Precision = "fp32",
    num_guessed: int = 0,
) -> Iterator[tuple[int, int]]:
    """Yield (prompt, new token) as tokens are made: those of `generate`.

    Raises:
        DataError, ConfigError: as `generate`.
    """
    endings = [IdEnding(stop_ids, sampling) for _ in prompts]
    pieces = _pieces(model, prompts, endings, max_new_tokens, sampling, precision, num_guessed)
    for index, ids in pieces:
        yield from ((index, token) for token in ids)


def generate_texts(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    sampling: Sampling = GREEDY,
    precision: Precision = "fp32",
) -> list[str]:
    """Return the continuation of each prompt as text, up to a stop, which may be a text here.

    Raises:
        DataError, ConfigError: as `generate`.
    """
    results = [""] * len(prompts)
    for index, piece in stream_texts(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        sampling=sampling,
        precision=precision,
    ):
        results[index] += piece
    return results


def stream_texts(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    sampling: Sampling = GREEDY,
    precision: Precision = "fp32",
) -> Iterator[tuple[int, str]]:
    """Yield (prompt, piece of text) as soon as its characters are whole and no part of a stop.

    Raises:
        DataError, ConfigError: as `generate`.
    """
    endings = [TextEnding(stop_ids, sampling, tokenizer) for _ in prompts]
    yield from _pieces(model, prompts, endings, max_new_tokens, sampling, precision, 0)


class Continuation:
    """Prompts under way, one step of the model at a time. Rows leave it as they finish."""

    def __init__(
        self,
        model: Transformer,
        rows: Sequence["Row"],
        *,
        num_columns: int,
        sampling: Sampling,
        num_guessed: int,
    ) -> None:
        """Begin with `rows`, none of which will need more than `num_columns` of the cache."""
        self.rows = list(rows)
        self._model, self._sampling, self._num_guessed = model, sampling, num_guessed
        self._device = model.embedding.weight.device
        self._num_columns = num_columns
        self._cache = KeyValueCache(model.config, len(rows), num_columns, device=self._device)
        self._lengths = [0] * len(rows)  # what the cache holds of each row
        self._is_seen: Tensor | None = None  # (B, V)
        if sampling.repetition_penalty != 1:
            shape = (len(rows), model.vocab_size)
            self._is_seen = torch.zeros(shape, dtype=torch.bool, device=self._device)

    @torch.inference_mode()
    def step(self) -> list[list[int]]:
        """Add a token to every row, or more where guesses were right; return what was added."""
        guesses = self._guesses()
        unread = [
            row.tokens[length:] + guess
            for row, length, guess in zip(self.rows, self._lengths, guesses, strict=True)
        ]
        tokens = _padded(unread).to(self._device)  # (B, T)
        x = self._model.hidden_states(tokens, cache=self._cache)  # (B, T) -> (B, T, C)
        # a token is chosen after each row's last one, and after each of its guesses
        places = [
            (r, place)
            for r, (ids, guess) in enumerate(zip(unread, guesses, strict=True))
            for place in range(len(ids) - len(guess) - 1, len(ids))
        ]
        r, place = torch.tensor(places, device=self._device).T
        chosen = self._choose(self._model.logits(x[r, place]))  # (B, T, C) -> (M, C) -> (M, V)
        added: list[list[int]] = []
        for number, (row, guess) in enumerate(zip(self.rows, guesses, strict=True)):
            mine, chosen = chosen[: len(guess) + 1], chosen[len(guess) + 1 :]
            added.append(row.add(_confirmed(guess, mine)))
            self._lengths[number] = len(row.tokens) - 1  # the newest is not read yet
        self._cache.truncate(self._lengths)
        return added

    def drop(self, rows: Collection[int]) -> None:
        """Let these rows go, by their places in `rows`."""
        kept = [r for r in range(len(self.rows)) if r not in rows]
        self.rows = [self.rows[r] for r in kept]
        self._lengths = [self._lengths[r] for r in kept]
        if rows and kept:
            places = torch.tensor(kept, device=self._device)
            self._cache.keep(places)
            self._is_seen = None if self._is_seen is None else self._is_seen[places]

    def _guesses(self) -> list[list[int]]:
        """Return, for each row, the tokens to read together with its last one.

        Source: "Prompt Lookup Decoding" (github.com/apoorvumang/prompt-lookup-decoding), after
        "Fast Inference from Transformers via Speculative Decoding" (arXiv 2211.17192).
        """
        if not (self._num_guessed and min(self._lengths)):  # prompts are read before any guess
            return [[] for _ in self.rows]
        room = min(self._num_guessed, self._num_columns - max(self._lengths) - 1)
        return [row.guess(min(room, row.num_left - 1)) for row in self.rows]

    def _choose(self, logits: Tensor) -> list[int]:
        """Choose a token from each row of logits (M, V)."""
        if self._is_seen is not None:  # then nothing is guessed, and M is B
            for r, row in enumerate(self.rows):
                self._is_seen[r, row.tokens[self._lengths[r] :]] = True
        logits = filter_logits(logits, self._sampling, self._is_seen)
        if self._sampling.temperature == 0:
            return logits.argmax(dim=-1).tolist()
        uniform = torch.tensor([row.uniform[-row.num_left] for row in self.rows])  # (B,)
        return draw(logits, uniform.to(self._device)).tolist()


@dataclass(kw_only=True, slots=True)
class Row:
    """A prompt and what was added to it."""

    index: int
    """The prompt's place in the list."""
    tokens: list[int]
    """The prompt and all new tokens."""
    num_left: int
    """How many tokens may still be added."""
    uniform: list[float]
    """A number between 0 and 1 for each token to be drawn."""
    followers: dict[tuple[int, ...], int] = field(default_factory=dict[tuple[int, ...], int])
    """The place after the latest earlier appearance of some tokens in a row."""
    num_looked_at: int = 0
    """Tokens that `followers` knows of."""

    def add(self, new: Sequence[int]) -> list[int]:
        """Add tokens as far as there is room, and return these."""
        added = list(new[: self.num_left])
        self.tokens += added
        self.num_left -= len(added)
        return added

    def guess(self, count: int) -> list[int]:
        """Return up to `count` tokens that may come next, as if the text went in circles."""
        for place in range(max(NGRAM_TOKENS, self.num_looked_at), len(self.tokens)):
            self.followers[tuple(self.tokens[place - NGRAM_TOKENS : place])] = place
        self.num_looked_at = len(self.tokens)
        place = self.followers.get(tuple(self.tokens[-NGRAM_TOKENS:]))
        if place is None or count <= 0:
            return []
        circle = self.tokens[place:]
        return (circle * (count // len(circle) + 1))[:count]


def _pieces(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    endings: Sequence[Ending[Piece]],
    max_new_tokens: int,
    sampling: Sampling,
    precision: Precision,
    num_guessed: int,
) -> Iterator[tuple[int, Piece]]:
    """Yield (prompt, piece) as each row's ending lets it pass, a batch after another."""
    _check(model, prompts, max_new_tokens, sampling, num_guessed)
    model = packed(model, precision)
    # prompts of like length together, so that little is padding
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(prompts) if max_new_tokens else 0, ROWS_PER_BATCH):
        rows = [
            _row(model, index, prompts[index], max_new_tokens, sampling)
            for index in by_length[start : start + ROWS_PER_BATCH]
        ]
        work = Continuation(
            model,
            rows,
            num_columns=max(len(row.tokens) + row.num_left - 1 for row in rows),
            sampling=sampling,
            num_guessed=num_guessed,
        )
        while work.rows:
            added, ended = work.step(), set[int]()
            for r, (row, new) in enumerate(zip(work.rows, added, strict=True)):
                ending = endings[row.index]
                for token in new:
                    piece, is_ended = ending.take(token)
                    if piece:
                        yield row.index, piece
                    if is_ended:
                        ended.add(r)
                        break
                if r not in ended and not row.num_left:
                    ended.add(r)
                    if piece := ending.flush():
                        yield row.index, piece
            work.drop(ended)


def _row(
    model: Transformer, index: int, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling
) -> Row:
    num_left = min(max_new_tokens, model.seq_len + 1 - len(prompt))
    # drawn beforehand by a generator of the prompt's own, so that no other prompt has a say
    generator = torch.Generator().manual_seed(derive_seed(sampling.seed, "generate", index))
    uniform = torch.rand(num_left if sampling.temperature else 0, generator=generator)
    return Row(index=index, tokens=list(prompt), num_left=num_left, uniform=uniform.tolist())


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Return rows of ids as one tensor (B, T), padded on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])


def _confirmed(guess: Sequence[int], chosen: Sequence[int]) -> list[int]:
    """Return the chosen tokens before which every guess was right; the first always is one."""
    num_right = 0
    while num_right < len(guess) and guess[num_right] == chosen[num_right]:
        num_right += 1
    return list(chosen[: num_right + 1])


def _check(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    num_guessed: int,
) -> None:
    if max_new_tokens < 0 or num_guessed < 0:
        raise ConfigError(
            f"max_new_tokens {max_new_tokens}, num_guessed {num_guessed}: expected none below 0"
        )
    if num_guessed and (sampling.temperature or sampling.repetition_penalty != 1):
        raise ConfigError(
            f"num_guessed: found {num_guessed} with temperature {sampling.temperature:g} and"
            f" repetition_penalty {sampling.repetition_penalty:g}, expected 0; guesses are"
            " confirmed by greedy choice alone"
        )
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
