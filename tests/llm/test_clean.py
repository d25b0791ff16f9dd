"""Cleaning: every document is used once or counted with its reason, and never changes sides."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.artifact import Json, load_artifact
from llm.data.documents import SPLITS
from llm.errors import DataError
from llm.runtime.job import Job, write_job
from tests.llm.cleaning import TEXTS, corpus, jsonl, run_clean, texts_of
from tests.llm.nasty_records import CHATS, NASTY, NOT_CLOSED, PREFERENCES

SHARED_DATA = Path(__file__).parents[2] / "../shared/data"


def test_each_document_comes_once_with_the_hash_of_its_content_as_id(tmp_path: Path) -> None:
    summary, outputs, _ = run_clean(tmp_path, {"a.jsonl": corpus(TEXTS), "b.jsonl": corpus(TEXTS)})
    documents = outputs["train"] + outputs["validation"]
    assert sorted(str(document["text"]) for document in documents) == sorted(TEXTS)
    for document in documents:
        data = str(document["text"]).encode()
        assert document["id"] == hashlib.sha256(data).hexdigest()[:32]
    assert summary["skipped"] == {"duplicate": 200}
    assert summary["train_bytes"] == sum(len(text) for text in texts_of(outputs["train"]))


def test_the_split_is_the_hash_below_the_fraction(tmp_path: Path) -> None:
    _, outputs, _ = run_clean(tmp_path, {"a.jsonl": corpus(TEXTS)}, validation_fraction=0.3)
    expected = {
        text for text in TEXTS
        if int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64 < 0.3
    }  # fmt: skip
    assert texts_of(outputs["validation"]) == expected
    assert 30 < len(expected) < 90


def test_more_data_moves_no_document_to_the_other_side(tmp_path: Path) -> None:
    _, few, _ = run_clean(tmp_path / "few", {"a.jsonl": corpus(TEXTS[:100])})
    _, many, _ = run_clean(tmp_path / "many", {"a.jsonl": corpus(TEXTS[::-1])})
    assert texts_of(few["validation"]) <= texts_of(many["validation"])
    assert texts_of(few["train"]) <= texts_of(many["train"])


def test_a_tail_split_cuts_the_end_of_every_text_by_characters(tmp_path: Path) -> None:
    texts = ["0123456789é" * 10, "漢" * 20, "x"]
    summary, outputs, _ = run_clean(
        tmp_path, {"a.jsonl": corpus(texts)}, split="tail", validation_fraction=0.1
    )
    ends = [99, 18, 0]
    pairs = list(zip(texts, ends, strict=True))
    assert texts_of(outputs["train"]) == {text[:end] for text, end in pairs if end}
    assert texts_of(outputs["validation"]) == {text[end:] for text, end in pairs}
    assert summary["read_documents"] == 5


def test_the_same_files_give_the_same_digest(tmp_path: Path) -> None:
    files = {"b/a.txt": b"Some text.\n\nMore.\n" * 99, "a.jsonl": corpus(TEXTS) + b"{\n\xff\n"}
    digests = {run_clean(tmp_path / str(go), files)[2] for go in range(3)}
    assert len(digests) == 1


def test_text_files_are_cut_and_joined_again_give_their_text(tmp_path: Path) -> None:
    text = "".join(f"Paragraph {number} of a long story.\n\n" for number in range(500))
    summary, outputs, _ = run_clean(tmp_path, {"a.txt": text.encode()}, text_document_bytes=400)
    documents = outputs["train"] + outputs["validation"]
    assert summary["read_documents"] == len(documents) > 30
    pieces = sorted(texts_of(documents), key=text.index)
    assert "".join(pieces) == text


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_every_nasty_record_is_used_or_counted_with_file_and_line(
    tmp_path: Path, name: str
) -> None:
    good = corpus(TEXTS).splitlines()
    nasty = NASTY | NOT_CLOSED if name == "a.jsonl" else NASTY  # NOT_CLOSED would swallow an array
    data = (
        b"\n".join([*good, *nasty]) if name == "a.jsonl" else b"[%s]" % b",\n".join([*good, *nasty])
    )
    summary, outputs, _ = run_clean(tmp_path, {name: data})
    reasons = [reason for reason in nasty.values() if reason]
    assert summary["skipped"] == {reason: reasons.count(reason) for reason in sorted(set(reasons))}
    assert summary["read_documents"] == len(TEXTS) + len(nasty)
    assert summary["num_decode_errors"] == 3
    kept = texts_of(outputs["train"] + outputs["validation"])
    assert {"nul \0 stays", "\ufffd\ufffd", "half \ufffd a pair", "a pair \U0001f600"} <= kept
    assert [example["reason"] for example in outputs["rejected"]] == reasons
    assert {example["file"] for example in outputs["rejected"]} == {name}
    lines = [len(TEXTS) + 1 + index for index, reason in enumerate(nasty.values()) if reason]
    assert [example["line"] for example in outputs["rejected"]] == lines


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_bytes_that_are_no_utf8_follow_the_policy(tmp_path: Path, name: str) -> None:
    good = b"\n\n".join(text.encode() for text in TEXTS) + b"\n\n"
    bad = b"bad \xff\xc3( one\n\n"
    files = {
        name: good + bad * 3 if name == "a.txt" else corpus(TEXTS) + b'{"text": "\xff\xc3("}\n'
    }
    chosen: dict[str, Json] = {"text_document_bytes": 40}
    num_errors = 6 if name == "a.txt" else 2
    summary, _, _ = run_clean(tmp_path, files, decode_errors="replace", **chosen)
    assert summary["num_decode_errors"] == num_errors
    summary, outputs, _ = run_clean(tmp_path, files, decode_errors="skip", **chosen)
    assert summary["num_decode_errors"] == num_errors
    assert outputs["rejected"][0]["reason"] == "invalid UTF-8"
    assert not any("\ufffd" in text for text in texts_of(outputs["train"] + outputs["validation"]))
    offset = files[name].index(b"\xff")
    line = files[name][:offset].count(b"\n") + 1
    with pytest.raises(DataError, match=rf"{name}: byte {offset} \(line {line}\)"):
        run_clean(tmp_path, files, decode_errors="strict", **chosen)


def test_half_a_surrogate_pair_is_an_error_when_strict(tmp_path: Path) -> None:
    files = {"a.jsonl": corpus(TEXTS) + b'{"text": "\\udc80"}'}
    with pytest.raises(DataError, match=r"a\.jsonl: line 201 holds half a surrogate pair"):
        run_clean(tmp_path, files, decode_errors="strict")


def test_a_byte_order_mark_is_no_text_and_utf16_is_refused(tmp_path: Path) -> None:
    files = {"a.jsonl": b"\xef\xbb\xbf" + corpus(TEXTS), "b.txt": b"\xef\xbb\xbfWords."}
    summary, outputs, _ = run_clean(tmp_path, files)
    assert summary["skipped"] == {}
    assert texts_of(outputs["train"] + outputs["validation"]) == {*TEXTS, "Words."}
    with pytest.raises(DataError, match=r"c\.txt: this is UTF-16"):
        run_clean(tmp_path, {"c.txt": "Words".encode("utf-16")})


def test_every_preference_pair_is_used_or_counted(tmp_path: Path) -> None:
    many: list[Json] = [{"prompt": text, "chosen": "Yes.", "rejected": "No."} for text in TEXTS]
    records = [*many, *(record for record, _ in PREFERENCES.values())]
    summary, outputs, _ = run_clean(tmp_path, {"a.jsonl": jsonl(records)}, "preferences")
    reasons = [reason for _, reason in PREFERENCES.values() if reason]
    assert summary["skipped"] == {reason: reasons.count(reason) for reason in sorted(set(reasons))}
    lines = {reason: number for number, (_, reason) in enumerate(PREFERENCES.values(), 201)}
    for example in outputs["rejected"]:
        assert example["file"] == "a.jsonl" and int(str(example["line"])) <= 200 + len(PREFERENCES)
    last = {str(example["reason"]): example["line"] for example in outputs["rejected"]}
    assert last == {reason: line for reason, line in lines.items() if reason}
    pairs = outputs["train"] + outputs["validation"]
    assert len(pairs) == len(records) - len(reasons)
    for pair in pairs:
        assert set(pair) == {"id", "messages", "chosen", "rejected", "kind"}
        assert pair["kind"] == "preference"
    assert {(pair["chosen"], pair["rejected"]) for pair in pairs} >= {
        ("This.", "That."), ("a", "b"), *((str(n), str(n + 1)) for n in (1, 3, 5, 7, 9)),
    }  # fmt: skip


def test_the_pairs_of_one_prompt_stay_on_one_side(tmp_path: Path) -> None:
    records: list[Json] = [
        {"prompt": text, "chosen": f"Yes, {number}.", "rejected": "No."}
        for text in TEXTS
        for number in range(3)
    ]
    _, outputs, _ = run_clean(
        tmp_path, {"a.jsonl": jsonl(records)}, "preferences", validation_fraction=0.2
    )
    prompts = [{json.dumps(pair["messages"]) for pair in outputs[side]} for side in SPLITS]
    assert not prompts[0] & prompts[1] and len(prompts[0]) + len(prompts[1]) == len(TEXTS)
    assert 20 < len(prompts[1]) < 60


def test_every_chat_is_used_or_counted(tmp_path: Path) -> None:
    many = [{"instruction": text, "output": "Yes."} for text in TEXTS]
    data = jsonl([*many, *(record for record, _ in CHATS.values())])
    summary, outputs, _ = run_clean(tmp_path, {"a.jsonl": data}, "chats")
    reasons = [reason for _, reason in CHATS.values() if reason]
    assert summary["skipped"] == {reason: reasons.count(reason) for reason in sorted(set(reasons))}
    chats = [chat["messages"] for chat in outputs["train"] + outputs["validation"]]
    for question in ("Do.\n\nthis", "Do it.", "Do that."):
        assert [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "Done."},
        ] in chats
    assert {chat["kind"] for chat in outputs["train"]} == {"chat"}


def test_chats_of_one_group_stay_on_one_side(tmp_path: Path) -> None:
    records: list[Json] = [
        {"instruction": f"{text} {number}", "output": "Yes.", "kind": text, "group": text}
        for text in TEXTS
        for number in range(3)
    ]
    _, outputs, _ = run_clean(
        tmp_path, {"a.jsonl": jsonl(records)}, "chats", validation_fraction=0.2
    )
    sides = [{chat["kind"] for chat in outputs[side]} for side in ("train", "validation")]
    assert not sides[0] & sides[1] and len(sides[0]) + len(sides[1]) == len(TEXTS)
    assert 20 < len(sides[1]) < 60


@pytest.mark.parametrize("texts", [[], TEXTS[:1], ["  "] * 9])
def test_an_empty_side_is_an_error_with_the_counts(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(DataError, match=rf"of {len(texts)} documents .*validation_fraction"):
        run_clean(tmp_path, {"a.jsonl": corpus(texts)})


@given(st.binary(max_size=300), st.sampled_from(["a.txt", "a.jsonl", "a.json"]),
       st.sampled_from(["text", "chats", "preferences"]))  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_counted_or_refused_by_a_typed_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str, content: str
) -> None:
    if content != "text" and name == "a.txt":
        return
    many: list[Json] = [
        {"text": text, "instruction": text, "output": "Yes.", "chosen": "a", "rejected": "b"}
        for text in TEXTS
    ]
    try:
        run_clean(tmp_path_factory.mktemp("any"), {name: data, "z.jsonl": jsonl(many)}, content)
    except DataError as error:
        assert "a.json" in str(error) or "UTF-16" in str(error)


def test_a_line_without_end_is_counted_in_bounded_memory(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    (raw / "files").mkdir(parents=True)
    source = {"kind": "files", "content": "text", "text_key": "text", "format": "auto"}
    (raw / "source.json").write_text(json.dumps(source))
    (raw / "files/a.jsonl").write_bytes(corpus(TEXTS))
    for name in ("b.jsonl", "c.json"):
        with (raw / "files" / name).open("wb") as file:
            file.write(b'[{"text": "' if name == "c.json" else b'{"text": "')
            file.truncate(1 << (30 if name == "b.jsonl" else 28))  # sparse: takes no disk
            file.seek(0, os.SEEK_END)
            file.write(b'"}]' if name == "c.json" else b'"}\n')
    job = Job(
        stage="clean", inputs={"raw": str(raw)}, settings={}, out=tmp_path / "out",
        work=tmp_path / "work",
    )  # fmt: skip
    write_job(tmp_path / "job.json", job)
    # VmHWM is the peak of this process image; ru_maxrss starts at the parent's
    code = (
        "from llm.clean import clean; from llm.runtime.job import run_job; run_job(clean);"
        "print(*(line.split()[1] for line in open('/proc/self/status') if 'VmHWM' in line))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "job.json")], capture_output=True, text=True,
        cwd=Path(__file__).parents[2], check=True,
    )  # fmt: skip
    assert load_artifact(job.out).summary["skipped"] == {"longer than 12 MiB": 2}
    assert int(run.stdout) * 1024 < 200e6


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs the data to try the project on")
def test_shakespeare_is_cut_without_loss_and_the_instructions_are_all_read(tmp_path: Path) -> None:
    text = (SHARED_DATA / "tinyshakespeare.txt").read_bytes()
    summary, outputs, _ = run_clean(
        tmp_path / "text", {"a.txt": text}, text_document_bytes=4096, validation_fraction=0.1
    )
    assert summary["skipped"] == {}
    documents = texts_of(outputs["train"] + outputs["validation"])
    assert "".join(sorted(documents, key=text.decode().index)) == text.decode()
    chats = (SHARED_DATA / "instruction-data.json").read_bytes()
    summary, outputs, _ = run_clean(tmp_path / "chats", {"a.json": chats}, "chats")
    assert summary["read_documents"] == 1100
    assert set(summary["skipped"]) <= {"duplicate"}  # type: ignore[arg-type]
    assert "edited_conversations" not in summary
