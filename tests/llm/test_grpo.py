"""GRPO: equal to its formulas, reproducible after kills and on any processes, and it learns."""

import json
import os
import random
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llm.align import align
from llm.artifact import ArtifactWriter
from llm.config import AlignConfig, GrpoConfig, LoraConfig, RuntimeConfig
from llm.data.chat import render_chat, render_prompt
from llm.data.packed import PADDING_ID, PackedArrays, PackedSequences
from llm.errors import ArtifactError, ConfigError, DataError, StageError
from llm.finetune import finetune
from llm.inference.packed import packed
from llm.model.loss import ModelWithLoss
from llm.model.transformer import Transformer
from llm.model.weights import load_model, save_model
from llm.runtime import failpoints
from llm.runtime.job import Job
from llm.tokenizer.bpe import ByteLevelBPE
from llm.tokenizer.load import load_tokenizer
from llm.training.batches import StepBatches
from llm.training.grpo import Grpo, PolicyLoss
from llm.training.objectives import TrainingStart
from llm.training.rewards import load_rewards
from llm.training.rollouts import Group, Sampler, problems_in, read_groups, read_problems
from tests.llm.training_setup import (
    SEQ_LEN,
    fresh_accelerator,
    points,
    run_inside,
    start,
    tiny_finetune,
    tiny_model,
    write_chat_sequences,
    write_job_file,
    write_text_sequences,
)

REWARD = "regex:[02468]$"  # of a model that answers with numbers, about half


def tiny_align(grpo: dict[str, Any] | None = None, **settings: Any) -> AlignConfig:
    """Six steps of four prompts with four answers each, changed by `settings`."""
    few = {"method": "grpo", "num_steps": 6, "global_batch_size": 16, "warmup_steps": 1}
    sampling = {"group_size": 4, "max_new_tokens": 8, "rewards": (REWARD,)}
    return AlignConfig(**{**few, **settings}, grpo=GrpoConfig(**{**sampling, **(grpo or {})}))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tokenizer: ByteLevelBPE) -> dict[str, Path]:
    """A model that has learned to answer in the form `it is 36`, and the packed chats."""
    folder = tmp_path_factory.mktemp("inputs")
    writer = ArtifactWriter(folder / "random")
    save_model(writer, tiny_model(vocab_size=tokenizer.vocab_size), tokenizer.to_files())
    writer.finish(stage="pretrain", summary={})
    sequences = write_chat_sequences(folder / "sequences", tokenizer, 60)
    config = tiny_finetune(num_steps=40, global_batch_size=16, learning_rate=1e-2)
    begin = {"base": folder / "random", "sequences": sequences}
    run_inside(finetune, write_job_file(folder / "chat", "finetune", config, begin))
    return {"base": folder / "chat" / "out", "sequences": sequences}


def objective(
    inputs: dict[str, Path], work: Path, config: AlignConfig, micro_batch_size: int = 8
) -> tuple[Grpo, TrainingStart]:
    """The objective of training, and what it was made from."""
    sequences = PackedSequences(inputs["sequences"], "train")
    begin = TrainingStart(
        job=Job(stage="align", settings={}, work=work, runtime=RuntimeConfig()),
        config=config,
        accelerator=fresh_accelerator(),
        model=ModelWithLoss(load_model(inputs["base"])),
        tokenizer=load_tokenizer(inputs["base"]),
        sequences=sequences,
        micro_batch_size=micro_batch_size,
        seed=0,
    )
    rewards = load_rewards(config.grpo.rewards, "rewards")
    return Grpo(begin, config=config, rewards=rewards), begin


