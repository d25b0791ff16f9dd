"""Download: bytes arrive unchanged or not at all. No network but 127.0.0.1."""

import hashlib
import json
import sysconfig
from pathlib import Path

import pytest

from llm.artifact import Artifact, ArtifactWriter, Json, load_artifact
from llm.config import SourceConfig, read_section
from llm.data.sources.fingerprint import fingerprint
from llm.download import download
from llm.errors import DataError, Interrupted
from llm.runtime.job import Job, finish
from tests.llm.http_server import HostileServer, answer, serve_ranges


def run_download(
    folder: Path, role: str = "corpus", *, planned: str | None = None, **settings: Json
) -> Artifact:
    """Fingerprint the source and run the stage, as a flow does."""
    source = read_section(SourceConfig, settings)
    job = Job(
        stage="download", settings=settings, role=role, out=folder / "out", work=folder / "work",
        input_digests={"source": planned or fingerprint(source, role, None)},
    )  # fmt: skip
    job.work.mkdir(parents=True, exist_ok=True)
    writer = ArtifactWriter(job.out)
    finish(job, writer, download(job, writer))
    return load_artifact(job.out)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


def test_local_files_arrive_byte_for_byte_and_their_path_does_not_count(tmp_path: Path) -> None:
    files = {"a.txt": b"\xff\x00\r\n", "b/c.jsonl": b"{", "d.png": b"x"}
    digests: set[str] = set()
    for place in ("here", "there"):
        for name, data in files.items():
            path = tmp_path / place / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        artifact = run_download(tmp_path / place, kind="files", path=f"{tmp_path / place / 'data'}")
        assert (artifact.path / "files/a.txt").read_bytes() == files["a.txt"]
        assert (artifact.path / "files/b/c.jsonl").read_bytes() == files["b/c.jsonl"]
        assert artifact.summary["num_files"] == 2 and artifact.summary["num_ignored_files"] == 1
        digests.add(artifact.digest)
    assert len(digests) == 1
    source = json.loads((artifact.path / "source.json").read_bytes())
    assert source == {"kind": "files", "content": "text", "text_key": "text", "format": "auto"}


def test_files_without_a_byte_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match=r"download\.corpus\.path: .* are empty"):
        run_download(tmp_path, kind="files", path=str(tmp_path / "a.txt"))


@pytest.mark.usefixtures("_small_library")
@pytest.mark.parametrize("kind", ["files", "stdlib"])
def test_a_source_that_changed_after_the_plan_is_an_error(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.txt").write_text("now")
    with pytest.raises(DataError, match=r"download\.corpus: .* changed after the run began"):
        run_download(tmp_path, kind=kind, path=str(tmp_path / "a.txt"), planned="0" * 32)
    assert not (tmp_path / "out/manifest.json").exists()


@pytest.fixture
def _small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduce the standard library to a few modules."""
    root = Path(sysconfig.get_path("stdlib"))
    for name in ("json", "email", "argparse.py", "textwrap.py"):
        for path in [root / name, *(root / name).rglob("*.py")]:
            if path.is_file():
                copy = tmp_path / "library" / path.relative_to(root)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "library"))


@pytest.mark.usefixtures("_small_library")
@pytest.mark.parametrize("role", ["corpus", "chats"])
def test_the_standard_library_gives_the_same_digest_twice(tmp_path: Path, role: str) -> None:
    artifacts = [run_download(tmp_path / str(go), role, kind="stdlib") for go in range(2)]
    assert artifacts[0].digest == artifacts[1].digest
    with (artifacts[0].path / "files/stdlib.jsonl").open(encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    key = "text" if role == "corpus" else "messages"
    assert len(records) == artifacts[0].summary["num_documents"]
    assert all(record[key] for record in records)
    few = run_download(tmp_path / "few", role, kind="stdlib", max_documents=50)
    with (few.path / "files/stdlib.jsonl").open(encoding="utf-8") as file:
        drawn = [json.loads(line) for line in file]
    assert len(drawn) == 50
    assert [record for record in records if record in drawn] == drawn, "in order"


BODY = b"Some words.\n\n" * 10_000
URL_SETTINGS: dict[str, Json] = {"kind": "url", "sha256": hashlib.sha256(BODY).hexdigest()}


def test_a_url_arrives_whole_under_its_name(tmp_path: Path) -> None:
    with HostileServer([serve_ranges(BODY, etag='"1"', most_bytes=100_000)]) as server:
        artifact = run_download(tmp_path, url=f"{server.url}/data/corpus.txt?x=1", **URL_SETTINGS)
    assert len(server.requests) == 2
    assert (artifact.path / "files/corpus.txt").read_bytes() == BODY
    assert artifact.summary["num_bytes"] == len(BODY)


def test_wrong_bytes_leave_nothing_under_a_final_name(tmp_path: Path) -> None:
    with (
        HostileServer([answer(b"<html>login</html>")]) as server,
        pytest.raises(DataError, match=r"download\.corpus\.url: .* expected"),
    ):
        run_download(tmp_path, url=f"{server.url}/corpus.txt", **URL_SETTINGS)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_url_whose_name_tells_no_format_is_refused_before_a_byte_comes(tmp_path: Path) -> None:
    with (
        HostileServer([answer(BODY)]) as server,
        pytest.raises(
            DataError, match=r"download\.corpus\.url: the format of archive\.rar is unknown"
        ),
    ):
        run_download(tmp_path, url=f"{server.url}/archive.rar", **URL_SETTINGS)
    assert server.requests == []


def test_a_stopped_download_goes_on_from_its_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(job: Job) -> None:
        raise Interrupted("stop")

    body = BODY * 20  # more than one block
    settings = URL_SETTINGS | {"sha256": hashlib.sha256(body).hexdigest()}
    with HostileServer([serve_ranges(body)]) as server:
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(Job, "raise_if_stopping", stop)
            run_download(tmp_path, url=f"{server.url}/corpus.txt", **settings)
        run_download(tmp_path, url=f"{server.url}/corpus.txt", **settings)
    assert "Range: bytes=" in server.requests[1]
