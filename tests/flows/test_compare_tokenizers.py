"""`fromscratch tokenizers`: any set of tokenizers on any text, in one table and a report."""

import json
import struct
from pathlib import Path

import pytest

from flows import compare_tokenizers
from flows.cli import main
from llm.artifact import ArtifactWriter
from llm.tokenizer.base import Tokenizer
from llm.tokenizer.bpe import ByteLevelBPE
from llm.tokenizer.characters import ByteTokenizer, CharacterTokenizer
from tasks.store import ArtifactStore, KeyParts, KeyRecord

TEXT = "one two é\n" * 100


def publish(
    store: ArtifactStore, stage: str, name: str, files: dict[str, bytes], **parts: object
) -> Path:
    """Put an artifact into the store as a run does."""
    writer = ArtifactWriter(store.root.parent / f"{stage} {name}")
    for file, data in files.items():
        writer.write_bytes(file, data)
    settings = parts.pop("settings", {})
    assert isinstance(settings, dict)
    writer.finish(stage=stage, summary={}, settings=settings)
    key = KeyParts(
        stage=stage,
        role=str(parts.pop("role", "")),
        settings={"name": name},
        seed=None,
        inputs={},
        libraries={},
        code={},
    )
    artifact = store.publish(key, writer.folder)
    record = KeyRecord(key=key.key, parts=key, digest=artifact.digest, seconds=1, made_at="now")
    store.remember(record)
    return artifact.path


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    """A corpus, chats, and two tokenizers."""
    store = ArtifactStore(tmp_path / "artifacts")
    made: dict[str, Tokenizer] = {"bytes": ByteTokenizer(), "bpe": ByteLevelBPE.train([TEXT], 270)}
    for kind, tokenizer in made.items():
        publish(store, "train_tokenizer", kind, tokenizer.to_files(), settings={"kind": kind})
    line = json.dumps({"id": "0" * 32, "text": TEXT}).encode() + b"\n"
    shard = {"name": "00000", "documents": 1, "bytes": len(line)}
    documents = {
        "documents.json": json.dumps(
            {"content": "text", "train": [], "validation": [shard]}
        ).encode(),
        "validation/00000.jsonl": line,
        "validation/00000.offsets.bin": struct.pack("<2Q", 0, len(line)),
    }
    publish(store, "clean", "corpus", documents, role="corpus")
    publish(store, "clean", "chats", {"documents.json": b'{"content":"chats"}'}, role="chats")
    return store


def test_all_that_were_made_are_compared_on_the_newest_corpus(
    store: ArtifactStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "report"
    assert main(["tokenizers", "--artifacts", str(store.root), "--to", str(target)]) == 0
    shown = capsys.readouterr().out
    found = json.loads((target / compare_tokenizers.REPORT).read_bytes())
    assert sorted(name.rpartition(" ")[0] for name in found) == ["bpe code", "bytes"]
    for name, figures in found.items():
        assert name in shown
        assert figures["num_bytes"] == len(TEXT.encode())
        assert figures["bytes_per_token"] == figures["num_bytes"] / figures["num_tokens"]
        assert figures["num_round_trip_failures"] == figures["num_refused_documents"] == 0
    assert (target / compare_tokenizers.PLOT).read_bytes().startswith(b"\x89PNG")


def test_any_folder_is_compared_on_any_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, text = tmp_path / "mine", tmp_path / "text.txt"
    folder.mkdir()
    for name, data in CharacterTokenizer.train(["ab"], False).to_files().items():
        (folder / name).write_bytes(data)
    text.write_text("ab" * compare_tokenizers.PART_CHARACTERS + "é")
    assert main(["tokenizers", str(folder), "--text", str(text)]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row[0] == str(folder)
    assert row[2:7] == ["4000.00", "1.00", "1.000", "100.0%", "1"], "the last piece is refused"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 1, "no cleaned corpus"),
        (["--text", "TEXT"], 1, "no tokenizers"),
        (["--text", "NOWHERE"], 2, "No such file"),
        (["--text", "BAD"], 2, "expected UTF-8 text"),
        (["--text", "EMPTY"], 1, "documents.json: not there"),
        (["--text", "TEXT", "NOWHERE"], 1, "tokenizer.json: not there"),
    ],
)
def test_what_is_missing_is_said(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "TEXT").write_text("text")
    (tmp_path / "BAD").write_bytes(b"\xff")
    words = [str(tmp_path / word) if word.isupper() else word for word in arguments]
    assert main(["tokenizers", *words, "--artifacts", str(tmp_path / "none")]) == code
    assert message in capsys.readouterr().err


def test_text_is_read_up_to_a_limit_and_never_within_a_character(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_tokenizers, "MAX_TEXT_BYTES", 5)
    (tmp_path / "text.txt").write_text("é" * 9)
    assert compare_tokenizers.read_texts(tmp_path / "text.txt") == ["éé"]
