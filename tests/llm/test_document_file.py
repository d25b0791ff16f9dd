"""Reading the documents that `clean` left: any order, and no line believed unchecked."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llm.data import document_file
from llm.data.document_file import DocumentFile, Message
from llm.errors import ArtifactError

MakeDocuments = Callable[..., Path]
TEXTS = ["one", "two\nlines", "", "漢字 <|bos|> \u2028 \0", "x" * 100]


def test_documents_are_read_in_any_order(make_documents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_file, "SCAN_BYTES", 7)  # lines over many blocks
    documents = DocumentFile(make_documents(TEXTS, TEXTS[:1]), "train")
    assert len(documents) == len(TEXTS)
    assert documents.size_bytes == documents.path.stat().st_size
    order = [3, 0, 4, 2, 1, 1]
    assert [document.text for document in documents.read(order)] == [TEXTS[i] for i in order]
    sizes = [document.size_bytes for document in documents.read(range(len(TEXTS)))]
    assert sum(sizes) == documents.size_bytes


def test_a_last_line_without_an_end_counts(make_documents: MakeDocuments) -> None:
    folder = make_documents(TEXTS, [])
    path = folder / "train.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert [document.text for document in DocumentFile(folder, "train").read([4])] == TEXTS[4:]
    assert len(DocumentFile(folder, "validation")) == 0


def test_chats_are_read_with_their_messages(make_documents: MakeDocuments) -> None:
    chat = [Message(role="user", content="hi"), Message(role="assistant", content="ho")]
    (document,) = DocumentFile(make_documents([chat], []), "train").read([0])
    assert list(document.messages) == chat
    assert document.texts == ["hi", "ho"]


IDENTIFIER = "0" * 32


@pytest.mark.parametrize(
    "line",
    [
        "{", "3", "[]", "null", json.dumps({"id": IDENTIFIER}), json.dumps({"text": "x"}),
        json.dumps({"id": IDENTIFIER, "text": 3}), json.dumps({"id": "ab", "text": "x"}),
        json.dumps({"id": "z" * 32, "text": "x"}), json.dumps({"id": IDENTIFIER, "text": None}),
        json.dumps({"id": IDENTIFIER, "text": "a lone \ud800 surrogate"}), "\xff\xfe",
    ],
)  # fmt: skip
def test_a_line_that_is_no_document_is_named(make_documents: MakeDocuments, line: str) -> None:
    folder = make_documents(TEXTS[:2], [])
    with (folder / "train.jsonl").open("ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    with pytest.raises(ArtifactError, match=r"train\.jsonl:3: no document of kind text"):
        list(DocumentFile(folder, "train").read(range(3)))


@pytest.mark.parametrize(
    "messages", [[], None, [3], [{"role": "user"}], [{"role": "user", "content": 3}]]
)
def test_a_line_that_is_no_chat_is_named(make_documents: MakeDocuments, messages: object) -> None:
    folder = make_documents([[Message(role="user", content="hi")]], [])
    with (folder / "train.jsonl").open("a") as file:
        file.write(json.dumps({"id": IDENTIFIER, "messages": messages}) + "\n")
    with pytest.raises(ArtifactError, match=r"train\.jsonl:2: no document of kind chats"):
        list(DocumentFile(folder, "train").read([1]))


@pytest.mark.parametrize("data", ["", "{}", "[]", '{"content": "music"}'])
def test_damaged_documents_json_is_named(make_documents: MakeDocuments, data: str) -> None:
    folder = make_documents(TEXTS, [])
    (folder / "documents.json").write_text(data)
    with pytest.raises(ArtifactError, match=r"documents\.json"):
        DocumentFile(folder, "train")


@pytest.mark.parametrize("name", ["documents.json", "train.jsonl"])
def test_a_missing_file_is_named(make_documents: MakeDocuments, name: str) -> None:
    folder = make_documents(TEXTS, [])
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name}: not there"):
        DocumentFile(folder, "train")
