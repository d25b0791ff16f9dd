"""Rollouts for GRPO: problems from packed chats, groups of sampled answers, and their rewards.

A problem is a chat: the prompt is all before its last answer, which is the reference. Which
problems a step takes, and what is sampled for each, is a function of the seed and the step.

Shapes: B sequences, T positions.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, pstdev, stdev
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llm.artifact import write_bytes_atomically
from llm.config import GrpoConfig
from llm.data.chat import RenderedChat, split_last_answer
from llm.data.packed import PackedArrays, PackedSequences
from llm.data.packed_chats import chats_in, prompt_text, read_chats
from llm.errors import ArtifactError, StageError
from llm.inference.generate import generate
from llm.inference.options import GenerationOptions
from llm.model.transformer import Transformer
from llm.seeds import derive_seed
from llm.tokenizer.base import Tokenizer
from llm.training.rewards import Answer, Reward, judge, total

# sampled at once: short answers took 40 % less time than in batches of 64, 512 no less than 256
SEQUENCES_PER_BATCH = 256
SPREAD_EPSILON = 1e-4  # as in TRL: groups of almost equal rewards get no huge advantages


class Problem(NamedTuple):
    """A prompt with the answer that the data holds, as token ids."""

    prompt: npt.NDArray[np.uint32]
    """From bos to the token after which the answer begins."""
    reference: npt.NDArray[np.uint32]
    """Without the token that ends it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problems:
    """The problems of a split, and how many chats are none."""

    found: Sequence[Problem]
    num_too_long: int
    """Prompts without room for an answer in the context; and chats cut by packing."""
    num_without_answer: int
    """Chats without an answer of the assistant."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The sampled answers to one prompt, with their rewards."""

    index: int
    """Among the prompts of its step, over all processes."""
    problem: int
    """Its number in the split."""
    prompt: list[int]
    answers: list[list[int]]
    """Token ids, with the end where the model ended it."""
    has_ended: list[bool]
    values: dict[str, list[float]]
    """What each reward function gave to each answer, without weights."""
    rewards: list[float]
    """Their weighted sums."""
    is_failed: bool
    """A reward function failed on one of the answers: the group does not count."""
    log_probs: list[list[float]] = field(default_factory=list[list[float]])
    """Of each answer's tokens when they were sampled, where later updates need them."""

    @property
    def is_equal(self) -> bool:
        """Whether all rewards are equal, so that no answer is better than another."""
        return self.is_failed or max(self.rewards) == min(self.rewards)

    def advantages(self, *, divides_by_spread: bool) -> list[float]:
        """Return how much better each answer is than the mean of its group, in units of the spread.

        The spread is the sample standard deviation (n - 1), plus SPREAD_EPSILON, as in TRL.

        Source: Shao et al. 2024, arXiv:2402.03300, section 4.1.2; "Dr. GRPO" (arXiv:2503.20783)
        does not divide.
        """
        if self.is_equal:
            return [0.0] * len(self.rewards)
        mean = fmean(self.rewards)
        scale = stdev(self.rewards) + SPREAD_EPSILON if divides_by_spread else 1.0
        return [(reward - mean) / scale for reward in self.rewards]


