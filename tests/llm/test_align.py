"""The stage `align` with DPO: what it learns, resumes, shares among processes and refuses."""

import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm.align import align
from llm.artifact import ArtifactWriter
from llm.config import AlignConfig, LoraConfig
from llm.errors import ConfigError, DataError
from llm.model.weights import save_model
from llm.runtime import failpoints
from llm.runtime.job import EXIT_INTERRUPTED
from llm.tokenizer.bpe import ByteLevelBPE
from tests.llm.training_setup import (
    PAIRS_SEQ_LEN,
    points,
    run_inside,
    start,
    tiny_model,
    write_chat_sequences,
    write_job_file,
    write_preference_sequences,
)

NOUNS = ("parser", "option", "argument", "string", "value", "action", "group", "name", "type")


def tiny_align(**settings: Any) -> AlignConfig:
    """A DPO training of six steps, changed by `settings`."""
    few = {"num_steps": 6, "global_batch_size": 4, "warmup_steps": 1, "precision": "fp32"}
    return AlignConfig(**{**few, **settings})


def make_pairs(num_pairs: int, seed: int) -> list[tuple[str, str, str]]:
    """Three words, of which the better answer names the last, in another tense."""
    generator = np.random.default_rng(seed)
    words = [generator.choice(NOUNS, 3, replace=False).tolist() for _ in range(num_pairs)]
    return [(" ".join(three), f"is {three[2]}", f"was {three[0]}") for three in words]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tokenizer: ByteLevelBPE) -> dict[str, Path]:
    """A starting model and packed pairs, those of validation not in training."""
    folder = tmp_path_factory.mktemp("inputs")
    train = make_pairs(300, 1)
    held_out = [pair for pair in make_pairs(60, 2) if pair not in train]
    splits = {"train": train, "validation": held_out}
    return {
        "base": write_model(folder / "base", tokenizer),
        "sequences": write_preference_sequences(folder / "sequences", tokenizer, splits),
    }


def write_model(folder: Path, tokenizer: ByteLevelBPE, **shape: Any) -> Path:
    """A model with random weights, of a context for pairs."""
    writer = ArtifactWriter(folder)
    shape = {"vocab_size": tokenizer.vocab_size, "seq_len": PAIRS_SEQ_LEN, **shape}
    save_model(writer, tiny_model(**shape), tokenizer.to_files())
    writer.finish(stage="finetune", summary={})
    return folder


def run(folder: Path, inputs: dict[str, Path], **runtime: Any) -> tuple[int, str]:
    """Run the stage as a process; return its exit code and what it wrote to stderr."""
    process = start(write_job_file(folder, "align", tiny_align(), inputs, **runtime), "align")
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "manifest.json").read_text())


def curve(folder: Path, name: str) -> list[float]:
    """A metric at each of its points."""
    return [each["metrics"][name] for each in points(folder) if name in each["metrics"]]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])  # where a CPU lacks bf16, fp32 twice
