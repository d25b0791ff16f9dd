"""`fromscratch spread`: rows named by digest or folder go away and come back."""

from pathlib import Path

import pytest

from flows.cli import main
from llm.artifact import ArtifactWriter, Manifest
from llm.storage.elsewhere import ELSEWHERE


def write_rows(root: Path, data: bytes) -> Path:
    """Write an artifact of one shard where a store has it."""
    staging = root / "staging"
    writer = ArtifactWriter(staging)
    writer.write_bytes("train/00000.tokens.bin", data)
    manifest: Manifest = writer.finish(stage="pack", summary={})
    folder = root / "pack" / manifest.digest
    folder.parent.mkdir(exist_ok=True)
    return staging.rename(folder)


def test_rows_go_and_come_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, place = write_rows(tmp_path / "artifacts", b"1"), tmp_path / "disk"
    place.mkdir()
    artifacts = ["--artifacts", str(tmp_path / "artifacts")]
    assert main(["spread", folder.name[:8], str(place), *artifacts]) == 0
    assert str(place) in capsys.readouterr().err
    assert (folder / ELSEWHERE).is_file() and not list(folder.glob("train/*"))
    assert main(["spread", str(folder), "--back", *artifacts]) == 0
    assert (folder / "train/00000.tokens.bin").read_bytes() == b"1"
    assert not (folder / ELSEWHERE).exists()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["nothing", "PLACE"], "found 0 such artifacts"),
        (["", "PLACE"], "found 0 such artifacts"),
        (["DIGEST"], "expected places to move to"),
        (["DIGEST", "PLACE", "--back"], "expected places to move to"),
    ],
)
def test_what_is_asked_for_in_vain_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    folder = write_rows(tmp_path / "artifacts", b"1")
    known = {"DIGEST": folder.name, "PLACE": str(tmp_path)}
    words = [known.get(word, word) for word in arguments]
    assert main(["spread", *words, "--artifacts", str(tmp_path / "artifacts")]) == 2
    assert problem in capsys.readouterr().err
    assert (folder / "train/00000.tokens.bin").exists()
