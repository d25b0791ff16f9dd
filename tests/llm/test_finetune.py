"""Fine-tuning: from a base model, on the assistant's words alone, through the same loop."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llm.artifact import ArtifactWriter, file_sha256
from llm.config import LoraConfig
from llm.data.packed import PackedSequences
from llm.errors import ConfigError, DataError
from llm.finetune import finetune
from llm.model.loss import token_losses
from llm.model.weights import load_model, save_model
from llm.tokenizer.base import TOKENIZER_JSON
from llm.tokenizer.bpe import ByteLevelBPE
from tests.llm.training_setup import (
    points,
    run_inside,
    start,
    tiny_finetune,
    tiny_model,
    write_chat_sequences,
    write_job_file,
)


@pytest.fixture
def inputs(tmp_path: Path, tokenizer: ByteLevelBPE) -> dict[str, Path]:
    """A base model and packed chats."""
    writer = ArtifactWriter(tmp_path / "base")
    save_model(writer, tiny_model(vocab_size=tokenizer.vocab_size), tokenizer.to_files())
    writer.finish(stage="pretrain", summary={})
    return {
        "base": tmp_path / "base",
        "sequences": write_chat_sequences(tmp_path / "sequences", tokenizer, 50),
    }


def test_it_starts_from_the_base_and_learns_the_masked_targets_alone(
    tmp_path: Path, inputs: dict[str, Path], tokenizer: ByteLevelBPE
) -> None:
    settings = tiny_finetune(num_steps=30, learning_rate=1e-2)
    run_inside(finetune, write_job_file(tmp_path, "finetune", settings, inputs))
    base, chat = load_model(inputs["base"]), load_model(tmp_path / "out")
    sequences = PackedSequences(inputs["sequences"], "validation")
    arrays = sequences.read(range(8))
    tokens, mask = torch.from_numpy(arrays.tokens), torch.from_numpy(arrays.mask)[:, 1:]
    with torch.no_grad():
        before = token_losses(base(tokens[:, :-1]), tokens[:, 1:])
        after = token_losses(chat(tokens[:, :-1]), tokens[:, 1:])
    first, last = points(tmp_path)[0], points(tmp_path)[-1]
    assert first["metrics"]["val/loss"] == pytest.approx(before[mask].mean().item(), rel=1e-5)
    assert last["metrics"]["val/loss"] == pytest.approx(after[mask].mean().item(), rel=1e-5)
    assert after[mask].mean() < 0.7 * before[mask].mean()
    fell_elsewhere = (before - after)[~mask].mean() / before[~mask].mean()
    assert fell_elsewhere < 0.2  # what is masked is not learned, only moved along
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == tokenizer.to_files()[
        TOKENIZER_JSON
    ]


def test_loss_on_all_trains_and_validates_on_every_token_of_a_chat(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    settings = tiny_finetune(num_steps=2, loss_on="all")
    run_inside(finetune, write_job_file(tmp_path, "finetune", settings, inputs))
    sequences = PackedSequences(inputs["sequences"], "validation")
    tokens = torch.from_numpy(sequences.read(range(8)).tokens)  # (B, T+1), a chat each
    with torch.no_grad():
        losses = token_losses(load_model(inputs["base"])(tokens[:, :-1]), tokens[:, 1:])
    is_learned = tokens[:, 1:] != sequences.layout.pad_id
    first = points(tmp_path)[0]["metrics"]["val/loss"]
    assert first == pytest.approx(losses[is_learned].mean().item(), rel=1e-5)


def test_rows_of_another_context_than_the_base_are_refused_with_both_numbers(
    tmp_path: Path, inputs: dict[str, Path], tokenizer: ByteLevelBPE
) -> None:
    sequences = write_chat_sequences(tmp_path / "longer", tokenizer, 50, seq_len=48)
    job = write_job_file(tmp_path, "finetune", tiny_finetune(), {**inputs, "sequences": sequences})
    with pytest.raises(DataError, match="seq_len: found 48, expected the model's 32"):
        run_inside(finetune, job)


LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.2)
TRAININGS: dict[str, dict[str, Any]] = {
    "adapter": {"lora": LORA},
    "adapter-by-muon": {"lora": LORA, "optimizer": "muon"},
    "noise": {"neftune_alpha": 5.0, "new_token_embeddings": "mean"},
}


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("settings", TRAININGS.values(), ids=TRAININGS)
def test_it_resumes_to_the_same_bits(
    settings: dict[str, Any],
    is_causal: bool,
    tmp_path: Path,
    inputs: dict[str, Path],
    tokenizer: ByteLevelBPE,
) -> None:
    model = tiny_model(vocab_size=tokenizer.vocab_size, is_causal=is_causal)
    save_model(ArtifactWriter(tmp_path / "start"), model, tokenizer.to_files())
    inputs = {**inputs, "base": tmp_path / "start"}
    config = tiny_finetune(masked_fraction=0.5, **settings)
    job = write_job_file(tmp_path, "finetune", config, inputs, micro_batch_size=3)
    expected = run_inside(finetune, job), points(tmp_path), contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "work" / "checkpoints" / "step-00000004")
    torch.manual_seed(1234)
    assert (run_inside(finetune, job), points(tmp_path), contents(tmp_path / "out")) == expected
    other = write_job_file(
        tmp_path / "other", "finetune", tiny_finetune(masked_fraction=0.5), inputs
    )
    run_inside(finetune, other)
    assert (
        contents(tmp_path / "other" / "out")["model.safetensors"]
        != expected[2]["model.safetensors"]
    )


def contents(folder: Path) -> dict[str, bytes]:
    """The files of an artifact but its log."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "metrics.jsonl"}


