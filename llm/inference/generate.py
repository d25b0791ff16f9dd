"""Generation: from prompts to continuations, many prompts at once, each token read once.

Shapes: B prompts in a batch, T positions, S columns of the cache, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llm.errors import DataError
from llm.model.cache import KeyValueCache
from llm.model.transformer import Transformer
from llm.seeds import derive_seed

ROWS_PER_BATCH = 64  # bounds the cache; more rows at once were not faster on a CPU


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
) -> list[list[int]]:
    """Return the new tokens of each prompt, up to a stop id (not included) or `max_new_tokens`.

    A continuation also ends where the model's context does: its last token is chosen from
    `model.seq_len` tokens before it, as in training. Temperature 0 takes the likeliest token; above
    it tokens are drawn from the `top_k` likeliest, or from all with 0. What is drawn depends on the
    seed and the prompt's place in the list, not on the other prompts.

    Raises:
        DataError: a prompt is empty, longer than the context, or holds an id the model has not.
        ValueError: `temperature`, `top_k` or `max_new_tokens` is below zero.
    """
    if temperature < 0 or top_k < 0 or max_new_tokens < 0:
        raise ValueError(
            f"temperature {temperature}, top_k {top_k}, max_new_tokens {max_new_tokens}: expected"
            " none below 0"
        )
    for index, prompt in enumerate(prompts):
        _check_prompt(index, prompt, model)
    was_training = model.training
    model.eval()
    results: list[list[int]] = [[] for _ in prompts]
    # prompts of like length together, so that little is padding
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(prompts), ROWS_PER_BATCH):
        indices = by_length[start : start + ROWS_PER_BATCH]
        sampler = _Sampler(indices, max_new_tokens, temperature, top_k, seed)
        continuations = _generate_batch(
            model, [prompts[index] for index in indices], max_new_tokens, set(stop_ids), sampler
        )
        for index, continuation in zip(indices, continuations, strict=True):
            results[index] = continuation
    model.train(was_training)
    return results


class _Sampler:
    """Chooses the next token of each row from its logits."""

    def __init__(
        self, indices: Sequence[int], max_new_tokens: int, temperature: float, top_k: int, seed: int
    ) -> None:
        self._temperature, self._top_k = temperature, top_k
        # One uniform number a token, drawn beforehand by a generator of the prompt's own: (B, new)
        self._uniform = torch.empty(len(indices), max_new_tokens if temperature else 0)
        for row, index in enumerate(indices):
            generator = torch.Generator().manual_seed(derive_seed(seed, "generate", index))
            self._uniform[row].uniform_(generator=generator)

    def choose(self, logits: Tensor, rows: Tensor, number: int) -> Tensor:
        """Return the `number`-th new token of `rows`, from logits (B, V): -> (B,)."""
        if self._temperature == 0:
            return logits.argmax(dim=-1)
        scaled = logits.float() / self._temperature
        if 0 < self._top_k < scaled.shape[-1]:
            least = scaled.topk(self._top_k, dim=-1).values[:, -1:]  # (B, V) -> (B, 1)
            scaled = scaled.masked_fill(scaled < least, -torch.inf)
        # the token at which the cumulated probability passes the uniform number
        cumulated = scaled.double().softmax(dim=-1).cumsum(dim=-1)
        threshold = self._uniform[rows.cpu(), number].to(cumulated)[:, None]
        chosen = torch.searchsorted(cumulated, threshold * cumulated[:, -1:], right=True)
        return chosen.squeeze(1).clamp(max=scaled.shape[-1] - 1)


def _generate_batch(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: set[int],
    sampler: _Sampler,
) -> list[list[int]]:
    """Continue all prompts of one batch; rows leave it as they finish."""
    device = model.embedding.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts])  # (B,)
    longest = int(lengths.max())
    columns = min(longest + max_new_tokens, model.seq_len)
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)  # (B, T), padded on the right
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    cache = KeyValueCache(model.config, len(prompts), columns, device=device)
    read = model.read(tokens.to(device), cache=cache)  # (B, T) -> (B, T, C)
    cache.cut_padding(lengths)
    last = read[torch.arange(len(prompts)), lengths - 1]  # (B, T, C) -> (B, C): each prompt's end
    results: list[list[int]] = [[] for _ in prompts]
    rows = torch.arange(len(prompts))  # which prompt each row of the cache is of
    for number in range(max_new_tokens):
        chosen = sampler.choose(model.score(last), rows, number)  # (B, C) -> (B, V) -> (B,)
        is_going_on: list[bool] = []
        for row, token in zip(rows.tolist(), chosen.tolist(), strict=True):
            if token in stop_ids:
                is_going_on.append(False)
                continue
            results[row].append(token)
            used = len(prompts[row]) + len(results[row])
            is_going_on.append(used <= model.seq_len)
        kept = torch.tensor(is_going_on).nonzero().squeeze(1)
        if not len(kept) or number == max_new_tokens - 1:
            break
        if len(kept) < len(rows):
            rows = rows[kept]
            cache.keep_rows(kept.to(device))
            chosen = chosen[kept.to(device)]
        last = model.read(chosen[:, None], cache=cache)[:, 0]  # (B, 1) -> (B, 1, C) -> (B, C)
    return results


def _check_prompt(index: int, prompt: Sequence[int], model: Transformer) -> None:
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
