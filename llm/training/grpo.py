"""Group relative policy optimization: reinforce answers that are better than their group's mean.

For each prompt a group of answers is sampled from the model and judged by rules; there is no model
of rewards or values.

Source: Shao et al. 2024, "DeepSeekMath", arXiv:2402.03300, section 4.1; the loss per token instead
of per answer is that of "DAPO" (arXiv:2503.14476), section 3.3.

    B  packed sequences of prompts and answers    T  positions    A  answers
"""

import copy
import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm.artifact import ArtifactWriter, Json, write_bytes_atomically
from llm.config import AlignConfig
from llm.data.packed import PADDING_ID, PackedArrays
from llm.errors import ArtifactError, DataError
from llm.inference.packed import packed
from llm.model.loss import IGNORED, ModelWithLoss
from llm.model.precision import autocast
from llm.model.transformer import Transformer
from llm.runtime.job import STARTING_MODEL, Job
from llm.seeds import derive_seed
from llm.training.batches import POSITIONS, StepBatches
from llm.training.checkpoints import PREFIX
from llm.training.objectives import Batch, NextToken, TrainingStart, sums
from llm.training.packed_answers import PackedAnswers, has_gradient
from llm.training.rewards import Reward, load_rewards
from llm.training.rollouts import (
    Group,
    Sampler,
    group_metrics,
    group_sums,
    problems_in,
    read_groups,
    read_problems,
    remove_groups,
    write_groups,
)
from llm.training.run import train
from llm.training.sequences import sample_sequences
from llm.training.shares import share_of

SAMPLES_FILE = "samples.jsonl"
SAMPLED_PROMPTS = 4  # per logged step, with all their answers


