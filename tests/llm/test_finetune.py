"""Fine-tuning: from a base model, on the assistant's words alone, through the same loop."""

import json
from pathlib import Path

import pytest
import torch

from llm.artifact import ArtifactWriter
from llm.data.packed import PackedSequences
from llm.errors import DataError
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


def test_a_damaged_base_is_refused_by_file(tmp_path: Path, inputs: dict[str, Path]) -> None:
    path = inputs["base"] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    process = start(write_job_file(tmp_path, "finetune", tiny_finetune(), inputs), "finetune")
    process.communicate(timeout=60)
    assert process.returncode == 1
    error = json.loads((tmp_path / "work" / "error.json").read_text())
    assert (error["type"], error["traceback"]) == ("ArtifactError", "")
    assert "model.safetensors: no readable safetensors file" in error["message"]
