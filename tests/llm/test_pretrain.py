"""Pretraining as a process: the same bits after any kill, agreed stops, several ranks."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llm.errors import DataError, StageError
from llm.model.transformer import Block
from llm.model.weights import load_model
from llm.pretrain import pretrain
from llm.runtime import failpoints
from llm.runtime.job import EXIT_INTERRUPTED
from llm.tokenizer.base import TOKENIZER_JSON
from llm.tokenizer.bpe import ByteLevelBPE
from llm.training.validation import Validation
from tests.llm.training_setup import (
    SEQ_LEN,
    TINY,
    points,
    run_inside,
    start,
    tiny_pretrain,
    write_job_file,
    write_text_sequences,
)

SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "muon": {"optimizer": "muon", "model": replace(TINY, dropout=0.2)},
}


@pytest.fixture(scope="module")
def inputs(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: ByteLevelBPE, corpus: list[str]
) -> dict[str, Path]:
    """Packed sequences and their tokenizer."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_bytes(tokenizer.to_files()[TOKENIZER_JSON])
    sequences = write_text_sequences(folder / "sequences", tokenizer, corpus[:30])
    return {"sequences": sequences, "tokenizer": folder / "tokenizer"}


def run(
    folder: Path, inputs: dict[str, Path], settings: dict[str, Any] | None = None, **runtime: Any
) -> tuple[int, str]:
    """Run pretraining to its end; return its exit code and what it wrote to stderr."""
    job = write_job_file(folder, "pretrain", tiny_pretrain(**(settings or {})), inputs, **runtime)
    process = start(job, "pretrain")
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def digest(folder: Path) -> str:
    return json.loads((folder / "out" / "manifest.json").read_text())["digest"]


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "manifest.json").read_text())["summary"]


def steps_saved(folder: Path) -> list[int]:
    found = (folder / "work" / "checkpoints").glob("step-*")
    return sorted(int(path.name.removeprefix("step-")) for path in found)


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, Path]
) -> dict[str, Path]:
    """A whole training with each optimizer, Muon's with dropout."""
    folders = {}
    for optimizer, settings in SETTINGS.items():
        folders[optimizer] = tmp_path_factory.mktemp(optimizer)
        code, errors = run(folders[optimizer], inputs, settings)
        assert code == 0, errors
    return folders


def test_it_leaves_a_model_that_learned_something_and_its_curves(
    undisturbed: dict[str, Path], tokenizer: ByteLevelBPE
) -> None:
    folder = undisturbed["adamw"]
    names = {path.name for path in (folder / "out").iterdir()}
    assert names == {
        "manifest.json",
        "metrics.jsonl",
        "model.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert (folder / "out" / "tokenizer.json").read_bytes() == tokenizer.to_files()[TOKENIZER_JSON]
    model = load_model(folder / "out")
    assert (model.vocab_size, model.seq_len) == (tokenizer.vocab_size, SEQ_LEN)
    found = points(folder)
    validations = [point for point in found if "val/loss" in point["metrics"]]
    assert [point["step"] for point in validations] == [0, 4, 8]
    losses = [point["metrics"]["val/loss"] for point in validations]
    assert losses == sorted(losses, reverse=True)
    trained = [point for point in found if "train/loss" in point["metrics"]]
    assert [point["step"] for point in trained] == list(range(1, 9))
    assert all(point["tokens"] == point["step"] * 8 * SEQ_LEN for point in found)
    assert trained[0]["metrics"].keys() == {"train/loss", "learning_rate", "gradient_norm"}
    figures = summary(folder)
    assert figures["val_bits_per_byte"] == validations[-1]["metrics"]["val/bits_per_byte"]
    assert figures["train_loss"] == trained[-1]["metrics"]["train/loss"]
    assert figures["num_parameters"] == model.num_parameters()
    assert figures["throughput_flops_per_token"] > 6 * 0.9 * model.num_parameters()
    assert figures["throughput_peak_teraflops"] == "unknown"
    assert steps_saved(folder) == [6, 8]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_sigkill_at_any_moment_gives_the_bits_of_an_undisturbed_run(
    optimizer: str, tmp_path: Path, inputs: dict[str, Path], undisturbed: dict[str, Path]
) -> None:
    generator = random.Random(optimizer)
    job = write_job_file(tmp_path, "pretrain", tiny_pretrain(**SETTINGS[optimizer]), inputs)
    metrics = tmp_path / "work" / "metrics.jsonl"
    for kill_at_line in (3, 7):  # then some milliseconds more, anywhere in a step or a save
        process = start(job, "pretrain")
        while process.poll() is None and num_lines(metrics) < kill_at_line:
            time.sleep(0.002)
        time.sleep(generator.uniform(0.0, 0.06))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0)
    process = start(job, "pretrain")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert digest(tmp_path) == digest(undisturbed[optimizer])
    assert points(tmp_path) == points(undisturbed[optimizer])
    assert summary(tmp_path) == summary(undisturbed[optimizer])