def test_activations_computed_twice_give_the_same_adapter(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    """Although the second forward pass must repeat the adapter's dropout."""
    found = []
    for name in ("kept", "twice"):
        job = write_job_file(
            tmp_path / name, "finetune", tiny_finetune(lora=LORA), inputs,
            activation_checkpointing=name == "twice",
        )  # fmt: skip
        run_inside(finetune, job)
        found.append(contents(tmp_path / name / "out")["adapter.safetensors"])
    assert found[0] == found[1]


def test_an_adapter_learns_with_its_base_unchanged_and_merges_into_the_artifact(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    settings = tiny_finetune(num_steps=30, learning_rate=3e-2, lora=LORA)
    summary = run_inside(finetune, write_job_file(tmp_path, "finetune", settings, inputs))
    losses = [p["metrics"]["val/loss"] for p in points(tmp_path) if "val/loss" in p["metrics"]]
    assert losses[-1] < losses[0] - 0.2  # the head stays that of random weights
    base, chat = load_model(inputs["base"]), load_model(tmp_path / "out")
    assert summary["num_parameters"] == base.num_parameters()
    adapters = load_file(tmp_path / "out" / "adapter.safetensors")
    assert summary["num_trained_parameters"] == sum(part.numel() for part in adapters.values())
    for name, weight in base.named_parameters():
        layer, _, leaf = name.rpartition(".")
        expected = weight.detach()
        if leaf == "weight" and f"{layer}.a" in adapters:
            expected = expected + 8.0 / 4 * adapters[f"{layer}.b"] @ adapters[f"{layer}.a"]
        torch.testing.assert_close(chat.get_parameter(name).detach(), expected)
    info = json.loads((tmp_path / "out" / "adapter.json").read_bytes())
    assert info["base_sha256"] == file_sha256(inputs["base"] / "model.safetensors")
    [newest] = (tmp_path / "work" / "checkpoints").glob("*30")
    assert (newest / "model.safetensors").stat().st_size < 0.5 * sum(
        weight.nbytes for weight in base.parameters()
    )


@pytest.mark.distributed
def test_two_processes_train_one_adapter(tmp_path: Path, inputs: dict[str, Path]) -> None:
    lora = LoraConfig(rank=4, alpha=8.0)  # no dropout, which differs by process
    losses: list[Any] = []
    for num_processes in (1, 2):
        folder = tmp_path / str(num_processes)
        config = tiny_finetune(lora=lora)
        job = write_job_file(folder, "finetune", config, inputs, num_processes=num_processes)
        process = start(job, "finetune")
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        summary = json.loads((folder / "out" / "manifest.json").read_text())["summary"]
        losses.append(summary["val_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"lora": LoraConfig(rank=4, targets=("q_proj",))},
            "finetune.lora.targets: found q_proj, expected some of query",
        ),
        (
            {"lora": LORA, "new_token_embeddings": "mean"},
            "finetune.new_token_embeddings: found mean, expected keep with finetune.lora.rank = 4",
        ),
    ],
)
def test_settings_that_cannot_train_are_refused_before_the_first_step(
    settings: dict[str, Any], expected: str, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    job = write_job_file(tmp_path, "finetune", tiny_finetune(**settings), inputs)
    with pytest.raises(ConfigError, match=expected):
        run_inside(finetune, job)


def test_control_tokens_that_were_trained_are_not_set_to_the_mean(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    process = start(write_job_file(tmp_path / "1", "finetune", tiny_finetune(), inputs), "finetune")
    assert process.communicate(timeout=60) and process.returncode == 0
    again = tiny_finetune(new_token_embeddings="mean")
    inputs = {**inputs, "base": tmp_path / "1" / "out"}
    expected = "finetune.new_token_embeddings: found mean, .* starting model was trained on chats"
    with pytest.raises(ConfigError, match=expected):
        run_inside(finetune, write_job_file(tmp_path / "2", "finetune", again, inputs))


def test_a_damaged_base_is_refused_by_file(tmp_path: Path, inputs: dict[str, Path]) -> None:
    path = inputs["base"] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    process = start(write_job_file(tmp_path, "finetune", tiny_finetune(), inputs), "finetune")
    process.communicate(timeout=60)
    assert process.returncode == 1
    error = json.loads((tmp_path / "work" / "error.json").read_text())
    assert (error["type"], error["traceback"]) == ("ArtifactError", "")
    assert "model.safetensors: no readable safetensors file" in error["message"]
