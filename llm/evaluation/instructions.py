"""Held-out instructions: read from the validation chats, answered, and compared by exact match."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import compress

from llm.data.chat import split_last_answer
from llm.data.packed import PackedSequences
from llm.data.packed_chats import prompt_text, read_chats
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
    """Ends where the answer begins, so that a model continues with it."""
    prompt: str
    expected: str
    kind: str = ""
    """Category given by the source of the chats, if any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """Instructions, and how many chats were skipped."""

    instructions: tuple[Instruction, ...]
    num_other_shapes: int
    """Chats, before the limit was reached, that do not end with their only answer, or lost parts of
    it because they are longer than a sequence.
    """


def read_instructions(sequences: PackedSequences, tokenizer: Tokenizer, limit: int) -> HeldOut:
    """Return the first `limit` chats that end with their only answer, or all if there are fewer."""
    found: list[Instruction] = []
    num_other_shapes = 0
    for ordinal, chat in read_chats(sequences):
        if len(found) == limit:
            break
        num_answers = [*compress(chat.ids, chat.mask)].count(tokenizer.end_id)
        split = split_last_answer(*chat, tokenizer) if num_answers == 1 else None
        if split is None:
            num_other_shapes += 1
        else:
            found.append(
                Instruction(
                    prompt_ids=tuple(split.prompt_ids),
                    prompt=prompt_text(split.prompt_ids, tokenizer),
                    expected=split.answer,
                    kind=NOT_IN_METRIC_NAMES.sub("_", sequences.kind(ordinal)),
                )
            )
    return HeldOut(instructions=tuple(found), num_other_shapes=num_other_shapes)


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


def are_right(answers: Sequence[str], instructions: Sequence[Instruction]) -> list[bool]:
    """Return whether each answer is the expected one, ignoring white space at the ends."""
    pairs = zip(answers, instructions, strict=True)
    return [found.strip() == wanted.expected.strip() for found, wanted in pairs]


def exact_match(answers: Sequence[str], instructions: Sequence[Instruction]) -> Metric:
    """Return the share of answers that are right.

    The error is half the width of Wilson's interval at one standard error: unlike the binomial
    error it is not zero when all answers are right, or none.

    Source: Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    count, num_right = len(instructions), sum(are_right(answers, instructions))
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