@pytest.mark.slow
def test_kills_inside_saves_give_the_bits_of_an_undisturbed_run(
    tmp_path: Path,
    inputs: dict[str, Path],
    undisturbed: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Saves are after steps 3, 6 and 8; two are kept, so that the third removes the first."""
    for plan, left in (
        ("checkpoint.renamed=kill", [3]),  # published, but not yet for sure on the disk
        ("file.write:2=kill", [3]),
        ("manifest.json.rename=kill", [3]),
        ("checkpoint.removing=kill", [6, 8]),
    ):
        monkeypatch.setenv(failpoints.VARIABLE, plan)
        code, errors = run(tmp_path, inputs)
        assert code == -signal.SIGKILL, errors
        assert steps_saved(tmp_path) == left
    monkeypatch.delenv(failpoints.VARIABLE)
    code, errors = run(tmp_path, inputs)
    assert code == 0, errors
    assert digest(tmp_path) == digest(undisturbed["adamw"])
    assert points(tmp_path) == points(undisturbed["adamw"])
    assert "set aside" not in errors, "every checkpoint was whole"


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
def test_a_polite_stop_saves_the_step_it_is_in_and_says_so(
    number: signal.Signals,
    tmp_path: Path,
    inputs: dict[str, Path],
    undisturbed: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = tiny_pretrain()
    job = write_job_file(tmp_path, "pretrain", settings, inputs, checkpoint_every_steps=100)
    monkeypatch.setenv(failpoints.VARIABLE, "training.loss:4=stop")  # it waits for the signals
    process = start(job, "pretrain")
    while not is_stopped(process.pid):
        time.sleep(0.01)
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    process.send_signal(number)  # a second one does no harm
    _, errors = process.communicate(timeout=60)
    monkeypatch.delenv(failpoints.VARIABLE)
    assert process.returncode == EXIT_INTERRUPTED, errors
    assert "can go on from here" in errors
    lines = points(tmp_path)
    assert steps_saved(tmp_path) == [lines[-1]["step"]]
    assert run(tmp_path, inputs, checkpoint_every_steps=100)[0] == 0
    assert digest(tmp_path) == digest(undisturbed["adamw"])
    assert points(tmp_path) == points(undisturbed["adamw"])


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_every_optimizer_and_schedule_resumes_to_the_same_bits(
    schedule: str, optimizer: str, is_causal: bool, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    model = replace(TINY, dropout=0.2, is_causal=is_causal)
    settings = tiny_pretrain(schedule=schedule, optimizer=optimizer, model=model)
    job = write_job_file(tmp_path, "pretrain", settings, inputs, micro_batch_size=3)
    expected = run_inside(pretrain, job), points(tmp_path)
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "work" / "checkpoints" / "step-00000008")
    assert steps_saved(tmp_path) == [6]
    torch.manual_seed(1234)
    assert (run_inside(pretrain, job), points(tmp_path)) == expected
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights


def test_activations_computed_twice_give_the_bits_of_those_kept(
    tmp_path: Path, inputs: dict[str, Path], undisturbed: dict[str, Path]
) -> None:
    settings = tiny_pretrain(**SETTINGS["muon"])
    job = write_job_file(tmp_path, "pretrain", settings, inputs, activation_checkpointing=True)
    calls: list[int] = []
    forward = Block.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Block, "forward", lambda *given: calls.append(1) or forward(*given))
        run_inside(pretrain, job)
    num_validations = 3
    num_layers, num_steps = TINY.num_layers, settings.num_steps
    assert len(calls) == num_layers * (2 * num_steps + num_validations)
    weights = (undisturbed["muon"] / "out" / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    assert points(tmp_path) == points(undisturbed["muon"])


def test_a_damaged_newest_checkpoint_costs_steps_and_no_bits(
    tmp_path: Path, inputs: dict[str, Path], undisturbed: dict[str, Path]
) -> None:
    shutil.copytree(undisturbed["adamw"] / "work", tmp_path / "work")
    path = tmp_path / "work" / "checkpoints" / "step-00000008" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    code, errors = run(tmp_path, inputs)
    assert code == 0
    assert "set aside as damaged-step-00000008" in errors
    assert digest(tmp_path) == digest(undisturbed["adamw"])
    assert points(tmp_path) == points(undisturbed["adamw"])


def test_sequences_in_a_linked_folder_train_as_those_here(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    config = tiny_pretrain(num_steps=3)
    expected = run_inside(pretrain, write_job_file(tmp_path / "here", "pretrain", config, inputs))
    shutil.copytree(inputs["sequences"], tmp_path / "disk")
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    linked = {**inputs, "sequences": tmp_path / "link"}
    job = write_job_file(tmp_path / "there", "pretrain", config, linked)
    assert run_inside(pretrain, job) == expected
    assert points(tmp_path / "there") == points(tmp_path / "here")


def test_micro_batches_change_the_loss_by_rounding_alone(
    tmp_path: Path, inputs: dict[str, Path], undisturbed: dict[str, Path]
) -> None:
    job = write_job_file(tmp_path, "pretrain", tiny_pretrain(), inputs, micro_batch_size=3)
    expected = summary(undisturbed["adamw"])
    found = run_inside(pretrain, job)
    assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)


def test_bf16_trains_to_about_the_same_loss_and_keeps_weights_in_fp32(
    tmp_path: Path, inputs: dict[str, Path], undisturbed: dict[str, Path]
) -> None:
    job = write_job_file(tmp_path, "pretrain", tiny_pretrain(precision="bf16"), inputs)
    found = run_inside(pretrain, job)
    expected = summary(undisturbed["adamw"])
    assert found["val_loss"] != expected["val_loss"]
    assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-2)
    tensors = load_file(tmp_path / "out" / "model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


def test_a_diverging_training_says_what_to_try(tmp_path: Path, inputs: dict[str, Path]) -> None:
    settings = tiny_pretrain(learning_rate=1e30, warmup_steps=0)
    job = write_job_file(tmp_path, "pretrain", settings, inputs, validate_every_steps=100)
    with pytest.raises(StageError, match=r"step 2 of 8 gave .* a gradient norm of nan") as caught:
        run_inside(pretrain, job)
    assert "try a lower pretrain.learning_rate (now 1e+30)" in str(caught.value)


def test_utilization_is_of_the_peak_of_all_devices_and_memory_and_updates_are_shown(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm.training.run.peak_flops", lambda device, precision: 1e12)
    job = write_job_file(tmp_path, "pretrain", tiny_pretrain(num_steps=10), inputs)
    found = run_inside(pretrain, job)
    assert found["throughput_peak_teraflops"] == 1.0
    lines = (tmp_path / "work" / "metrics.jsonl").read_text().splitlines()
    measured = [json.loads(line)["metrics"] for line in lines if "train/loss" in line]
    per_token = float(found["throughput_flops_per_token"])
    for point in measured:
        share = point["throughput/tokens_per_second"] * per_token / 1e12
        assert point["throughput/mfu"] == pytest.approx(share, abs=5e-5)  # four digits are shown
    assert [name in measured[-1] for name in ("update_norm", "memory/peak_gb")] == [True, True]
    assert 0 < measured[-1]["update_norm_relative"] < 1
    assert measured[-1]["memory/peak_gb"] > 0.05  # torch alone is more


def test_a_validation_that_is_not_finite_stops_before_it_is_written(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = Validation(loss=float("nan"), metrics={})
    monkeypatch.setattr("llm.training.run.validate", lambda *given, **more: nothing)
    with pytest.raises(StageError, match="step 0 of 8 gave a validation loss of nan"):
        run_inside(pretrain, write_job_file(tmp_path, "pretrain", tiny_pretrain(), inputs))
    assert points(tmp_path) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_said_by_setting(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    assert run(tmp_path, inputs, device="cuda")[0] == 1
    error = json.loads((tmp_path / "work" / "error.json").read_text())
    assert (error["type"], error["traceback"]) == ("ConfigError", "")
    assert error["message"].startswith("runtime.device: found cuda, but torch sees no GPU")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_training_on_a_gpu_resumes_to_the_same_bits_where_that_is_asked_for(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    settings = {"model": replace(TINY, num_heads=2, num_kv_heads=1)}
    runtime = {"device": "cuda", "num_processes": 1, "deterministic": "always"}
    assert run(tmp_path, inputs, settings, **runtime)[0] == 0
    expected = digest(tmp_path)
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(tmp_path / "work" / "checkpoints" / "step-00000008")
    assert run(tmp_path, inputs, settings, **runtime)[0] == 0
    assert digest(tmp_path) == expected


def test_rows_of_another_tokenizer_are_refused_before_training(
    tmp_path: Path, inputs: dict[str, Path], corpus: list[str]
) -> None:
    other = ByteLevelBPE.train(corpus, 500)
    sequences = write_text_sequences(tmp_path / "sequences", other, corpus[:10])
    job = write_job_file(tmp_path, "pretrain", tiny_pretrain(), {**inputs, "sequences": sequences})
    expected = r"vocab_size: found 600 in the tokenizer, expected the model's 500"
    with pytest.raises(DataError, match=expected):
        run_inside(pretrain, job)
    assert not (tmp_path / "work" / "metrics.jsonl").exists()


@pytest.mark.distributed
def test_two_processes_train_as_one(
    tmp_path: Path, inputs: dict[str, Path], undisturbed: dict[str, Path]
) -> None:
    code, errors = run(tmp_path, inputs, num_processes=2)
    assert code == 0, errors
    expected, found = summary(undisturbed["adamw"]), summary(tmp_path)
    assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
    assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)
    for mine, theirs in zip(points(tmp_path), points(undisturbed["adamw"]), strict=True):
        assert (mine["step"], mine["tokens"]) == (theirs["step"], theirs["tokens"])
        assert mine["metrics"] == pytest.approx(theirs["metrics"], rel=1e-4)
    assert not list((tmp_path / "work").glob("rendezvous-*"))


@pytest.mark.distributed
def test_another_number_of_processes_goes_on_from_the_same_checkpoint(
    tmp_path: Path, inputs: dict[str, Path], undisturbed: dict[str, Path]
) -> None:
    shutil.copytree(undisturbed["adamw"] / "work", tmp_path / "work")
    shutil.rmtree(tmp_path / "work" / "checkpoints" / "step-00000008")
    code, errors = run(tmp_path, inputs, num_processes=2)
    assert code == 0, errors
    expected = summary(undisturbed["adamw"])
    assert summary(tmp_path)["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-6)


@pytest.mark.distributed
def test_a_stop_of_the_launcher_makes_both_ranks_save_and_end(
    tmp_path: Path,
    inputs: dict[str, Path],
    undisturbed: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = write_job_file(tmp_path, "pretrain", tiny_pretrain(), inputs, num_processes=2)
    monkeypatch.setenv(failpoints.VARIABLE, "training.loss:4@1=stop")  # it waits for the signal
    process = start(job, "pretrain")
    while len(ranks := rank_pids(process)) < 2 or not is_stopped(ranks[1]):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    os.kill(ranks[1], signal.SIGCONT)
    _, errors = process.communicate(timeout=60)
    monkeypatch.delenv(failpoints.VARIABLE)
    assert process.returncode == EXIT_INTERRUPTED, errors
    assert steps_saved(tmp_path)
    assert group_is_gone(process)
    assert run(tmp_path, inputs, num_processes=2)[0] == 0
    expected = summary(undisturbed["adamw"])
    assert summary(tmp_path)["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)


@pytest.mark.distributed
def test_a_loss_that_is_not_finite_on_one_rank_stops_both_and_the_next_run_goes_on(
    tmp_path: Path,
    inputs: dict[str, Path],
    undisturbed: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(failpoints.VARIABLE, "training.loss:5@1=nan")
    assert run(tmp_path, inputs, num_processes=2)[0] == 1
    for name in ("error.json", "rank-1-error.json"):
        error = json.loads((tmp_path / "work" / name).read_text())
        assert error["type"] == "StageError"
        assert "pretrain: step 5 of 8 gave a loss of nan" in error["message"]
    assert steps_saved(tmp_path) == [3], "what is not finite is never saved"
    monkeypatch.delenv(failpoints.VARIABLE)
    assert run(tmp_path, inputs, num_processes=2)[0] == 0
    expected = summary(undisturbed["adamw"])
    assert summary(tmp_path)["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-6)


@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_group_and_the_launcher_dies_as_it_did(
    rank: int, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    job = write_job_file(
        tmp_path, "pretrain", tiny_pretrain(num_steps=2000), inputs, num_processes=2
    )
    process = start(job, "pretrain")
    while num_lines(tmp_path / "work" / "metrics.jsonl") < 3:
        time.sleep(0.001)
    os.kill(rank_pids(process)[rank], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert f"pretrain: rank {rank} of 2 was killed by SIGKILL" in errors
    assert not list((tmp_path / "work").glob("*error.json"))
    assert group_is_gone(process)


@pytest.mark.distributed
def test_ranks_end_when_their_launcher_is_killed(tmp_path: Path, inputs: dict[str, Path]) -> None:
    job = write_job_file(
        tmp_path, "pretrain", tiny_pretrain(num_steps=2000), inputs, num_processes=2
    )
    process = start(job, "pretrain")
    while num_lines(tmp_path / "work" / "metrics.jsonl") < 3:
        time.sleep(0.001)
    process.kill()
    process.communicate()
    until = time.monotonic() + 10
    while not group_is_gone(process) and time.monotonic() < until:
        time.sleep(0.05)
    assert group_is_gone(process)


@pytest.mark.distributed
@pytest.mark.parametrize("num_processes", [2, 3, 4])
def test_sequences_that_divide_neither_among_processes_nor_into_passes_train_as_on_one(
    num_processes: int, tmp_path: Path, inputs: dict[str, Path], of_seven_sequences: Path
) -> None:
    runtime = {"num_processes": num_processes, "micro_batch_size": 2}
    code, errors = run(tmp_path, inputs, {"global_batch_size": 7}, **runtime)
    assert code == 0, errors
    expected, found = summary(of_seven_sequences), summary(tmp_path)
    assert found["throughput_processes"] == num_processes
    assert found["num_tokens"] == expected["num_tokens"] == 8 * 7 * SEQ_LEN
    for name in ("train_loss", "val_loss", "val_bits_per_byte"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6)
    for mine, theirs in zip(points(tmp_path), points(of_seven_sequences), strict=True):
        assert (mine["step"], mine["tokens"]) == (theirs["step"], theirs["tokens"])
        assert mine["metrics"] == pytest.approx(theirs["metrics"], rel=1e-5)
        for name in mine["metrics"].keys() & {"train/loss", "val/loss"}:
            assert mine["metrics"][name] == pytest.approx(theirs["metrics"][name], rel=1e-6)
    assert f"pretrain.global_batch_size: 7 sequences among {num_processes} processes" in errors


@pytest.mark.distributed
def test_a_process_without_a_row_of_its_own_trains_with_the_others(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    settings = {"global_batch_size": 2, "num_steps": 4}
    assert run(tmp_path / "one", inputs, settings)[0] == 0
    code, errors = run(tmp_path / "three", inputs, settings, num_processes=3)
    assert code == 0, errors
    expected, found = summary(tmp_path / "one"), summary(tmp_path / "three")
    assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-6)
    assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-6)


@pytest.fixture(scope="module")
def of_seven_sequences(tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, Path]) -> Path:
    """A training of seven sequences per step, in one process and one forward pass."""
    folder = tmp_path_factory.mktemp("seven")
    code, errors = run(folder, inputs, {"global_batch_size": 7})
    assert code == 0, errors
    assert "sequences among" not in errors
    return folder


def rank_pids(process: subprocess.Popen[str]) -> list[int]:
    """The launcher's children by rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {}
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        for variable in environment:
            if variable.startswith(b"RANK="):
                ranks[int(variable[5:])] = int(child)
    return [ranks[rank] for rank in sorted(ranks)]


def is_stopped(pid: int) -> bool:
    """Whether SIGSTOP has stopped a process."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def group_is_gone(process: subprocess.Popen[str]) -> bool:
    """Whether no process of the group is left."""
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return True
    return False