def disturb(model: torch.nn.Module, seed: int) -> None:
    """Change the weights, as an update would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)


def answer_log_probs(model: Transformer, group: Group, temperature: float) -> list[Tensor]:
    """The oracle: log-probabilities of the tokens of each answer, from all logits of it alone."""
    found: list[Tensor] = []
    for answer in group.answers:
        tokens = torch.tensor([[*group.prompt, *answer]])
        log_probs = (model(tokens[:, :-1])[0].double() / temperature).log_softmax(dim=-1)
        of_targets = log_probs.gather(-1, tokens[0, 1:, None]).squeeze(-1)
        found.append(of_targets[len(group.prompt) - 1 :])
    return found


def loss_sum(grpo: Grpo, model: ModelWithLoss, step: StepBatches) -> dict[str, Tensor]:
    """Sums over all micro-batches of a step."""
    parts = [grpo.loss(model, batch) for batch in step.micro_batches]
    return {name: torch.stack([part[name] for part in parts]).sum() for name in parts[0]}


def make_group(rewards: list[float]) -> Group:
    return Group(
        index=0,
        problem=0,
        prompt=[1, 2],
        answers=[[3]] * len(rewards),
        has_ended=[True] * len(rewards),
        values={},
        rewards=rewards,
        is_failed=False,
    )


@pytest.mark.parametrize("divides_by_spread", [True, False])
def test_an_advantage_is_the_distance_from_the_groups_mean(divides_by_spread: bool) -> None:
    rewards = torch.tensor([0.0, 1.0, 1.0, 3.5], dtype=torch.float64)
    expected = rewards - rewards.mean()
    if divides_by_spread:
        expected /= rewards.std() + 1e-4  # as trl.GRPOTrainer
    found = make_group(rewards.tolist()).advantages(divides_by_spread=divides_by_spread)
    assert found == pytest.approx(expected.tolist(), abs=1e-6)
    assert make_group([0.3] * 4).advantages(divides_by_spread=divides_by_spread) == [0.0] * 4


def test_ratio_clip_and_divergence_equal_plain_numbers_per_token() -> None:
    generator = random.Random(0)
    new, old, reference, advantages = (
        [generator.gauss(0, 0.4) for _ in range(500)] for _ in range(4)
    )
    tensors = [torch.tensor(each) for each in (new, old, advantages, reference)]
    found = PolicyLoss(clip=0.2, kl_coefficient=0.3)(*tensors)
    for t in range(500):
        ratio = float(np.exp(new[t] - old[t]))
        limited = min(max(ratio, 0.8), 1.2)
        divergence = float(np.exp(reference[t] - new[t])) - (reference[t] - new[t]) - 1
        gain = min(ratio * advantages[t], limited * advantages[t])
        assert float(found["loss"][t]) == pytest.approx(-gain + 0.3 * divergence, abs=1e-6)
        assert float(found["policy/kl"][t]) == pytest.approx(divergence, abs=1e-6)
        is_clipped = ratio > 1.2 if advantages[t] > 0 else ratio < 0.8
        assert bool(found["policy/clip_fraction"][t]) == is_clipped
    assert "policy/kl" not in PolicyLoss(clip=0.2, kl_coefficient=0.0)(*tensors[:3], None)


@pytest.mark.parametrize("micro_batch_size", [8, 1])
def test_loss_and_gradient_of_packed_answers_equal_plain_torch_on_each_answer_alone(
    inputs: dict[str, Path], tmp_path: Path, micro_batch_size: int
) -> None:
    sampling = {"temperature": 0.7, "kl_coefficient": 0.3, "updates_per_sampling": 2}
    config = tiny_align(sampling)
    grpo, begin = objective(inputs, tmp_path, config, micro_batch_size)
    reference = load_model(inputs["base"])
    disturb(begin.model, seed=1)  # earlier updates: no longer the reference
    sampled_from = load_model(inputs["base"])
    disturb(sampled_from, seed=1)
    steps = grpo.sampled_steps(0)
    step = next(steps)
    first = loss_sum(grpo, begin.model, step)
    disturb(begin.model, seed=2)  # the first update
    assert next(steps) is step, "two updates on one sampling"
    begin.model.zero_grad()
    second = loss_sum(grpo, begin.model, step)
    second["loss"].backward()

    groups = list(read_groups(tmp_path / "groups", 0).values())
    model = load_model(inputs["base"])
    model.load_state_dict(begin.model.model.state_dict())
    total = torch.zeros((), dtype=torch.float64)
    num_tokens = num_clipped = 0
    divergence = 0.0
    for group in groups:
        rewards = torch.tensor(group.rewards, dtype=torch.float64)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        of_models = [
            answer_log_probs(each, group, 0.7) for each in (model, sampled_from, reference)
        ]
        for advantage, new, old, known in zip(advantages.double(), *of_models, strict=True):
            ratio = (new - old.detach()).exp()
            limited = ratio.clamp(0.8, 1.2)
            k3 = (known.detach() - new).exp() - (known.detach() - new) - 1
            total = total + (0.3 * k3 - torch.minimum(ratio * advantage, limited * advantage)).sum()
            num_clipped += int((limited * advantage < ratio * advantage).sum())
            divergence += k3.sum().item()
            num_tokens += len(new)
    total.backward()
    second["loss"], total = second["loss"].detach(), total.detach()
    assert step.num_targets == num_tokens
    assert first["policy/clip_fraction"].item() == 0, "the ratio of the first update is 1"
    assert float(second["loss"]) == pytest.approx(float(total), rel=1e-5, abs=1e-5)
    assert second["policy/kl"].item() == pytest.approx(divergence, rel=1e-4)
    assert second["policy/clip_fraction"].item() == num_clipped > 0
    for (name, found), expected in zip(
        begin.model.model.named_parameters(), model.parameters(), strict=True
    ):
        assert found.grad is not None
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_the_first_ratio_is_exactly_one_with_and_without_kept_log_probabilities(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    losses: list[float] = []
    for num_updates in (1, 2):
        config = tiny_align({"updates_per_sampling": num_updates})
        grpo, begin = objective(inputs, tmp_path, config)
        step = next(grpo.sampled_steps(0))
        found = loss_sum(grpo, begin.model, step)
        losses.append(found["loss"].item())
        batch = step.micro_batches[0]
        assert ("old" in batch.extras) == (num_updates == 2)
        expected = -sum(float(each.extras["advantages"].sum()) for each in step.micro_batches)
        assert losses[-1] == pytest.approx(expected, abs=1e-5)
    assert losses[0] == losses[1]


def test_a_sampled_answer_depends_on_seed_step_and_its_number_alone(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    _, begin = objective(inputs, tmp_path, tiny_align())
    problems = read_problems(begin.sequences, begin.tokenizer, 20).found
    rewards = load_rewards([REWARD], "rewards")
    sampler = Sampler(problems, begin.tokenizer, rewards, tiny_align().grpo)
    model = packed(begin.model.model)
    all_groups = sampler.sample(model, 7, {0: 3, 1: 9, 2: 4, 3: 3})
    assert [all_groups[2]] == sampler.sample(model, 7, {2: 4}), "whatever is sampled beside it"
    assert all_groups[0].prompt == all_groups[3].prompt
    assert all_groups[0].answers != all_groups[3].answers
    assert len(set(map(tuple, all_groups[0].answers))) > 1
    assert sampler.sample(model, 8, {2: 4})[0].answers != all_groups[2].answers


def test_prompts_are_all_before_the_last_answer_and_none_is_taken_twice_in_a_pass(
    tmp_path: Path, inputs: dict[str, Path], tokenizer: ByteLevelBPE
) -> None:
    sequences = PackedSequences(inputs["sequences"], "train")
    found = read_problems(sequences, tokenizer, 20)
    assert (len(found.found), found.num_too_long, found.num_without_answer) == (48, 0, 0)
    numbers = [number for number in range(60) if number % 5]
    for number, problem in zip(numbers, found.found, strict=True):
        question = {"role": "user", "content": f"what is {number}?"}
        assert problem.prompt.tolist() == render_prompt([question], tokenizer)
        assert tokenizer.decode(problem.reference.tolist()) == f"it is {number * number}"
    longest = max(len(problem.prompt) for problem in found.found)
    shorter = read_problems(sequences, tokenizer, longest - 1)
    assert shorter.num_too_long == 48 - len(shorter.found) > 0

    grpo, _ = objective(inputs, tmp_path, tiny_align({"updates_per_sampling": 2}, num_steps=24))
    for _ in grpo.sampled_steps(0):
        pass
    taken = [g.problem for n in range(12) for g in read_groups(tmp_path / "groups", n).values()]
    assert sorted(taken) == list(range(48)), "one pass"


def test_multi_turn_chats_end_in_the_reference(tokenizer: ByteLevelBPE) -> None:
    words = ["user one", "assistant two", "user three", "assistant four"]
    messages = [{"role": word.split()[0], "content": word.split()[1]} for word in words]
    chat = render_chat(messages, tokenizer)
    half = chat.mask.index(True) + 1  # inside the first answer
    ids = [*chat.ids, *chat.ids[:half], tokenizer.pad_id]
    mask = [*chat.mask, *chat.mask[:half], False]
    documents = [0] * len(chat.ids) + [1] * half + [PADDING_ID]
    arrays = PackedArrays(np.array([ids]), np.array([mask]), np.array([documents]))
    [problem] = problems_in(arrays, tokenizer)  # the second chat is cut
    assert problem.prompt.tolist() == render_prompt(messages[:3], tokenizer)
    assert tokenizer.decode(problem.reference.tolist()) == "four"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_reward_on_held_out_prompts_rises(
    seed: int, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    config = tiny_align(
        {"rewards": (REWARD, "0.5*format")}, num_steps=30, global_batch_size=64, learning_rate=3e-3
    )
    path = write_job_file(tmp_path, "align", config, inputs, validate_every_steps=10)
    job = json.loads(path.read_text()) | {"seed": seed}
    path.write_text(json.dumps(job))
    run_inside(align, path)
    found = [point["metrics"] for point in points(tmp_path)]
    held_out = [point["val/reward"] for point in found if "val/reward" in point]
    sampled = [point["reward/mean"] for point in found if "reward/mean" in point]
    assert held_out[-1] > held_out[0] + 0.2
    assert statistics.fmean(sampled[-5:]) > statistics.fmean(sampled[:5]) + 0.2
    assert all("val/bits_per_byte" in point for point in found if "val/loss" in point)
    first = found[1]
    assert first["reward/mean"] == pytest.approx(
        first["reward/regex_02468"] + 0.5 * first["reward/format"]
    )
    assert 0 <= first["groups/equal"] < 1
    assert 0 < first["answers/mean_tokens"] <= 8
    samples = [
        json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()
    ]
    assert {sample["step"] for sample in samples} == {0, 10, 20}
    assert samples[0].keys() >= {"prompt", "answer", "reference", "reward", "rewards"}
    assert samples[0]["prompt"].startswith("what is ")
    assert samples[0]["reference"].startswith("it is ")


def test_equal_rewards_are_counted_and_change_no_weight(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    config = tiny_align({"rewards": ("regex:",)}, num_steps=2, weight_decay=0.5)
    summary = run_inside(align, write_job_file(tmp_path, "align", config, inputs))
    assert summary["num_skipped_steps"] == 2
    weights = "out/model.safetensors", inputs["base"] / "model.safetensors"
    assert (tmp_path / weights[0]).read_bytes() == weights[1].read_bytes()
    trained = [point["metrics"] for point in points(tmp_path) if point["step"]]
    assert [each["groups/equal"] for each in trained if "groups/equal" in each] == [1.0, 1.0]


def run(folder: Path, inputs: dict[str, Path], config: AlignConfig, **runtime: Any) -> None:
    """Run the stage as a process, to its end."""
    process = start(write_job_file(folder, "align", config, inputs, **runtime), "align")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


def digest(folder: Path) -> str:
    return json.loads((folder / "out" / "manifest.json").read_text())["digest"]


def test_a_kill_between_two_updates_on_the_same_answers_changes_no_bit(
    tmp_path: Path,
    inputs: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # samplings before steps 0, 3 and 6; checkpoints after 2, 4, 6 and 8
    # with a divergence every step has a gradient, so that each reaches the failpoint
    config = tiny_align({"updates_per_sampling": 3, "kl_coefficient": 0.1}, num_steps=8)
    runtime = {"checkpoint_every_steps": 2}
    run(tmp_path / "undisturbed", inputs, config, **runtime)
    killed = tmp_path / "killed"
    for reached in (4, 3):  # the losses of steps 4 and then 5: each resumes between two updates
        monkeypatch.setenv(failpoints.VARIABLE, f"training.loss:{reached}=kill")
        process = start(write_job_file(killed, "align", config, inputs, **runtime), "align")
        process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL
    monkeypatch.delenv(failpoints.VARIABLE)
    run(killed, inputs, config, **runtime)
    assert digest(killed) == digest(tmp_path / "undisturbed")
    assert points(killed) == points(tmp_path / "undisturbed")
    kept = {path.name[:8] for path in (killed / "work" / "groups").iterdir()}
    assert kept == {"00000001", "00000002"}, "those before the oldest checkpoint are gone"


def test_sigkill_while_it_samples_changes_no_bit(tmp_path: Path, inputs: dict[str, Path]) -> None:
    config = tiny_align(num_steps=12)
    run(tmp_path / "undisturbed", inputs, config)
    killed = tmp_path / "killed"
    metrics = killed / "work" / "metrics.jsonl"
    process = start(write_job_file(killed, "align", config, inputs), "align")
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    run(killed, inputs, config)
    assert digest(killed) == digest(tmp_path / "undisturbed")
    assert points(killed) == points(tmp_path / "undisturbed")


@pytest.mark.distributed
def test_two_processes_share_the_prompts_of_a_step(tmp_path: Path, inputs: dict[str, Path]) -> None:
    config = tiny_align({"updates_per_sampling": 2}, global_batch_size=12)
    for num_processes in (1, 2):
        folder = tmp_path / str(num_processes)
        run(folder, inputs, config, num_processes=num_processes)
    one, two = (points(tmp_path / str(number)) for number in (1, 2))
    for name in ("reward/mean", "answers/mean_tokens", "groups/equal"):
        # the same prompts and answers, whichever process samples them
        assert [p["metrics"].get(name) for p in two[:3]] == [
            p["metrics"].get(name) for p in one[:3]
        ]
    losses = [[p["metrics"].get("train/loss") for p in each if p["step"]] for each in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)  # sums in another order, then updates


def test_groups_that_are_gone_stop_a_training_that_needs_them(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    grpo, _ = objective(inputs, tmp_path, tiny_align({"updates_per_sampling": 2}))
    with pytest.raises(ArtifactError, match=r"no groups \[0, 1, 2, 3\] of sampling 0, which the"):
        next(grpo.sampled_steps(1))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a user's module of reward functions."""
    path = tmp_path / "modules" / f"rewards_{tmp_path.name}.py"
    path.parent.mkdir()
    monkeypatch.syspath_prepend(path.parent)
    return path