class Sampler:
    """Samples and judges answers to the problems of a split."""

    def __init__(
        self, problems: Sequence[Problem], tokenizer: Tokenizer, rewards: Sequence[Reward],
        config: GrpoConfig,
    ) -> None:  # fmt: skip
        self._problems, self._tokenizer = problems, tokenizer
        self._rewards, self._config = rewards, config
        self._has_warned = False

    def sample(self, model: Transformer, seed: int, numbers: Mapping[int, int]) -> list[Group]:
        """Sample a group for each problem, {index in the step: number in the split}.

        `model` is `packed`. `seed` is of the step; each answer's own derives from it, its problem
        and its number in the group: neither other problems nor the processes matter.

        Raises:
            StageError: a reward function failed on every problem; the first failure.
        """
        config, size = self._config, self._config.group_size
        prompts = [self._problems[number].prompt.tolist() for number in numbers.values()]
        options = GenerationOptions(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            stop_ids=(self._tokenizer.end_id,),
        )
        seeds = [
            derive_seed(seed, "answer", index, nth) for index in numbers for nth in range(size)
        ]
        repeated = [prompt for prompt in prompts for _ in range(size)]
        sampled = iter(generate(model, repeated, options, seeds, SEQUENCES_PER_BATCH))
        groups: list[Group] = []
        failures: list[StageError] = []
        for (index, number), prompt in zip(numbers.items(), prompts, strict=True):
            answers = [next(sampled) for _ in range(size)]
            # shorter than the limit: only the end token stops it, which is an action too
            has_ended = [len(ids) < config.max_new_tokens for ids in answers]
            group = Group(
                index=index,
                problem=number,
                prompt=prompt,
                answers=[
                    [*ids, self._tokenizer.end_id] if ended else ids
                    for ids, ended in zip(answers, has_ended, strict=True)
                ],
                has_ended=has_ended,
                values={},
                rewards=[0.0] * size,
                is_failed=True,
            )
            try:
                groups.append(self._judged(group))
            except StageError as error:
                failures.append(error)
                groups.append(group)
        self._report(failures, len(groups))
        return groups

    def greedy_rewards(self, model: Transformer, problems: Sequence[Problem]) -> list[float]:
        """Return the rewards of the model's most probable answers, where no function failed.

        Raises:
            StageError: a reward function failed on every answer.
        """
        limit = self._config.max_new_tokens
        options = GenerationOptions(max_new_tokens=limit, stop_ids=(self._tokenizer.end_id,))
        answers = generate(model, [each.prompt.tolist() for each in problems], options)
        rewards: list[float] = []
        failures: list[StageError] = []
        for problem, ids in zip(problems, answers, strict=True):
            try:
                values = self._values(problem, ids, len(ids) < limit)
                rewards.append(total(self._rewards, values))
            except StageError as error:
                failures.append(error)
        self._report(failures, len(problems))
        return rewards

    def samples(self, groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
        """Yield each answer as people read it."""
        for group in groups:
            prompt = prompt_text(group.prompt, self._tokenizer)
            reference = self._tokenizer.decode(self._problems[group.problem].reference.tolist())
            for nth, ids in enumerate(group.answers):
                yield {
                    "prompt": prompt,
                    "answer": self._tokenizer.decode(ids),
                    "reference": reference,
                    "has_ended": group.has_ended[nth],
                    "reward": group.rewards[nth],
                    "rewards": {name: values[nth] for name, values in group.values.items()},
                }

    def _judged(self, group: Group) -> Group:
        problem = self._problems[group.problem]
        pairs = zip(group.answers, group.has_ended, strict=True)
        found = [self._values(problem, ids, ended) for ids, ended in pairs]
        values = {each.name: [by_name[each.name] for by_name in found] for each in self._rewards}
        rewards = [total(self._rewards, by_name) for by_name in found]
        return replace(group, values=values, rewards=rewards, is_failed=False)

    def _values(self, problem: Problem, ids: Sequence[int], has_ended: bool) -> dict[str, float]:
        answer = Answer(
            prompt=prompt_text(problem.prompt.tolist(), self._tokenizer),
            text=self._tokenizer.decode(ids),
            reference=self._tokenizer.decode(problem.reference.tolist()),
            has_ended=has_ended,
        )
        return judge(self._rewards, answer)

    def _report(self, failures: Sequence[StageError], num_groups: int) -> None:
        """Show the first failure of all; raise it if no group is left.

        Raises:
            StageError: every group failed.
        """
        if failures and len(failures) == num_groups:  # no use to go on: the function is broken
            raise failures[0]
        if failures and not self._has_warned:
            self._has_warned = True
            print(
                f"{failures[0]}\nThis group of answers is left out, as all such from here on;"
                " groups/failed counts them.",
                file=sys.stderr,
            )


def group_sums(groups: Sequence[Group], rewards: Sequence[Reward]) -> dict[str, float]:
    """Return what the metrics of a step are made of: numbers to add up over all processes."""
    judged = [group for group in groups if not group.is_failed]
    answers = [ids for group in groups for ids in group.answers]
    return {
        "groups": len(groups),
        "judged": len(judged),
        "answers": len(answers),
        "tokens": sum(map(len, answers)),
        "ended": sum(sum(group.has_ended) for group in groups),
        "equal": sum(group.is_equal for group in judged),
        "mean": sum(fmean(group.rewards) for group in judged),
        "std": sum(pstdev(group.rewards) for group in judged),
        **{
            f"reward {each.name}": sum(fmean(group.values[each.name]) for group in judged)
            for each in rewards
        },
    }


def group_metrics(sums: Mapping[str, float], rewards: Sequence[Reward]) -> dict[str, float]:
    """Return the metrics of a step from `group_sums` over all processes."""
    judged = max(1.0, sums["judged"])  # a step without any has no rewards
    return {
        "reward/mean": sums["mean"] / judged,
        "reward/std": sums["std"] / judged,
        **{f"reward/{each.name}": sums[f"reward {each.name}"] / judged for each in rewards},
        "groups/equal": sums["equal"] / judged,
        "groups/failed": sums["groups"] - sums["judged"],
        "answers/mean_tokens": sums["tokens"] / sums["answers"],
        "answers/ended": sums["ended"] / sums["answers"],
    }


def read_problems(
    sequences: PackedSequences, tokenizer: Tokenizer, max_prompt_tokens: int
) -> Problems:
    """Read the problems of a split, in its order."""
    found: list[Problem] = []
    num_problems = num_too_long = 0
    for problem in _problems(read_chats(sequences), tokenizer):
        num_problems += 1
        if len(problem.prompt) > max_prompt_tokens:
            num_too_long += 1
        else:
            found.append(problem)
    num_cut = sequences.info.num_cut_documents
    return Problems(
        found=found,
        num_too_long=num_too_long + num_cut,
        num_without_answer=sequences.info.num_documents - num_problems - num_cut,
    )


def problems_in(arrays: PackedArrays, tokenizer: Tokenizer) -> Iterator[Problem]:
    """Yield the chats in packed sequences that end with a whole answer."""
    return _problems(chats_in(arrays), tokenizer)


def _problems(chats: Iterable[tuple[int, RenderedChat]], tokenizer: Tokenizer) -> Iterator[Problem]:
    for _, chat in chats:
        if (split := split_last_answer(*chat, tokenizer)) is not None:
            [reference] = tokenizer.encode_arrays([split.answer])
            yield Problem(prompt=np.array(split.prompt_ids, np.uint32), reference=reference)


def write_groups(folder: Path, sampling: int, process: int, groups: Sequence[Group]) -> None:
    """Write one process's groups, durably: later updates on them may follow a kill."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(group)).encode() + b"\n" for group in groups]
    write_bytes_atomically(folder / f"{sampling:08d}.{process}.jsonl", b"".join(lines))


def read_groups(folder: Path, sampling: int) -> dict[int, Group]:
    """Return the groups of all processes, by index. Floats survive JSON bit by bit."""
    found: dict[int, Group] = {}
    for path in sorted(folder.glob(f"{sampling:08d}.*.jsonl")):
        try:
            groups = [Group(**json.loads(line)) for line in path.read_bytes().splitlines()]
        except (ValueError, TypeError) as error:
            raise ArtifactError(f"{path}: damaged ({error}); remove {folder.parent}") from error
        # of another number of processes before, perhaps: equal groups
        found = {group.index: group for group in groups} | found
    return found


def remove_groups(folder: Path, before: int) -> None:
    """Remove the groups of all samplings before one."""
    for path in folder.glob("*.jsonl"):
        if int(path.name.split(".")[0]) < before:
            path.unlink(missing_ok=True)