@pytest.mark.parametrize(
    ("lora", "least_margin", "least_accuracy"),
    # an adapter of random weights, whose embeddings are frozen, learns less
    [(LoraConfig(), 1.0, 0.9), (LoraConfig(rank=8), 0.2, 0.9)],
    ids=["full", "lora"],
)
def test_margin_and_accuracy_rise_on_held_out_pairs_from_a_loss_of_ln_2(
    precision: str,
    lora: LoraConfig,
    least_margin: float,
    least_accuracy: float,
    tmp_path: Path,
    inputs: dict[str, Path],
) -> None:
    settings = tiny_align(learning_rate=1e-2, num_steps=60, precision=precision, lora=lora)
    job = write_job_file(tmp_path, "align", settings, inputs, validate_every_steps=20)
    summary = run_inside(align, job)
    for name in ("val/loss", "train/loss"):
        assert curve(tmp_path, name)[0] == pytest.approx(math.log(2), abs=1e-4)
    margins = curve(tmp_path, "val/reward_margin")
    assert margins[0] == pytest.approx(0, abs=2e-4) and margins[-1] > least_margin
    assert curve(tmp_path, "val/preference_accuracy")[-1] > least_accuracy
    chosen, rejected = curve(tmp_path, "val/chosen_reward"), curve(tmp_path, "val/rejected_reward")
    assert np.subtract(chosen, rejected) == pytest.approx(margins, abs=1e-5)
    assert curve(tmp_path, "train/reward_margin")[-1] > curve(tmp_path, "train/reward_margin")[0]
    assert summary["val_reward_margin"] == margins[-1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, Path]) -> Path:
    """A whole training."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code, errors = run(folder, inputs)
    assert code == 0, errors
    return folder


def test_kills_before_and_after_the_references_are_written_give_the_bits_of_an_undisturbed_run(
    tmp_path: Path,
    inputs: dict[str, Path],
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for plan, num_files in (
        ("references-validation.bin.rename=kill", 1),
        ("checkpoint.renamed=kill", 2),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(failpoints.VARIABLE, plan)
            code, errors = run(tmp_path, inputs)
        assert code == -signal.SIGKILL, errors
        assert len(list((tmp_path / "work").glob("references-*.bin"))) == num_files
    written_at = (tmp_path / "work" / "references-train.bin").stat().st_mtime_ns
    code, errors = run(tmp_path, inputs)
    assert code == 0, errors
    assert (tmp_path / "work" / "references-train.bin").stat().st_mtime_ns == written_at
    assert manifest(tmp_path)["digest"] == manifest(undisturbed)["digest"]
    assert points(tmp_path) == points(undisturbed)


@pytest.mark.distributed
def test_two_processes_compute_the_references_and_train_as_one(
    tmp_path: Path, inputs: dict[str, Path], undisturbed: Path
) -> None:
    code, errors = run(tmp_path, inputs, num_processes=2)
    assert code == 0, errors
    found, expected = (
        np.frombuffer((folder / "work" / "references-train.bin").read_bytes()[32:], dtype="<f4")
        for folder in (tmp_path, undisturbed)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for mine, theirs in zip(points(tmp_path), points(undisturbed), strict=True):
        # margins near 0 are differences of log-probabilities near -50
        assert mine["metrics"] == pytest.approx(theirs["metrics"], rel=1e-3, abs=1e-5)


@pytest.mark.distributed
def test_a_stop_while_references_are_computed_stops_both_processes(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    runtime = {"num_processes": 2, "micro_batch_size": 1}
    job = write_job_file(tmp_path, "align", tiny_align(num_steps=2000), inputs, **runtime)
    process = start(job, "align")
    progress = tmp_path / "work" / "progress.json"
    while process.poll() is None and not progress.exists():
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED, errors
    assert not list((tmp_path / "work").glob("references-*"))


def chats(inputs: dict[str, Path], folder: Path, tokenizer: ByteLevelBPE) -> dict[str, Path]:
    """Chats instead of pairs."""
    sequences = write_chat_sequences(folder / "chats", tokenizer, 20, seq_len=PAIRS_SEQ_LEN)
    return {**inputs, "sequences": sequences}


def no_held_out_pairs(
    inputs: dict[str, Path], folder: Path, tokenizer: ByteLevelBPE
) -> dict[str, Path]:
    """Pairs for training only."""
    splits = {"train": make_pairs(5, 1), "validation": []}
    return {**inputs, "sequences": write_preference_sequences(folder / "few", tokenizer, splits)}


def masked_model(inputs: dict[str, Path], folder: Path, tokenizer: ByteLevelBPE) -> dict[str, Path]:
    """A masked language model to start from."""
    return {**inputs, "base": write_model(folder / "masked", tokenizer, is_causal=False)}


@pytest.mark.parametrize(
    ("change", "settings", "error", "message"),
    [
        (chats, {}, DataError, "align.data: found chats in .*, expected preferences"),
        (no_held_out_pairs, {}, DataError, "validation: found 0 sequences with 0 target tokens"),
        (masked_model, {}, ConfigError, "model.is_causal: found false, expected true for align"),
        (
            lambda inputs, *_: inputs,
            {"lora": LoraConfig(rank=2, dropout=0.1)},
            ConfigError,
            "align.lora.dropout: found 0.1, expected 0",
        ),
    ],
    ids=["chats", "empty split", "masked", "dropout"],
)
def test_what_dpo_cannot_train_on_is_refused_before_any_work(
    change: Callable[..., dict[str, Path]],
    settings: dict[str, Any],
    error: type[Exception],
    message: str,
    tmp_path: Path,
    inputs: dict[str, Path],
    tokenizer: ByteLevelBPE,
) -> None:
    changed = change(inputs, tmp_path, tokenizer)
    job = write_job_file(tmp_path, "align", tiny_align(**settings), changed)
    with pytest.raises(error, match=message):
        run_inside(align, job)
    assert not list((tmp_path / "work").glob("references-*"))
