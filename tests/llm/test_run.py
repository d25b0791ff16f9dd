"""A training stage after pretraining: averages, the best weights, early stopping, replay."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llm.artifact import ArtifactWriter
from llm.config import BestConfig, FinetuneConfig, LoraConfig
from llm.errors import ConfigError, DataError
from llm.finetune import finetune
from llm.model.weights import load_model, save_model
from llm.pretrain import pretrain
from llm.runtime import failpoints
from llm.runtime.job import PROGRESS
from llm.tokenizer.base import TOKENIZER_JSON
from llm.tokenizer.bpe import ByteLevelBPE
from llm.training import run
from llm.training.validation import Validation
from tests.llm.training_setup import (
    points,
    run_inside,
    start,
    tiny_finetune,
    tiny_model,
    tiny_pretrain,
    write_chat_sequences,
    write_job_file,
    write_text_sequences,
)

EMA: dict[str, Any] = {"averaging": "ema", "ema_decay": 0.7}
SNAPSHOTS: dict[str, Any] = {
    "averaging": "snapshots",
    "averaged_snapshots": 3,
    "snapshot_every_steps": 2,
}
LORA = LoraConfig(rank=2, dropout=0.1)
SHARES = {  # of the weights after steps 1 to 8, by definition
    "ema": np.array([0.7 ** (8 - step) for step in range(1, 9)]),
    "snapshots": np.array([0, 0, 0, 1, 0, 1, 0, 1]),
}


@pytest.fixture(scope="module")
def inputs(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: ByteLevelBPE, corpus: list[str]
) -> dict[str, Path]:
    """A base model, packed chats, and the text that it may have been trained on."""
    folder = tmp_path_factory.mktemp("inputs")
    writer = ArtifactWriter(folder / "base")
    save_model(writer, tiny_model(vocab_size=tokenizer.vocab_size), tokenizer.to_files())
    writer.finish(stage="pretrain", summary={})
    return {
        "base": folder / "base",
        "sequences": write_chat_sequences(folder / "chats", tokenizer, 50),
        "replay_sequences": write_text_sequences(folder / "text", tokenizer, corpus[:20]),
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def weights_file(folder: Path) -> bytes:
    return (folder / "out" / "model.safetensors").read_bytes()


def progress(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "work" / PROGRESS).read_text())


def best(**settings: Any) -> BestConfig:
    return BestConfig(**{"every_steps": 2, "num_sequences": 4, **settings})


def finetune_settings(**settings: Any) -> FinetuneConfig:
    return tiny_finetune(**{"num_steps": 8, "learning_rate": 1e-2, **settings})


@pytest.mark.parametrize("averaging", [EMA, SNAPSHOTS], ids=["ema", "snapshots"])
def test_the_model_holds_the_average_of_the_weights_of_every_step(
    averaging: dict[str, Any], tmp_path: Path, inputs: dict[str, Path]
) -> None:
    """The oracle averages the checkpoints of every step of the same training."""
    every = {"checkpoint_every_steps": 1, "keep_checkpoints": 9}
    plain = write_job_file(tmp_path / "p", "finetune", finetune_settings(), inputs, **every)
    of_last = run_inside(finetune, plain)
    saved = sorted((tmp_path / "p" / "work" / "checkpoints").iterdir())
    history = [weights(path) for path in saved]
    shares = SHARES[averaging["averaging"]] / SHARES[averaging["averaging"]].sum()
    job = write_job_file(tmp_path / "a", "finetune", finetune_settings(**averaging), inputs)
    summary = run_inside(finetune, job)
    found = weights(tmp_path / "a" / "out")
    for name, tensor in found.items():
        expected = sum(
            float(s) * past[name].double() for s, past in zip(shares, history, strict=True)
        )
        # fp32 rounds once per step
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-7)
    # the curves are those of the weights in training, the summary is of the finished ones
    assert points(tmp_path / "a") == points(tmp_path / "p")
    assert summary["train_loss"] == of_last["train_loss"]
    assert (
        summary["val_loss"]
        != of_last["val_loss"]
        == points(tmp_path / "a")[-1]["metrics"]["val/loss"]
    )
    assert (
        summary["weights"]
        == {"ema": "ema 0.7", "snapshots": "mean of 3 snapshots"}[averaging["averaging"]]
    )
    assert (of_last["weights"], of_last["content"]) == ("last step", "chats")


@pytest.mark.parametrize(
    "settings",
    [
        SNAPSHOTS,
        {"best": best()},
        {**EMA, "best": best(), "replay_fraction": 0.25},
        {**EMA, "lora": LORA},
    ],
    ids=["snapshots", "best", "best, ema, replay", "lora, ema"],
)
def test_a_resumed_training_gives_the_same_bits(
    settings: dict[str, Any], tmp_path: Path, inputs: dict[str, Path]
) -> None:
    """From the checkpoint of every step, as a kill at any step leaves it."""
    every = {"checkpoint_every_steps": 1, "keep_checkpoints": 9}
    job = write_job_file(tmp_path, "finetune", finetune_settings(**settings), inputs, **every)
    expected = run_inside(finetune, job), points(tmp_path)
    file = weights_file(tmp_path)
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "work", whole)
    for step in range(1, 9):
        shutil.rmtree(tmp_path / "work")
        shutil.copytree(whole, tmp_path / "work")
        for later in range(step + 1, 9):
            shutil.rmtree(tmp_path / "work" / "checkpoints" / f"step-{later:08}")
        assert (run_inside(finetune, job), points(tmp_path)) == expected
        assert weights_file(tmp_path) == file


def test_pretraining_averages_too(
    tmp_path: Path, inputs: dict[str, Path], tokenizer: ByteLevelBPE
) -> None:
    (tmp_path / "tokenizer").mkdir()
    file = tmp_path / "tokenizer" / "tokenizer.json"
    file.write_bytes(tokenizer.to_files()[TOKENIZER_JSON])
    of_text = {"sequences": inputs["replay_sequences"], "tokenizer": tmp_path / "tokenizer"}
    job = write_job_file(tmp_path, "pretrain", tiny_pretrain(**EMA), of_text)
    summary = run_inside(pretrain, job)
    assert (summary["weights"], summary["content"]) == ("ema 0.7", "text")
    last = weights(tmp_path / "work" / "checkpoints" / "step-00000008")
    found = weights(tmp_path / "out")
    assert not any(torch.equal(tensor, last[name]) for name, tensor in found.items())


RISING = {"learning_rate": 1.0, "warmup_steps": 11, "num_steps": 12}
"""A rate that rises to the end: the loss falls, then rises."""


def test_sigkill_after_the_best_was_found_gives_the_best_all_the_same(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = finetune_settings(**{**RISING, "num_steps": 20}, best=best(patience=2))
    expected = run_inside(finetune, write_job_file(tmp_path / "u", "finetune", settings, inputs))
    best_step = int(str(expected["best_step"]))
    end = best_step + 2 * 2
    assert 2 < best_step < end < 20
    assert expected["ended"] == f"stopped early at step {end} of 20"
    assert (expected["num_steps"], expected["weights"]) == (end, f"best, step {best_step}")
    unit = "steps, stopped early of 20"
    assert progress(tmp_path / "u") == {"done": end, "total": end, "unit": unit}
    every = {"checkpoint_every_steps": best_step + 1}
    job = write_job_file(tmp_path / "k", "finetune", settings, inputs, **every)
    # One micro-batch a step. Before the first checkpoint, so that the best is found again; then,
    # from a checkpoint that holds it, while the checkpoint of the end is saved.
    for plan in (f"training.loss:{best_step + 1}", "checkpoint.rename:2"):
        monkeypatch.setenv(failpoints.VARIABLE, f"{plan}=kill")
        process = start(job, "finetune")
        process.communicate(timeout=60)
        assert process.returncode < 0
    monkeypatch.delenv(failpoints.VARIABLE)
    assert run_inside(finetune, job) == expected
    assert weights_file(tmp_path / "k") == weights_file(tmp_path / "u")
    assert points(tmp_path / "k") == points(tmp_path / "u")


@pytest.mark.parametrize("averaging", [{}, EMA], ids=["none", "ema"])
def test_the_best_are_those_of_the_lowest_measured_loss(
    averaging: dict[str, Any], tmp_path: Path, inputs: dict[str, Path]
) -> None:
    """Every step's loss is measured anew, with the weights of the step or their average."""
    settings = finetune_settings(**RISING, best=best(every_steps=1), **averaging)
    every = {"checkpoint_every_steps": 1, "keep_checkpoints": 13}
    job = write_job_file(tmp_path, "finetune", settings, inputs, **every)
    summary = run_inside(finetune, job)
    losses = {
        point["step"]: point["metrics"]["val/selection_loss"]
        for point in points(tmp_path)
        if "val/selection_loss" in point["metrics"]
    }
    assert list(losses) == list(range(1, 13))
    step = min(losses, key=lambda step: losses[step])
    assert 1 < step < 12, "else this tests little"
    assert (summary["best_step"], summary["best_loss"]) == (step, losses[step])
    assert summary["ended"] == "after all 12 steps"
    folder = tmp_path / "work" / "checkpoints" / f"step-{step:08}"
    found = weights(tmp_path / "out")
    if averaging:
        kept = load_file(folder / "kept.safetensors")
        assert all(
            torch.equal(found[name], kept[f"average/{name}"][: len(found[name])]) for name in found
        )
    else:
        assert all(torch.equal(tensor, weights(folder)[name]) for name, tensor in found.items())