def grpo(
    job: Job, writer: ArtifactWriter, config: AlignConfig, model: Transformer
) -> dict[str, Json]:
    """Train from the starting model's weights on the problems of the packed chats.

    Raises:
        ConfigError: a reward function that cannot be loaded.
        DataError: no problem that fits the context.
        StageError: a reward function failed on all prompts of a step; the last checkpoint stays.
    """
    rewards = load_rewards(config.grpo.rewards, "align.grpo.rewards")
    make_objective = partial(Grpo, config=config, rewards=rewards)
    start = Path(job.inputs[STARTING_MODEL])
    summary = train(job, writer, model, config, start, make_objective)
    samples = job.work / SAMPLES_FILE
    if samples.exists():  # of the main process
        writer.write_bytes(SAMPLES_FILE, samples.read_bytes(), is_log=True)
    return summary


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyLoss:
    """The loss per token, from log-probabilities."""

    clip: float
    kl_coefficient: float

    def __call__(
        self, new: Tensor, old: Tensor, advantages: Tensor, reference: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the loss of each token, whether its ratio was clipped, and the divergence.

        All of one shape. Clipping ends the gradient of a token whose probability has already
        changed by `clip` in the direction of its advantage.

        Source: "PPO" (arXiv:1707.06347), equation 7; the estimator of the divergence is k3 of
        Schulman 2020, "Approximating KL Divergence": never negative, and unbiased.
        """
        ratio = (new - old).exp()
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        gains = torch.minimum(ratio * advantages, clipped * advantages)
        found = {"loss": -gains, "policy/clip_fraction": clipped * advantages < ratio * advantages}
        if reference is not None:
            difference = reference - new
            found["policy/kl"] = difference.exp() - difference - 1
            found["loss"] = found["loss"] + self.kl_coefficient * found["policy/kl"]
        return found


class Grpo:
    """The objective: samples a step's answers, and reinforces them.

    A target is a token of an answer, its end included. The answers of a group without a gradient,
    since its rewards are equal, are not trained on: they are no targets.
    """

    def __init__(
        self, start: TrainingStart, *, config: AlignConfig, rewards: Sequence[Reward]
    ) -> None:
        """Read the problems of the training split, and keep the starting model if it is needed."""
        self._start, self._config, self._rewards = start, config, rewards
        # of each answer alone, and of held-out chats as the other stages measure them
        self._alone = NextToken(document_mask=True)
        self._validation = NextToken(document_mask=config.document_mask)
        self._loss = PolicyLoss(clip=config.grpo.clip, kl_coefficient=config.grpo.kl_coefficient)
        self._groups_folder = start.job.work / "groups"
        # the prompt and the answer, less its last token, are the input
        self._max_prompt_tokens = start.sequences.seq_len + 1 - config.grpo.max_new_tokens
        self._is_training = start.sequences.split == "train"
        self._problems = []
        self._reference: ModelWithLoss | None = None
        if self._is_training:
            found = read_problems(start.sequences, start.tokenizer, self._max_prompt_tokens)
            self._problems = found.found
            self._refuse_no_problems(found.num_too_long, found.num_without_answer)
            if config.grpo.kl_coefficient:
                self._reference = ModelWithLoss(copy.deepcopy(start.model.model).eval())
                self._reference.requires_grad_(False)
        self._sampler = Sampler(self._problems, start.tokenizer, rewards, config.grpo)

    def make_batch(self, arrays: PackedArrays, samples: npt.NDArray[np.int64]) -> Batch:
        """Make a batch of held-out chats, with their documents."""
        return self._alone.make_batch(arrays, samples)

    def count_targets(self, batch: Batch) -> Tensor:
        """Return the number of target tokens of each sequence, (B,)."""
        return self._alone.count_targets(batch)

    def sampled_steps(self, first_step: int) -> Generator[StepBatches]:
        """Sample this process's prompts of each step and yield the batches.

        Several updates on one sampling take the same batches, also when training resumes between.
        """
        num_updates = self._config.grpo.updates_per_sampling
        batches: StepBatches | None = None
        for step in range(first_step, self._config.num_steps):
            if batches is None or step % num_updates == 0:
                sampling = step // num_updates
                is_new = step % num_updates == 0
                groups = self._groups(sampling, is_new=is_new)
                if is_new:
                    self._write_samples(step, groups)
                batches = self._batches(groups, sampling, step)
            yield batches

    def step_metrics(self, sums: Mapping[str, float]) -> Mapping[str, float]:
        """Return rewards, their spread, and lengths of the answers."""
        return group_metrics(sums, self._rewards)

    def loss(self, model: ModelWithLoss, batch: Batch) -> dict[str, Tensor]:
        """Return the sums of the loss, of clipped tokens and of the divergence."""
        new = self._log_probs(model, batch)
        # without older ones the model of the sampling is this one: a ratio of 1, with a gradient
        old = batch.extras.get("old", new.detach())
        found = self._loss(new, old, batch.extras["advantages"], batch.extras.get("reference"))
        is_target = batch.targets != IGNORED  # a token without a target has the log-probability 0
        return {name: (value * is_target).sum() for name, value in found.items()}

    def measure(
        self, model: ModelWithLoss, batch: Batch, token_bytes: Tensor
    ) -> Mapping[str, Tensor]:
        """Return the sums of a chat model, and of the rewards of greedy answers to the prompts."""
        documents = batch.document_ids if self._config.document_mask else None
        of_chats = self._validation.measure(
            model, replace(batch, document_ids=documents), token_bytes
        )
        problems = [
            problem
            for problem in problems_in(_arrays(batch), self._start.tokenizer)
            if len(problem.prompt) <= self._max_prompt_tokens
        ]
        device = batch.inputs.device
        with torch.autocast(device.type, enabled=False):  # in fp32, as the report's answers
            found = self._sampler.greedy_rewards(packed(model.model), problems)
        rewards = torch.tensor(found, dtype=torch.float64, device=device)
        return {**of_chats, "reward": sums(rewards, torch.ones_like(rewards))}

    def _groups(self, sampling: int, *, is_new: bool) -> list[Group]:
        """Sample this process's groups, or read those that earlier updates were made on."""
        start, config = self._start, self._config
        accelerator = start.accelerator
        num_prompts = config.global_batch_size // config.grpo.group_size
        share = share_of(num_prompts, accelerator.process_index, accelerator.num_processes)
        if not is_new:
            known = read_groups(self._groups_folder, sampling)
            if missing := sorted(set(share) - known.keys()):
                raise ArtifactError(
                    f"{self._groups_folder}: no groups {missing} of sampling {sampling}, which the"
                    f" checkpoint was trained on; remove {start.job.work} to train again"
                )
            return [known[index] for index in share]
        samples = sampling * num_prompts + np.array(share, dtype=np.int64)
        numbers = sample_sequences(derive_seed(start.seed, "prompts"), samples, len(self._problems))
        return self._sampler.sample(
            packed(start.model.model, config.precision),
            derive_seed(start.seed, "answers", sampling),
            dict(zip(share, numbers.tolist(), strict=True)),
        )

    def _batches(self, groups: Sequence[Group], sampling: int, step: int) -> StepBatches:
        """Pack the answers that have a gradient, with what the loss reads."""
        start, config = self._start, self._config.grpo
        packing = PackedAnswers(groups, config, start.tokenizer.pad_id, start.sequences.seq_len)
        arrays, size = packing.filled_up(start.micro_batch_size * start.sequences.seq_len)
        batch = self._alone.make_batch(arrays, np.arange(len(arrays.tokens)))
        extras = {"advantages": packing.per_token(packing.advantages, len(batch.inputs))}
        old = [log_probs for group in packing.groups for log_probs in group.log_probs]
        if old:
            extras["old"] = packing.per_token(old, len(batch.inputs))
        batch = replace(batch, extras=extras).to(start.accelerator.device)
        micro_batches = [batch.sequences(at, size) for at in range(0, len(batch.inputs), size)]
        if config.kl_coefficient:
            micro_batches = [
                self._with(self._reference, "reference", each) for each in micro_batches
            ]
        if config.updates_per_sampling > 1:
            if not old:
                micro_batches = [self._with(start.model, "old", each) for each in micro_batches]
            if step % config.updates_per_sampling == 0:
                found = torch.cat([each.extras["old"] for each in micro_batches])
                self._keep_groups(sampling, groups, packing.per_answer(found))
        return StepBatches(
            micro_batches=micro_batches,
            num_targets=sum(int(self.count_targets(each).sum()) for each in micro_batches),
            sums=group_sums(groups, self._rewards) | {POSITIONS: float(batch.inputs.numel())},
        )

    def _keep_groups(
        self, sampling: int, groups: Sequence[Group], log_probs: Sequence[Sequence[list[float]]]
    ) -> None:
        """Write the groups for a training that resumes between two updates on them."""
        trained = iter(log_probs)
        kept = [
            replace(each, log_probs=list(next(trained))) if has_gradient(each, self._config.grpo)
            else each
            for each in groups
        ]  # fmt: skip
        accelerator = self._start.accelerator
        write_groups(self._groups_folder, sampling, accelerator.process_index, kept)
        if accelerator.is_main_process:
            folder = self._start.job.work / "checkpoints"
            steps = [int(path.name.removeprefix(PREFIX)) for path in folder.glob(f"{PREFIX}*")]
            oldest = min(steps, default=0) // self._config.grpo.updates_per_sampling
            remove_groups(self._groups_folder, oldest)

    def _log_probs(self, model: ModelWithLoss, batch: Batch) -> Tensor:
        """Return the log-probability of each target as it was sampled, (B, T); 0 elsewhere."""
        # without dropout, as in sampling: a ratio would be mostly its noise
        model.eval()
        return -model(
            batch.inputs,
            batch.targets,
            batch.document_ids,
            is_weighted=True,
            temperature=self._config.grpo.temperature,
        )

    def _with(self, model: ModelWithLoss | None, name: str, batch: Batch) -> Batch:
        """Add the log-probabilities of the targets under a model, in the precision of training."""
        assert model is not None
        precision, device = self._config.precision, self._start.accelerator.device.type
        with autocast(precision, device):
            # with gradients, which torch.compile makes other code for: the ratio must be 1 exactly
            log_probs = self._log_probs(model, batch).detach()
        return replace(batch, extras={**batch.extras, name: log_probs})

    def _write_samples(self, step: int, groups: Sequence[Group]) -> None:
        """Add the answers to some prompts to SAMPLES_FILE, in the steps before a validation."""
        start = self._start
        every_steps = start.job.runtime.validate_every_steps
        num_updates = self._config.grpo.updates_per_sampling
        if not start.accelerator.is_main_process or step % every_steps >= num_updates:
            return
        path = start.job.work / SAMPLES_FILE
        lines = path.read_bytes().splitlines() if path.exists() else []
        # a training that resumes repeats steps
        kept = [line for line in lines if json.loads(line)["step"] < step]
        new = [
            json.dumps({"step": step, **sample}).encode()
            for sample in self._sampler.samples(groups[:SAMPLED_PROMPTS])
        ]
        write_bytes_atomically(path, b"".join(line + b"\n" for line in (*kept, *new)))

    def _refuse_no_problems(self, num_too_long: int, num_without_answer: int) -> None:
        if not self._problems:
            raise DataError(
                f"{self._start.job.inputs['sequences']}: found no prompt with a reference answer:"
                f" {num_too_long} chats leave no room for align.grpo.max_new_tokens ="
                f" {self._config.grpo.max_new_tokens} in a context of"
                f" {self._start.sequences.seq_len}, {num_without_answer} have no answer"
            )


def _arrays(batch: Batch) -> PackedArrays:
    """Return a batch of whole packed sequences as it was read, (B, T+1)."""
    assert batch.document_ids is not None
    last = batch.targets[:, -1:]  # the one token that is no input
    is_padding = last == IGNORED
    documents = batch.document_ids
    return PackedArrays(
        tokens=torch.cat([batch.inputs, last.masked_fill(is_padding, 0)], dim=1).cpu().numpy(),
        mask=torch.nn.functional.pad(batch.targets != IGNORED, (1, 0)).cpu().numpy(),
        document_ids=torch.cat(
            [documents, documents[:, -1:].masked_fill(is_padding, PADDING_ID)], dim=1
        ).cpu().numpy(),
    )  # fmt: skip
