"""How a model goes on with the beginnings of texts: the samples that people look at first."""

from collections.abc import Sequence

from llm.inference.generate import generate_texts
from llm.inference.sampling import Sampling
from llm.model.transformer import Transformer
from llm.tokenizer.base import Tokenizer


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
