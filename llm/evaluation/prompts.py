"""Beginnings of texts, for a model to go on with.

Nothing heavy is imported: they are looked at before a training too, for one that does not fit would
end the evaluation after it.
"""

from collections.abc import Sequence

from llm.errors import ConfigError
from llm.tokenizer.base import Tokenizer


def encode_prompts(prompts: Sequence[str], tokenizer: Tokenizer, seq_len: int) -> list[list[int]]:
    """Encode the beginnings of texts, each a document of its own.

    Raises:
        ConfigError: prompts that leave no room for a single new token, all of them.
        DataError: a character that the vocabulary cannot say.
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
