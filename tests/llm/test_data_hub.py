"""The hub: the real client against a local server; the bytes are those of one commit."""

import importlib.util
import io
import json
from collections.abc import Generator
from pathlib import Path

import pytest

from llm.artifact import Json, load_artifact
from llm.data.sources.hub import HubFile, digest_of
from tests.llm.cleaning import run_clean
from tests.llm.hub_server import COMMIT, NAME, HubServer, download

needs_client = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="needs the package datasets"
)
ROWS = [{"text": f"Row {n} of a dataset.", "n": n} for n in range(60)]
README = b"---\nconfigs:\n- config_name: lines\n  default: true\n  data_files:\n  - split: train\n    path: lines/*.jsonl\n- config_name: tables\n  data_files: tables/*.parquet\n---\n"  # fmt: skip  # noqa: E501


def lines(rows: list[dict[str, object]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """Two configurations of one dataset: JSON lines and Parquet."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    table = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), table, row_group_size=20)
    odd = b'{"text": 3}\n{"text": null}\nno json\n{"other": 1}\n'
    return {
        "README.md": README,
        "lines/a.jsonl": lines(ROWS[:40]),
        "lines/b.jsonl": lines(ROWS[40:]) + odd,
        "tables/t.parquet": table.getvalue(),
    }


@pytest.fixture
def hub(files: dict[str, bytes]) -> Generator[HubServer]:
    """A hub that serves `files`."""
    with HubServer(files) as server:
        yield server


def failure(folder: Path) -> tuple[str, str]:
    found = json.loads((folder / "work/error.json").read_bytes())
    return found["type"], found["message"]


@needs_client
def test_the_files_of_a_split_come_as_they_are_from_the_commit_a_branch_is(
    tmp_path: Path, hub: HubServer, files: dict[str, bytes]
) -> None:
    for revision in (COMMIT, "main"):
        result = download(tmp_path / revision, hub, hub_revision=revision)
        assert result.returncode == 0, result.stderr
        artifact = load_artifact(tmp_path / revision / "out")
        assert artifact.summary["commit"] == COMMIT
        found = {
            path.relative_to(artifact.path / "files").as_posix(): path.read_bytes()
            for path in (artifact.path / "files").rglob("*") if path.is_file()
        }  # fmt: skip
        assert found == {name: files[name] for name in ("lines/a.jsonl", "lines/b.jsonl")}
    served = [line for line in hub.requests if "GET" in line and "/resolve/" in line]
    assert served and all(f"/resolve/{COMMIT}/" in line for line in served)


@needs_client
def test_pairs_of_nested_columns_are_streamed_and_cleaned(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    user = {"role": "user", "content": "Which?"}
    rows = [
        {"chosen": [user, {"role": "assistant", "content": f"right {n}"}], "score": 1.0,
         "rejected": [user, {"role": "assistant", "content": f"wrong {n}"}], "group": str(n)}
        for n in range(60)
    ]  # fmt: skip
    table = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    with HubServer({"data/train.parquet": table.getvalue()}) as hub:
        result = download(
            tmp_path, hub, role="preferences", is_hub_streamed=True, format="implicit_pair"
        )
    assert result.returncode == 0, result.stderr
    raw = load_artifact(tmp_path / "out").path
    source = json.loads((raw / "source.json").read_bytes())
    assert (source["content"], source["format"]) == ("preferences", "implicit_pair")
    found = [json.loads(line) for line in (raw / "files/hub.jsonl").read_bytes().splitlines()]
    assert all(set(record) == {"chosen", "rejected", "group"} for record in found)
    summary, outputs, _ = run_clean(
        tmp_path / "clean", {"hub.jsonl": (raw / "files/hub.jsonl").read_bytes()}, "preferences",
        record_format=source["format"], validation_fraction=0.3,
    )  # fmt: skip
    assert summary["skipped"] == {}
    pairs = outputs["train"] + outputs["validation"]
    assert {(pair["chosen"], pair["rejected"]) for pair in pairs} == {
        (f"right {n}", f"wrong {n}") for n in range(60)
    }


@needs_client
@pytest.mark.parametrize(("config", "is_streamed"), [("tables", True), ("lines", False)])
def test_the_first_documents_are_the_same_streamed_or_not(
    tmp_path: Path, hub: HubServer, config: str, is_streamed: bool
) -> None:
    settings: dict[str, Json] = {"hub_config": config, "is_hub_streamed": is_streamed}
    result = download(tmp_path, hub, max_documents=50, **settings)
    assert result.returncode == 0, result.stderr
    artifact = load_artifact(tmp_path / "out")
    found = (artifact.path / "files/hub.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in found] == [{"text": row["text"]} for row in ROWS[:50]]


@needs_client
def test_wrong_types_are_kept_and_malformed_records_counted(tmp_path: Path, hub: HubServer) -> None:
    result = download(tmp_path, hub, is_hub_streamed=True)
    assert result.returncode == 0, result.stderr
    artifact = load_artifact(tmp_path / "out")
    found = (artifact.path / "files/hub.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in found[60:]] == [{"text": 3}, {"text": None}, {}]
    assert artifact.summary["skipped"] == {"malformed JSON": 1}


@needs_client
def test_a_token_is_shown_to_the_hub_and_written_nowhere(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    with HubServer(files, token="hf_secret") as hub:
        result = download(tmp_path / "with", hub, token="hf_secret")
        assert result.returncode == 0, result.stderr
        assert "hf_secret" not in result.stdout + result.stderr
        assert download(tmp_path / "without", hub).returncode == 1
    kind, message = failure(tmp_path / "without")
    assert kind == "DataError" and NAME in message
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"hf_secret" not in everything


@needs_client
def test_missing_datasets_and_splits_are_errors_that_name_them(
    tmp_path: Path, hub: HubServer
) -> None:
    wrong: list[tuple[str, Json, str]] = [
        ("hub_name", "owner/other", "owner/other"),
        ("hub_revision", "branch", "branch"),
        ("hub_config", "other", "other"),
        ("hub_split", "test", "has no split test; it has train"),
    ]
    for setting, value, expected in wrong:
        folder = tmp_path / setting
        assert download(folder, hub, **{setting: value}).returncode == 1
        kind, message = failure(folder)
        assert kind == "DataError" and expected in message, message


@needs_client
def test_other_bytes_than_the_commit_has_are_an_error(
    tmp_path: Path, hub: HubServer, files: dict[str, bytes]
) -> None:
    for path in ("lines/a.jsonl", "lines/b.jsonl"):
        hub.served = {path: files[path].replace(b"Row", b"Raw")}
        folder = tmp_path / path[6]
        assert download(folder, hub).returncode == 1
        kind, message = failure(folder)
        assert kind == "DataError" and "expected" in message, message
        left = [one for one in (folder / "out").rglob("*") if one.is_file()]
        assert not any(b"Raw" in one.read_bytes() for one in left)


@needs_client
def test_a_branch_that_moved_after_the_plan_is_an_error(tmp_path: Path, hub: HubServer) -> None:
    result = download(tmp_path, hub, hub_revision="main", planned="0" * 32)
    assert result.returncode == 1
    assert "main on the hub changed after the run began" in failure(tmp_path)[1]


def test_a_small_file_is_known_by_its_id_in_git(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"hello\n")
    file = HubFile(path="a", size_bytes=6, sha256="", blob_id="", url="")
    assert digest_of(file, tmp_path / "a") == "ce013625030ba8dba906f756967f9e9ca394464a"
