"""A saved model is read back bit for bit, here and by safetensors; damage is reported by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm.artifact import ArtifactWriter
from llm.errors import ArtifactError
from llm.model.weights import load_model, save_model
from tests.llm.training_setup import tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved model with untied embeddings and a padded vocabulary."""
    writer = ArtifactWriter(tmp_path / "model")
    save_model(writer, tiny_model(vocab_size=601, tie_embeddings=False), {"tokenizer.json": b"{}"})
    writer.finish(stage="pretrain", summary={})
    return tmp_path / "model"


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("vocab_size", [640, 601])
def test_a_model_comes_back_bit_equal(tmp_path: Path, is_tied: bool, vocab_size: int) -> None:
    model = tiny_model(vocab_size=vocab_size, tie_embeddings=is_tied)
    save_model(ArtifactWriter(tmp_path / "model"), model, {"tokenizer.json": b"{}"})
    loaded = load_model(tmp_path / "model")
    tokens = torch.randint(0, vocab_size, (2, 8))
    with torch.no_grad():
        assert torch.equal(model(tokens), loaded(tokens))
    assert all(map(torch.equal, model.parameters(), loaded.parameters()))
    assert (loaded.config, loaded.seq_len) == (model.config, model.seq_len)
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == b"{}"


def test_the_safetensors_library_reads_the_file(folder: Path) -> None:
    model = tiny_model(vocab_size=601, tie_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    assert tensors.keys() == dict(model.named_parameters()).keys()
    assert torch.equal(tensors["embedding.weight"], model.embedding.weight[:601])
    assert torch.equal(tensors["norm.weight"], model.norm.weight)


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    save_model(ArtifactWriter(tmp_path / "model"), tiny_model(), {"tokenizer.json": b"{}"})
    assert "head.weight" not in load_file(tmp_path / "model" / "model.safetensors")


def test_every_tensor_that_does_not_fit_is_reported_with_both_shapes(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["norm.weight"]
    tensors["extra"] = torch.zeros(1)
    tensors["blocks.1.attention.key.weight"] = torch.zeros(4, 4)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ArtifactError) as caught:
        load_model(folder)
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert lines == [
        "blocks.1.attention.key.weight: found shape [4, 4], expected [16, 32]",
        "extra: unknown",
        "norm.weight: missing",
    ]


@pytest.mark.parametrize("damage", ["cut", "removed", "text"])
def test_unreadable_weights_are_reported(folder: Path, damage: str) -> None:
    path = folder / "model.safetensors"
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:1000] if damage == "cut" else b"no tensors")
    with pytest.raises(ArtifactError, match=r"model\.safetensors: no readable safetensors file"):
        load_model(folder)


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[]", '{"model": {"layers": 3}, "vocab_size": 1, "seq_len": 1}'],
)
def test_an_unreadable_config_is_reported(folder: Path, content: str) -> None:
    (folder / "model.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"model\.json: not a model config of this version"):
        load_model(folder)


def test_the_config_file_has_all_that_builds_the_model(folder: Path) -> None:
    data = json.loads((folder / "model.json").read_text())
    assert data.keys() == {"model", "vocab_size", "seq_len"}
    assert (data["vocab_size"], data["model"]["d_model"]) == (601, 32)
