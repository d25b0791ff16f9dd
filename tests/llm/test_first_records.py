"""Records of an unknown format: an early error that names the keys found and the known formats."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from llm.artifact import Json
from llm.data.raw.first_records import FIRST_RECORDS
from llm.errors import DataError
from llm.runtime.job import write_job
from tests.llm.cleaning import TEXTS, corpus, jsonl, make_job, run_clean

ROOT = Path(__file__).parents[2]
PAIRS: list[Json] = [{"ask": f"Say {n}.", "reply": f"{n}"} for n in range(1000)]
SHARES: list[Json] = [
    {"messages": [{"speaker": "human", "text": "Hi"}, {"speaker": "gpt", "text": f"{n}"}]}
    for n in range(1000)
]
CHATS: list[Json] = [
    {"instruction": f"Say {n}.", "output": f"The number is {n}."} for n in range(60)
]


def run_stage_as_a_process(folder: Path, data: bytes, content: str, num_workers: int) -> str:
    """Clean in a separate process, which must exit with 1, and return its error."""
    job = make_job(folder, {"a.jsonl": data}, content, num_workers, shard_bytes=4000)
    write_job(folder / "job.json", job)
    done = subprocess.run(
        [sys.executable, "-m", "llm.clean", str(folder / "job.json")],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    found = json.loads((folder / "work/error.json").read_bytes())
    assert found["type"] == "DataError"
    assert "\n" not in found["message"]
    return str(found["message"])


@pytest.mark.parametrize("num_workers", [1, 2])
def test_chats_of_other_keys_are_an_error_with_the_keys_and_the_remedy(
    tmp_path: Path, num_workers: int
) -> None:
    message = run_stage_as_a_process(tmp_path, jsonl(PAIRS), "chats", num_workers)
    assert message.startswith(
        "a.jsonl: none of the first 100 records, from line 1 on, has a known format; found the keys"
        " ask, reply; known formats of chats: messages (messages), sharegpt (conversations), alpaca"
        " (instruction, output), prompt_response (prompt, response), prompt_completion (prompt,"
        " completion), question_answer (question, answer); rename the keys in the files, with jq"
        " for example: jq -c '{prompt: .A, response: .B}'"
    )


@pytest.mark.parametrize(
    ("content", "records", "found", "expected"),
    [
        ("text", [{"content": "x", "id": 1}] * 200, "the keys content, id", "corpus.text_key"),
        ("chats", SHARES, "in its messages 'speaker', 'text'", "messages (messages)"),
        ("chats", [{"instruction": "Do."}] * 200, "the keys instruction;", "(instruction, output)"),
        ("preferences", [{"prompt": "x", "chosen": "y"}] * 200, "the keys prompt, chosen;",
         "prompt_pair (prompt, chosen, rejected), alpaca_pair (instruction, chosen, rejected)"),
    ],
)  # fmt: skip
def test_found_and_expected_keys_are_named_for_texts_and_chats(
    tmp_path: Path, content: str, records: list[Json], found: str, expected: str
) -> None:
    with pytest.raises(DataError) as caught:
        run_clean(tmp_path, {"a.jsonl": jsonl(records)}, content)
    assert found in str(caught.value) and expected in str(caught.value)


@pytest.mark.parametrize("suffix", [".csv", ".json", ".parquet"])
def test_the_keys_of_tables_and_arrays_are_said_too(tmp_path: Path, suffix: str) -> None:
    records = [{"body": text, "id": n} for n, text in enumerate(TEXTS)]
    data = json.dumps(records).encode()
    if suffix == ".csv":
        data = "\n".join(["body,id", *(f"{r['body']},{r['id']}" for r in records)]).encode()
    if suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        table = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(records), table)
        data = table.getvalue()
    with pytest.raises(
        DataError, match=rf"a\{suffix}: .* found the keys body, id; expected 'text'"
    ):
        run_clean(tmp_path, {f"a{suffix}": data})


def test_of_several_sources_the_setting_of_the_one_is_named(tmp_path: Path) -> None:
    job = make_job(tmp_path, {"a.jsonl": corpus(TEXTS)})
    raw = Path(job.inputs["raw"])
    other = tmp_path / "other"
    (other / "files").mkdir(parents=True)
    (other / "source.json").write_bytes((raw / "source.json").read_bytes())
    (other / "files/b.jsonl").write_bytes(jsonl([{"body": text} for text in TEXTS]))
    job.inputs = {"raw_0": str(raw), "raw_1": str(other)}
    write_job(tmp_path / "job.json", job)
    subprocess.run(
        [sys.executable, "-m", "llm.clean", str(tmp_path / "job.json")],
        cwd=ROOT, capture_output=True, check=False, timeout=120,
    )  # fmt: skip
    message = json.loads((tmp_path / "work/error.json").read_bytes())["message"]
    assert message.startswith("1/b.jsonl: ") and "download.corpus.sources.1.text_key" in message


@pytest.mark.parametrize("num_bad", [1, FIRST_RECORDS - 1])
def test_a_few_such_records_are_counted_wherever_they_stand(tmp_path: Path, num_bad: int) -> None:
    bad = PAIRS[:num_bad]
    for name, records in {"first": [*bad, *CHATS], "last": [*CHATS, *PAIRS]}.items():
        summary, outputs, _ = run_clean(
            tmp_path / name, {"a.jsonl": jsonl(records)}, "chats", validation_fraction=0.3
        )
        assert summary["skipped"] == {"missing key": len(records) - len(CHATS)}
        assert outputs["rejected"][0]["excerpt"].startswith("the keys ask, reply: {")


def test_records_without_the_keys_of_the_format_that_is_set_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        run_clean(tmp_path, {"a.jsonl": jsonl([*CHATS, *CHATS])}, "chats", record_format="messages")
    assert "known formats of chats: messages (messages); rename" in str(caught.value)
    assert str(caught.value).endswith("or set download.chats.format to auto")


def test_a_small_file_of_such_records_alone_is_said_at_the_end(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        run_clean(tmp_path, {"a.jsonl": jsonl(PAIRS[:7])}, "chats")
    assert str(caught.value).startswith(
        "of 7 documents 0 are left (skipped: 7 missing key, the first in a.jsonl line 1); found the"
        " keys ask, reply; known formats of chats: messages (messages), "
    )
