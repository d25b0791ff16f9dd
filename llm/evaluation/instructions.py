"""Held-out instructions: read from the validation chats, answered, and compared by exact match.

A packed chat is `<|bos|>`, then for each message its role token, its text and `<|end|>`. The prompt
ends with `<|assistant|>`; the answer follows, up to `<|end|>`.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from llm.data.packed import PackedSequences
from llm.evaluation.report import Metric, rounded
from llm.inference.generate import generate
from llm.inference.options import GenerationOptions
from llm.model.transformer import Transformer
from llm.tokenizer.base import Tokenizer

SEQUENCES_PER_READ = 64
PROMPTS_PER_BATCH = 64
MAX_KINDS = 20  # the most frequent kinds get a metric of their own
NOT_IN_METRIC_NAMES = re.compile(r"[^\w\- ]")  # some of these are invalid in MLflow


@dataclass(frozen=True, kw_only=True, slots=True)
class Instruction:
    """One question with its expected answer."""

    prompt_ids: tuple[int, ...]
    """Ends with `<|assistant|>`, so that a model continues with the answer."""
    prompt: str
    expected: str
    kind: str = ""
    """Category given by the source of the chats, if any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """Instructions, and how many chats were skipped."""

    instructions: tuple[Instruction, ...]
    num_other_shapes: int
    """Chats, before the limit was reached, that are not one question and one answer."""
    num_too_long: int
    """Chats longer than the context."""


def read_instructions(sequences: PackedSequences, tokenizer: Tokenizer, limit: int) -> HeldOut:
    """Return the first `limit` chats of one question and one answer, or all if there are fewer."""
    found: list[Instruction] = []
    num_other_shapes = 0
    for ordinal, ids in read_whole_documents(sequences):
        if len(found) == limit:
            break
        split = ids.index(tokenizer.assistant_id) + 1 if tokenizer.assistant_id in ids else 0
        prompt, expected = ids[:split], ids[split:]
        if prompt.count(tokenizer.user_id) != 1 or expected.count(tokenizer.end_id) != 1:
            num_other_shapes += 1
        else:
            found.append(
                Instruction(
                    prompt_ids=tuple(prompt),
                    prompt=_prompt_text(prompt, tokenizer),
                    expected=tokenizer.decode(expected),
                    kind=NOT_IN_METRIC_NAMES.sub("_", sequences.kind(ordinal)),
                )
            )
    return HeldOut(
        instructions=tuple(found),
        num_other_shapes=num_other_shapes,
        num_too_long=sequences.info.num_cut_documents,
    )


def read_whole_documents(sequences: PackedSequences) -> Iterator[tuple[int, list[int]]]:
    """Yield ordinal and ids, bos first, of every document that lies in a single sequence."""
    cut = set(sequences.cut_documents().tolist())
    for start in range(0, sequences.num_sequences, SEQUENCES_PER_READ):
        indices = np.arange(start, min(start + SEQUENCES_PER_READ, sequences.num_sequences))
        tokens, _, documents = sequences.read(indices)
        for row, owners in zip(tokens, documents, strict=True):
            ends = np.flatnonzero(np.diff(owners, append=-1)) + 1
            for begin, end in pairwise([0, *ends.tolist()]):
                ids = row[begin:end]
                if int(owners[begin]) not in cut:
                    yield int(owners[begin]), ids[ids != sequences.layout.pad_id].tolist()


def answer_instructions(
    model: Transformer,
    tokenizer: Tokenizer,
    instructions: Sequence[Instruction],
    max_new_tokens: int,
) -> Iterator[list[str]]:
    """Yield the model's greedy answers in order, batch by batch."""
    stop_ids = (tokenizer.end_id, tokenizer.bos_id)
    options = GenerationOptions(max_new_tokens=max_new_tokens, stop_ids=stop_ids)
    for start in range(0, len(instructions), PROMPTS_PER_BATCH):
        batch = instructions[start : start + PROMPTS_PER_BATCH]
        completions = generate(model, [each.prompt_ids for each in batch], options)
        yield [tokenizer.decode(ids) for ids in completions]


def exact_match(answers: Sequence[str], instructions: Sequence[Instruction]) -> Metric:
    """Return the share of answers equal to the expected ones, ignoring white space at the ends.

    The error is half the width of Wilson's interval at one standard error: unlike the binomial
    error it is not zero when all answers are right, or none.

    Source: Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    count = len(instructions)
    pairs = zip(answers, instructions, strict=True)
    num_right = sum(found.strip() == wanted.expected.strip() for found, wanted in pairs)
    share = num_right / count
    error = math.sqrt(share * (1 - share) / count + 1 / (4 * count**2)) / (1 + 1 / count)
    return Metric(
        value=rounded(share),
        unit="share of answers",
        num_examples=count,
        standard_error=rounded(error),
    )


def exact_match_by_kind(
    answers: Sequence[str], instructions: Sequence[Instruction]
) -> dict[str, Metric]:
    """Return the exact match of each of the most frequent kinds, sorted."""
    counts = Counter(instruction.kind for instruction in instructions if instruction.kind)
    kinds = sorted(counts, key=lambda kind: (-counts[kind], kind))[:MAX_KINDS]
    pairs = list(zip(answers, instructions, strict=True))
    return {
        kind: exact_match(*zip(*(pair for pair in pairs if pair[1].kind == kind), strict=True))
        for kind in sorted(kinds)
    }


def one_of_each_kind(instructions: Sequence[Instruction], count: int) -> list[int]:
    """Return the indices of `count` instructions to show: first one of each kind, then others."""
    firsts: dict[str, int] = {}
    for index, instruction in enumerate(instructions):
        firsts.setdefault(instruction.kind, index)
    others = [index for index in range(len(instructions)) if index not in firsts.values()]
    return [*firsts.values(), *others][:count]


def _prompt_text(prompt: Sequence[int], tokenizer: Tokenizer) -> str:
    """Return the texts of a prompt's messages, separated by blank lines."""
    messages: list[list[int]] = [[]]
    for token in prompt:
        if token == tokenizer.end_id:
            messages.append([])
        messages[-1].append(token)
    return "\n\n".join(filter(None, map(tokenizer.decode, messages)))
