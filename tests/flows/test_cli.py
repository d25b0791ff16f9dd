"""Commands that need no pipeline: models out to others and back."""

import json
from pathlib import Path

import pytest
import torch

from flows.cli import main
from llm.artifact import ArtifactWriter
from llm.config import ModelConfig
from llm.model.store import save_model
from llm.model.transformer import Transformer
from llm.tokenizer.characters import CharacterTokenizer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small model of characters."""
    tokenizer = CharacterTokenizer.train(["abc"])
    config = ModelConfig(num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, d_ff=32)
    model = Transformer(config, tokenizer.vocab_size, 16)
    model.initialize(torch.Generator().manual_seed(1))
    save_model(ArtifactWriter(tmp_path / "model"), model, tokenizer.to_files())
    return tmp_path / "model"


def test_export_writes_a_folder_and_says_which(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "theirs"
    assert main(["export", str(model), "--to", str(target), "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out == f"{target}\n"
    config = json.loads((target / "config.json").read_text())
    assert (config["model_type"], config["torch_dtype"]) == ("llama", "bfloat16")


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (["export", "MODEL", "--to", "MODEL"], 2, "already there"),
        (["export", "MODEL", "--to", "NEW", "--dtype", "float16"], 2, "dtype: found 'float16'"),
        (["export", "MODEL", "--to", "NEW", "--format", "gguf"], 2, "found characters"),
        (["export", "NOWHERE", "--to", "NEW"], 1, "no model description"),
        (["export", "--to", "NEW", "--artifacts", "NOWHERE"], 1, "no chat model there"),
        (["import", "NOWHERE", "--to", "NEW"], 1, "tokenizer.json: not there"),
        (["import", "MODEL", "--to", "MODEL"], 2, "already there"),
    ],
)
def test_what_cannot_be_is_said_in_a_line_and_leaves_nothing(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    code: int,
    message: str,
) -> None:
    if "gguf" in command:
        pytest.importorskip("gguf", reason="the package gguf writes the file")
    places = {"MODEL": model, "NEW": tmp_path / "new", "NOWHERE": tmp_path / "nowhere"}
    assert main([str(places.get(word, word)) for word in command]) == code
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
