"""Checkpoints: whole or not there; a damaged one is set aside and the one before it used."""

import errno
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from llm.artifact import HashingFile
from llm.config import OptimizationConfig
from llm.errors import ArtifactError, DiskFullError
from llm.model.transformer import Transformer
from llm.training.checkpoints import load_checkpoint, newest_checkpoint, save_checkpoint
from llm.training.loop import TrainState
from llm.training.optimizers import Optimizer, make_optimizer
from tests.llm.training_setup import tiny_model


def trained(step: int) -> tuple[Transformer, Optimizer, TrainState]:
    model = tiny_model(seed=step, vocab_size=640)
    optimizer = make_optimizer(model, OptimizationConfig(optimizer="muon"))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.1 * step)
    optimizer.step()
    return model, optimizer, TrainState(step=step, tokens=step * 7, epoch=1, row=step, loss=2.5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 1 to 4, of which three are kept."""
    for step in range(1, 5):
        save_checkpoint(tmp_path / "checkpoints", *trained(step), keep=3)
    return tmp_path / "checkpoints"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept_and_nothing_else_is_left(folder: Path) -> None:
    assert names(folder) == ["step-00000002", "step-00000003", "step-00000004"]
    assert names(folder / "step-00000004") == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]


def test_a_checkpoint_brings_back_weights_optimizer_and_state_bit_equal(folder: Path) -> None:
    model, optimizer, state = trained(4)
    other, its_optimizer, _ = trained(9)
    path = newest_checkpoint(folder)
    assert path is not None
    assert load_checkpoint(path, other, its_optimizer) == state
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    expected, found = optimizer.state_dict(), its_optimizer.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_saving_a_step_again_changes_nothing(folder: Path) -> None:
    before = (folder / "step-00000004").stat().st_mtime_ns
    save_checkpoint(folder, *trained(4), keep=3)
    assert (folder / "step-00000004").stat().st_mtime_ns == before


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1 << (place % 8)
    path.write_bytes(data)


def test_any_damage_is_found_set_aside_and_the_one_before_used(folder: Path) -> None:
    generator = random.Random(0)
    whole = folder.with_name("whole")
    shutil.copytree(folder, whole)
    for number in range(60):
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        newest = folder / "step-00000004"
        victim = generator.choice([path for path in newest.iterdir() if path.suffix != ".tmp"])
        kind = number % 4
        if kind == 0:
            flip(victim, generator.randrange(1 << 30))
        elif kind == 1:
            os.truncate(victim, generator.randrange(victim.stat().st_size))
        elif kind == 2:
            victim.unlink()
        else:
            shutil.copy(folder / "step-00000003" / victim.name, victim)
            if victim.name == "manifest.json":
                flip(newest / "model.safetensors", 5)
        found = newest_checkpoint(folder)
        assert found == folder / "step-00000003", (number, victim.name)
        assert (folder / "damaged-step-00000004" / "reason.txt").read_text().strip()


def test_when_all_are_damaged_there_is_none(folder: Path) -> None:
    for path in folder.iterdir():
        (path / "manifest.json").unlink()
    assert newest_checkpoint(folder) is None
    assert all(name.startswith("damaged-") for name in names(folder))


def test_a_second_damaged_checkpoint_of_a_step_is_set_aside_beside_the_first(folder: Path) -> None:
    for _ in range(2):
        (folder / "step-00000004" / "state.json").write_text("{")
        newest_checkpoint(folder)
        save_checkpoint(folder, *trained(4), keep=3)
    assert {"damaged-step-00000004", "damaged-step-00000004-1", "step-00000004"} <= set(
        names(folder)
    )


def test_what_a_kill_left_half_written_is_removed(folder: Path) -> None:
    for leftover in (".writing", ".removing"):
        shutil.copytree(folder / "step-00000002", folder / leftover)
    assert newest_checkpoint(folder) == folder / "step-00000004"
    assert names(folder) == ["step-00000002", "step-00000003", "step-00000004"]


def test_a_full_disk_is_said_in_one_line_and_loses_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: HashingFile, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = names(folder)
    model, optimizer, state = trained(5)
    tensors = (*model.state_dict().values(), *optimizer.state_dict().values())
    needed = sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())  # tied: once
    with monkeypatch.context() as patched:
        patched.setattr(HashingFile, "write", fail)
        with pytest.raises(DiskFullError, match=f"bytes free, needed {needed:,} more") as caught:
            save_checkpoint(folder, model, optimizer, state, keep=3)
    assert "\n" not in str(caught.value)
    assert names(folder) == before
    assert newest_checkpoint(folder) == folder / "step-00000004"


def test_a_checkpoint_of_another_shape_is_refused_by_tensor(folder: Path) -> None:
    model = tiny_model(d_ff=64, vocab_size=640)
    optimizer = make_optimizer(model, OptimizationConfig(optimizer="muon"))
    with pytest.raises(ArtifactError, match=r"gate.weight: found shape \[48, 32\], expected \[64"):
        load_checkpoint(folder / "step-00000004", model, optimizer)


def test_no_folder_means_no_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none") is None
