"""Prompts to continue, as token ids.

No heavy imports: prompts are checked before training too, because one that is too long would fail
the evaluation after it.
"""

from collections.abc import Sequence

from llm.errors import ConfigError
from llm.tokenizer.base import Tokenizer


def encode_prompts(prompts: Sequence[str], tokenizer: Tokenizer, seq_len: int) -> list[list[int]]:
    """Encode prompts, each as the beginning of a document.

    Raises:
        ConfigError: naming every prompt that is longer than the context.
        DataError: a character outside the vocabulary.
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
