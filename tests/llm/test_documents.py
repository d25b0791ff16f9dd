"""Reading cleaned documents: in any order, with every line checked."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.artifact import ArtifactWriter
from llm.data import open_files
from llm.data.documents import (
    DocumentReader,
    DocumentShard,
    DocumentsWriter,
    Message,
    write_documents_json,
)
from llm.errors import ArtifactError
from tests.llm.conftest import write_lines

MakeDocuments = Callable[..., Path]
IDENTIFIER = "0" * 32
TEXTS = ["one", "two\nlines", "", "漢字 <|bos|> \u2028 \0", "x" * 100]


def test_documents_are_read_in_any_order(make_documents: MakeDocuments) -> None:
    documents = DocumentReader(make_documents(TEXTS, TEXTS[:1]), "train")
    assert len(documents) == len(TEXTS)
    files = documents.path.glob("*.jsonl")
    assert documents.size_bytes == sum(path.stat().st_size for path in files)
    order = [3, 0, 4, 2, 1, 1]
    assert [document.text for document in documents.read(order)] == [TEXTS[i] for i in order]
    sizes = [document.size_bytes for document in documents.read(range(len(TEXTS)))]
    assert sum(sizes) == documents.size_bytes


@given(st.lists(st.lists(st.text(max_size=9), min_size=1), max_size=6), st.data())
def test_documents_in_many_files_are_read_as_if_in_one(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[str]], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("many")
    writer, shards = ArtifactWriter(folder), list[DocumentShard]()
    for number, texts in enumerate(parts):
        name = f"{3 * number:05}"  # shards without documents of this split have no files
        with DocumentsWriter(writer, f"train/{name}", has_sources=True) as file:
            for text in texts:
                file.add(json.dumps({"id": IDENTIFIER, "text": text}).encode() + b"\n", number)
        shards.append(DocumentShard(name=name, documents=len(texts), bytes=file.num_bytes))
    write_documents_json(writer, "text", {"train": shards, "validation": []}, len(parts) + 2)
    documents = DocumentReader(folder, "train")
    texts = [text for part in parts for text in part]
    assert len(documents) == len(texts) and len(DocumentReader(folder, "validation")) == 0
    order = data.draw(st.lists(st.integers(0, len(texts) - 1))) if texts else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_files, "MAX_OPEN_FILES", 2)
        assert [one.text for one in documents.read(order)] == [texts[place] for place in order]
    expected = [number for number, part in enumerate(parts) for _ in part]
    assert documents.source_numbers().tolist() == expected


def test_chats_are_read_with_their_messages(make_documents: MakeDocuments) -> None:
    chat = [Message(role="user", content="hi"), Message(role="assistant", content="ho")]
    (document,) = DocumentReader(make_documents([chat], []), "train").read([0])
    assert list(document.messages) == chat
    assert document.texts == ["hi", "ho"]


def test_preference_pairs_are_read_with_both_answers(tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "hi"}]
    pair = {"id": IDENTIFIER, "messages": prompt, "chosen": "ho", "rejected": "no", "kind": "k"}
    lines = {"train": [json.dumps(pair)], "validation": []}
    (document,) = DocumentReader(write_lines(tmp_path, lines, "preferences"), "train").read([0])
    assert list(document.messages) == prompt
    assert (document.chosen, document.rejected, document.kind) == ("ho", "no", "k")
    assert document.texts == ["hi", "ho", "no"]


@pytest.mark.parametrize("wrong", [{"chosen": None}, {"rejected": 3}, {"messages": []}])
def test_a_line_that_is_no_pair_is_named(tmp_path: Path, wrong: dict[str, object]) -> None:
    prompt = [{"role": "user", "content": "hi"}]
    pair = {"id": IDENTIFIER, "messages": prompt, "chosen": "ho", "rejected": "no"} | wrong
    lines = {"train": [json.dumps(pair)], "validation": []}
    with pytest.raises(ArtifactError, match=r"train/00000\.jsonl:1: not a document of preferences"):
        list(DocumentReader(write_lines(tmp_path, lines, "preferences"), "train").read([0]))


@pytest.mark.parametrize(
    "line",
    [
        "{", "3", "[]", "null", json.dumps({"id": IDENTIFIER}), json.dumps({"text": "x"}),
        json.dumps({"id": IDENTIFIER, "text": 3}), json.dumps({"id": "ab", "text": "x"}),
        json.dumps({"id": "z" * 32, "text": "x"}), json.dumps({"id": IDENTIFIER, "text": None}),
        json.dumps({"id": IDENTIFIER, "text": "a lone \ud800 surrogate"}), "\udcff\udcfe",
    ],
)  # fmt: skip
def test_a_line_that_is_no_document_is_named(tmp_path: Path, line: str) -> None:
    good = json.dumps({"id": IDENTIFIER, "text": "good"})
    folder = write_lines(tmp_path, {"train": [good, good, line], "validation": []})
    with pytest.raises(ArtifactError, match=r"train/00000\.jsonl:3: not a document of text"):
        list(DocumentReader(folder, "train").read(range(3)))


@pytest.mark.parametrize(
    "messages", [[], None, [3], [{"role": "user"}], [{"role": "user", "content": 3}]]
)
def test_a_line_that_is_no_chat_is_named(tmp_path: Path, messages: object) -> None:
    line = json.dumps({"id": IDENTIFIER, "messages": messages})
    folder = write_lines(tmp_path, {"train": [line], "validation": []}, "chats")
    with pytest.raises(ArtifactError, match=r"train/00000\.jsonl:1: not a document of chats"):
        list(DocumentReader(folder, "train").read([0]))


SHARD = {"name": "00000", "documents": 1, "bytes": 1}


@pytest.mark.parametrize(
    "data",
    [
        "", "{}", "[]", '{"content": "music"}', '{"content": "text", "train": [{}]}',
        *(json.dumps({"content": "text", "validation": [], "train": [SHARD | wrong]})
          for wrong in ({"name": "../x"}, {"name": 3}, {"documents": 1.0}, {"bytes": -1})),
    ],
)  # fmt: skip
def test_damaged_documents_json_is_named(make_documents: MakeDocuments, data: str) -> None:
    folder = make_documents(TEXTS, [])
    (folder / "documents.json").write_text(data)
    with pytest.raises(ArtifactError, match=r"documents\.json"):
        DocumentReader(folder, "train")


@pytest.mark.parametrize("name", ["documents.json", "train/00000.jsonl", "train/00000.offsets.bin"])
def test_a_file_that_is_missing_or_cut_off_is_named(
    make_documents: MakeDocuments, name: str
) -> None:
    folder = make_documents(TEXTS, [])
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-2])
    with pytest.raises(ArtifactError, match=f"{name}: "):
        DocumentReader(folder, "train")
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name}: not there"):
        DocumentReader(folder, "train")


def test_damaged_offsets_are_named(make_documents: MakeDocuments) -> None:
    folder = make_documents(TEXTS, [])
    path = folder / "train/00000.offsets.bin"
    path.write_bytes(path.read_bytes()[:8] + b"\xff" * (path.stat().st_size - 8))
    with pytest.raises(ArtifactError, match=r"offsets\.bin: line 1 begins at 0 and ends at \d+"):
        list(DocumentReader(folder, "train").read([0]))


def test_documents_of_one_source_have_no_numbers(make_documents: MakeDocuments) -> None:
    with pytest.raises(ArtifactError, match="without the source of each"):
        DocumentReader(make_documents(TEXTS, []), "train").source_numbers()