def test_equal_losses_keep_the_earlier(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*given: Any, **more: Any) -> Validation:
        return Validation(loss=1.0, metrics={})

    monkeypatch.setattr(run, "validate", measure)
    settings = finetune_settings(best=best(patience=2))
    job = write_job_file(tmp_path, "finetune", settings, inputs)
    summary = run_inside(finetune, job)
    assert (summary["best_step"], summary["num_steps"]) == (2, 6)


def test_replay_keeps_what_finetuning_alone_forgets(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    def loss_on_text(folder: Path) -> float:
        job = write_job_file(
            folder / "eval",
            "finetune",
            tiny_finetune(num_steps=1, warmup_steps=0, learning_rate=1e-9),
            {"base": folder / "out", "sequences": inputs["replay_sequences"]},
        )
        return float(str(run_inside(finetune, job)["val_loss"]))

    losses = {}
    for fraction in (0.0, 0.5):
        folder = tmp_path / str(fraction)
        settings = finetune_settings(num_steps=30, replay_fraction=fraction)
        summary = run_inside(finetune, write_job_file(folder, "finetune", settings, inputs))
        losses[fraction] = loss_on_text(folder)
        assert summary["epochs"] == 30 * (4 if not fraction else 2) / 40  # 40 chats for training
        assert ("replay_epochs" in summary) == bool(fraction)
    assert losses[0.5] < losses[0.0] - 0.3


def test_replayed_text_of_another_context_is_refused(
    tmp_path: Path, inputs: dict[str, Path], tokenizer: ByteLevelBPE, corpus: list[str]
) -> None:
    longer = write_text_sequences(tmp_path / "longer", tokenizer, corpus[:20], seq_len=48)
    settings = tiny_finetune(replay_fraction=0.5)
    job = write_job_file(tmp_path, "finetune", settings, {**inputs, "replay_sequences": longer})
    with pytest.raises(DataError, match=r"longer: (.|\n)*seq_len: found 48, expected"):
        run_inside(finetune, job)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replay_fraction": 0.1}, r"replay_fraction: found 0.1, which is 0 of .* = 4 sequences"),
        ({"replay_fraction": 0.9}, r"replay_fraction: found 0.9, which is 4 of"),
        ({"best": BestConfig(patience=3)}, r"best.patience: found 3, expected 0 where"),
        ({**SNAPSHOTS, "best": best()}, r"averaging: found snapshots, expected none or ema"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    settings: dict[str, Any], message: str, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    job = write_job_file(tmp_path, "finetune", tiny_finetune(**settings), inputs)
    with pytest.raises(ConfigError, match=rf"finetune\.{message}"):
        run_inside(finetune, job)


def test_an_adapter_is_averaged_alone(tmp_path: Path, inputs: dict[str, Path]) -> None:
    settings = finetune_settings(lora=LORA, **EMA)
    job = write_job_file(tmp_path, "finetune", settings, inputs, checkpoint_every_steps=8)
    assert run_inside(finetune, job)["weights"] == "ema 0.7"
    kept = load_file(tmp_path / "work" / "checkpoints" / "step-00000008" / "kept.safetensors")
    assert kept and all(".adapter." in name for name in kept)
    base, found = weights(inputs["base"]), weights(tmp_path / "out")
    name = "blocks.0.attention.query"
    a, b = (kept[f"average/{name}.adapter.{part}"] for part in "ab")
    # of the factors, not of their product
    torch.testing.assert_close(found[f"{name}.weight"], base[f"{name}.weight"] + 8.0 * b @ a)


@pytest.mark.parametrize("settings", [EMA, {"lora": LORA}], ids=["full", "lora"])
def test_a_finetuned_model_is_finetuned_further(
    settings: dict[str, Any], tmp_path: Path, inputs: dict[str, Path]
) -> None:
    """Training on text and then on chats, as in mid-training: each from the weights before."""
    of_text = {"base": inputs["base"], "sequences": inputs["replay_sequences"]}
    first = write_job_file(tmp_path / "1", "finetune", finetune_settings(**settings), of_text)
    assert run_inside(finetune, first)["content"] == "text"
    after_first = {**inputs, "base": tmp_path / "1" / "out"}
    second = write_job_file(tmp_path / "2", "finetune", finetune_settings(), after_first)
    summary = run_inside(finetune, second)
    curve = [p["metrics"]["val/loss"] for p in points(tmp_path / "2") if "val/loss" in p["metrics"]]
    assert curve[-1] < curve[0] and summary["content"] == "chats"
    alone = write_job_file(tmp_path / "3", "finetune", finetune_settings(num_steps=2), inputs)
    run_inside(finetune, alone)
    assert curve[0] != points(tmp_path / "3")[0]["metrics"]["val/loss"], "another start"
    load_model(tmp_path / "2" / "out")


@pytest.mark.distributed
def test_two_processes_choose_and_stop_as_one(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """An odd number of sequences, of which one is replayed: unequal shares, of unequal kinds."""
    more = {**EMA, "best": best(patience=1), "replay_fraction": 0.2, "global_batch_size": 5}
    settings = finetune_settings(**{**RISING, "num_steps": 20}, **more)
    one = run_inside(finetune, write_job_file(tmp_path / "1", "finetune", settings, inputs))
    assert str(one["ended"]).startswith("stopped early")
    job = write_job_file(tmp_path / "2", "finetune", settings, inputs, num_processes=2)
    _, errors = start(job, "finetune").communicate(timeout=120)
    two = json.loads((tmp_path / "2" / "out" / "manifest.json").read_text())["summary"]
    for name in ("num_steps", "best_step", "ended", "epochs", "replay_epochs", "weights"):
        assert two[name] == one[name], errors
    for name in ("val_loss", "best_loss"):
        # sums in another order, grown tenfold in each step by a rate this high
        assert two[name] == pytest.approx(one[name], rel=1e-3)