def test_a_group_whose_reward_function_fails_is_left_out_and_counted(
    own: Path, tmp_path: Path, inputs: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    own.write_text(
        "def judge(prompt, answer, reference):\n"
        "    return float('nan') if '7' in prompt else float('1' in answer)\n"
    )
    config = tiny_align({"rewards": (f"{own.stem}:judge",)}, num_steps=3, global_batch_size=64)
    run_inside(align, write_job_file(tmp_path, "align", config, inputs))
    counts = [point["metrics"].get("groups/failed", 0) for point in points(tmp_path)]
    assert 0 < sum(counts) < 48
    errors = capfd.readouterr().err
    assert f"the reward function {own.stem}_judge gave nan, expected a finite number" in errors
    assert "prompt: 'what is " in errors


def test_a_function_that_always_fails_stops_training_and_the_checkpoint_stays(
    own: Path, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    own.write_text(
        "calls = []\ndef judge(prompt, answer, reference):\n    calls.append(1)\n"
        "    return float('1' in answer) if len(calls) < 90 else 1 / 0\n"
    )
    config = tiny_align({"rewards": (f"{own.stem}:judge",)})
    path = write_job_file(tmp_path, "align", config, inputs, checkpoint_every_steps=1)
    with pytest.raises(
        StageError, match=r"_judge raised ZeroDivisionError: division by zero\n  pr"
    ):
        run_inside(align, path)
    assert list((tmp_path / "work" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (tiny_align({"rewards": ("exact",)}), ConfigError, "align.grpo.rewards.0: found 'exact'"),
        (
            tiny_align(global_batch_size=18),
            ConfigError,
            "align.global_batch_size: found 18 answers, expected a multiple of .* = 4",
        ),
        (tiny_align(lora=LoraConfig(dropout=0.1)), ConfigError, "align.lora.dropout: found 0.1"),
        (
            tiny_align({"max_new_tokens": SEQ_LEN}),
            DataError,
            "found no prompt with a reference answer: 48 chats leave no room",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(
    config: AlignConfig,
    error: type[Exception],
    message: str,
    tmp_path: Path,
    inputs: dict[str, Path],
) -> None:
    with pytest.raises(error, match=message):
        run_inside(align, write_job_file(tmp_path, "align", config, inputs))


def test_text_has_no_prompts(
    tmp_path: Path, inputs: dict[str, Path], tokenizer: ByteLevelBPE, corpus: list[str]
) -> None:
    text = write_text_sequences(tmp_path / "text", tokenizer, corpus[:40])
    job = write_job_file(tmp_path, "align", tiny_align(), {**inputs, "sequences": text})
    with pytest.raises(DataError, match=r"align\.data: found text in .* expected chats"):
        run_inside(align, job)


def test_a_process_without_answers_to_train_on_still_takes_part(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    grpo, begin = objective(inputs, tmp_path, tiny_align({"rewards": ("regex:",)}))
    step = next(grpo.sampled_steps(0))
    assert step.num_targets == 0
    assert len(step.micro_batches) == 1
    found = loss_sum(grpo, begin.model, step)
    found["loss"].backward()
    assert found["loss"].item() == 0
    assert all(p.grad is not None for p in begin.model.parameters())
