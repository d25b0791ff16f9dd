"""Commands without a pipeline (chat, export, import), and the messages of all commands."""

import errno
import json
from pathlib import Path

import pytest
import torch

from flows.cli import main
from llm.artifact import ArtifactWriter
from llm.config import ModelConfig
from llm.model.transformer import Transformer
from llm.model.weights import save_model
from llm.tokenizer.characters import CharacterTokenizer
from tasks.store import ArtifactStore, KeyParts, KeyRecord


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small model with a character tokenizer."""
    tokenizer = CharacterTokenizer.train(["abc"])
    config = ModelConfig(num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, d_ff=32)
    model = Transformer(config, tokenizer.vocab_size, 16)
    model.initialize(torch.Generator().manual_seed(1))
    save_model(ArtifactWriter(tmp_path / "model"), model, tokenizer.to_files())
    return tmp_path / "model"


def test_export_writes_a_folder_and_prints_its_path(
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
        (["export", "MODEL", "--to", "MODEL"], 2, "exists; name a new folder"),
        (["export", "MODEL", "--to", "NEW", "--dtype", "float16"], 2, "dtype: found 'float16'"),
        (["export", "MODEL", "--to", "NEW", "--format", "gguf"], 2, "found characters"),
        (
            ["export", "NOWHERE", "--to", "NEW"],
            1,
            "nowhere: no such folder; expected the folder of a",
        ),
        (["export", "EMPTY", "--to", "NEW"], 1, "model.json: not found; expected a model folder"),
        (["chat", "NOWHERE"], 1, "nowhere: no such folder; expected the folder of a model"),
        (["export", "--to", "NEW", "--artifacts", "NOWHERE"], 1, "no chat model; build one"),
        (["export", "MODEL", "--to", "NEW", "--format", "peft"], 1, "adapter.json: not found"),
        (["merge", "MODEL", "EMPTY", "--to", "NEW"], 1, "adapter.json: not found"),
        (["merge", "NOWHERE", "MODEL", "--to", "NEW"], 1, "model.json: not found"),
        (["import", "NOWHERE", "--to", "NEW"], 1, "tokenizer.json: not there"),
        (["import", "MODEL", "--to", "MODEL"], 2, "exists; name a new folder"),
    ],
)
def test_an_invalid_command_prints_one_line_and_writes_nothing(
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
    places["EMPTY"] = tmp_path.parent
    assert main([str(places.get(word, word)) for word in command]) == code
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("command", ["chat", "export", "tokenizers", "doctor", "up"])
def test_every_option_has_its_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--artifacts FOLDER artifacts folder, as runtime.artifacts_dir of a run" in said


@pytest.mark.parametrize(
    ("function", "command", "code", "said"),
    [
        ("models.chat_with_options", ["chat", "MODEL"], 130, "stopped\n"),
        ("runs._run_flow", ["run", "quickstart"], 75, "stopped; run the same command to resume"),
    ],
)
def test_ctrl_c_offers_to_resume_only_what_can_resume(
    function: str,
    command: list[str],
    code: int,
    said: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"flows.commands.{function}", interrupted)
    assert main([str(model) if word == "MODEL" else word for word in command]) == code
    assert capsys.readouterr().err.startswith(said)


def test_chat_prints_the_folder_of_the_newest_model_without_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = KeyParts(
        stage="finetune", role="", settings={}, seed=1, inputs={}, libraries={}, code={}
    )
    folder = tmp_path / "finetune" / "abc"
    ArtifactWriter(folder).finish(stage="finetune", summary={"content": "chats"})
    ArtifactStore(tmp_path).remember(
        KeyRecord(key=parts.key, parts=parts, digest="abc", seconds=1.0, made_at="now")
    )
    taken: list[Path] = []
    monkeypatch.setattr(
        "flows.commands.models.chat_with_options", lambda folder, options: taken.append(folder)
    )
    assert main(["chat", "--artifacts", str(tmp_path)]) == 0
    assert taken == [folder]
    assert capsys.readouterr().err == f"model: {folder}\n"


def test_a_full_disk_is_one_line_for_every_command(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/a/file")

    monkeypatch.setattr("flows.commands.models.chat_with_options", full)
    assert main(["chat", str(model)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: /a/file: no space left on the disk: found")
    assert said.count("\n") == 1
