"""Beginnings of texts, and how a model goes on: the samples that people look at first."""

from collections.abc import Sequence

from llm.errors import ConfigError
from llm.inference.generate import generate_texts
from llm.inference.sampling import Sampling
from llm.model.transformer import Transformer
from llm.tokenizer.base import Tokenizer


def encode_prompts(prompts: Sequence[str], tokenizer: Tokenizer, seq_len: int) -> list[list[int]]:
    """Encode the beginnings of texts, each a document of its own.

    Raises:
        ConfigError: prompts that leave no room for a single new token, all of them.
    """
    encoded = [[tokenizer.bos_id, *ids] for ids in tokenizer.encode_batch(prompts)]
    problems = [
        f"evaluate.prompts[{index}]: {len(ids)} tokens with its <|bos|>, expected at most the"
        f" context of pack.seq_len = {seq_len}"
        for index, ids in enumerate(encoded)
        if len(ids) > seq_len
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    return encoded


def continue_prompts(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
) -> list[str]:
    """Continue each prompt until its document or turn ends, or for `max_new_tokens`."""
    return generate_texts(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_ids=[tokenizer.bos_id, tokenizer.end_id],
        sampling=sampling,
    )
