"""The format that a plan shows: found in the first records, or an error before any stage runs."""

import gzip
from pathlib import Path

import pytest

from llm.artifact import Json
from llm.config import SourceConfig
from llm.data.sources.detected_format import detected_format
from llm.data.sources.fingerprint import fingerprint
from llm.errors import DataError
from tests.llm.cleaning import jsonl

ALPACA: Json = {"instruction": "Add.", "output": "3"}
PAIR: Json = {"prompt": "Add.", "chosen": "3", "rejected": "4"}
OTHER: Json = {"ask": "Add.", "reply": "3"}


def files(path: Path, **chosen: str) -> SourceConfig:
    return SourceConfig(kind="files", path=str(path), **chosen)  # type: ignore[arg-type]


def test_the_first_known_record_says_the_format(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{\n" + jsonl([OTHER, ALPACA, PAIR]))
    assert detected_format(files(tmp_path), "chats") == "alpaca"
    assert detected_format(files(tmp_path), "chats-math.sources.1") == "alpaca"
    assert detected_format(files(tmp_path), "preferences") == "prompt_pair"
    assert detected_format(files(tmp_path), "corpus") is None
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(jsonl([PAIR])))
    assert detected_format(files(tmp_path / "b.jsonl.gz"), "preferences") == "prompt_pair"


def test_what_is_not_local_is_not_asked() -> None:
    hub = SourceConfig(kind="hub", hub_name="a/b", hub_revision="main")
    for source in (SourceConfig(), hub, SourceConfig(kind="url", url="http://x/a.jsonl")):
        assert detected_format(source, "chats") is None


def test_a_file_that_cannot_be_read_is_left_to_the_stage(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[{")
    assert detected_format(files(tmp_path), "chats") is None
    (tmp_path / "a.jsonl").write_bytes(b"{\n" * 300)
    assert detected_format(files(tmp_path / "a.jsonl"), "chats") is None


@pytest.mark.parametrize("num_records", [3, 100, 500])
def test_an_unknown_format_is_an_error_of_the_plan(tmp_path: Path, num_records: int) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([OTHER] * num_records))
    with pytest.raises(DataError) as caught:
        detected_format(files(tmp_path), "chats.sources.2")
    assert str(caught.value).startswith(
        f"a.jsonl: none of the first {min(num_records, 100)} records, from line 1 on, has a known"
        " format; found the keys ask, reply; known formats of chats: messages (messages), "
    )
    with pytest.raises(DataError, match=r"set download\.chats\.sources\.2\.format to auto$"):
        detected_format(files(tmp_path, format="alpaca"), "chats.sources.2")


def test_other_files_may_follow_a_short_one_of_an_unknown_format(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([OTHER]))
    (tmp_path / "b.jsonl").write_bytes(jsonl([ALPACA]))
    assert detected_format(files(tmp_path), "chats") is None


def test_a_format_of_another_content_is_an_error_of_the_plan(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl([ALPACA]))
    for role, record_format in (("chats", "prompt_pair"), ("corpus", "alpaca")):
        with pytest.raises(DataError, match=rf"download\.{role}\.format: found {record_format}, "):
            fingerprint(files(tmp_path, format=record_format), role, None)
    fingerprint(files(tmp_path, format="prompt_pair"), "preferences-math", None)
