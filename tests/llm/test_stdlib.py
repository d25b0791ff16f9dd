"""The standard library source: complete, deterministic, without duplicates or imports."""

import ast
import inspect
import json
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from llm.data.sources import stdlib
from llm.data.sources.stdlib import (
    MAX_DOCUMENT_BYTES,
    Module,
    SeenTexts,
    corpus_documents,
    cut_lines,
    library_files,
    page_documents,
    read_modules,
    source_documents,
    topic_documents,
)
from llm.data.sources.stdlib_chats import (
    FROM_MEMORY,
    MAX_ANSWER_CHARACTERS,
    chat_records,
    preference_records,
)
from llm.errors import DataError
from tests.llm.cleaning import jsonl, run_clean

SOURCE = '''\
"""Do a thing.

At length.
"""

import os

# about the table
TABLE = {1: 2}


@decorated
def outer(a, b=1, *rest, c="x", **more):
    """Say outer."""

    def inner():
        r"""Say inner."""
    return inner  # "not a docstring"


class Thing(Base, metaclass=Meta):
    \'\'\'Be a thing.

        Indented.
    \'\'\'

    async def method(self, é, /): "Say método."; x = "ü"

    def plain(self):
        return """no docstring"""


class Empty(Exception):
    """Nothing else."""


if os:
    def conditional(): """Say conditional."""
'''


def module(source: str = SOURCE) -> Module:
    return Module(name="a.b", path="a/b.py", source=source, tree=ast.parse(source))


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return list(corpus_documents())


@pytest.fixture(scope="module")
def chats() -> list[dict[str, object]]:
    return [json.loads(json.dumps(record)) for record in chat_records()]


def test_a_source_loses_its_docstrings_and_nothing_else() -> None:
    [text] = source_documents(module(), SeenTexts(1))
    assert text.startswith("# a/b.py\n")
    assert "Say" not in text and "thing." not in text and "Nothing" not in text
    expected = ast.parse(SOURCE)
    for node in ast.walk(expected):
        if isinstance(node, stdlib.Definition | ast.Module) and ast.get_docstring(node):
            alone = [] if isinstance(node, ast.Module) else [ast.Pass()]
            node.body = node.body[1:] or alone
            if isinstance(node, ast.AsyncFunctionDef):
                node.body.insert(0, ast.Pass())  # its docstring shared a line
    assert ast.dump(ast.parse(text)) == ast.dump(expected)
    for line in ("# about the table", "@decorated", '    return inner  # "not a docstring"'):
        assert f"\n{line}\n" in text


def test_a_page_tells_every_docstring_under_its_signature() -> None:
    [page] = page_documents(module(), SeenTexts(1))
    assert page == textwrap.dedent("""\
        Help on module a.b:

        Do a thing.

        At length.

        def outer(a, b=1, *rest, c='x', **more)
            Say outer.

        class Thing(Base, metaclass=Meta)
            Be a thing.

            Indented.

            async def method(self, é, /)
                Say método.

        class Empty(Exception)
            Nothing else.

        def conditional()
            Say conditional.
        """)


def test_long_modules_are_cut_between_definitions() -> None:
    function = "# about it\ndef function_{0}(x):\n    return x + {0}\n\n\n"
    source = "".join(function.format(number) for number in range(2000))
    pieces = list(source_documents(module(source), SeenTexts(10**6)))
    assert len(pieces) > 3
    assert all(len(piece.encode()) <= MAX_DOCUMENT_BYTES for piece in pieces)
    assert all(piece.startswith("# a/b.py\n# about it\ndef") for piece in pieces)
    bodies = [piece.removeprefix("# a/b.py\n") for piece in pieces]
    assert ast.dump(ast.parse("".join(bodies))) == ast.dump(ast.parse(source))


def test_tables_and_repeated_definitions_are_left_out() -> None:
    function = "def f():\n    return '" + "x" * 300 + "'\n"
    table = "TABLE = {" + ", ".join(f"{key}: 'value'" for key in range(2000)) + "}\n"
    seen = SeenTexts(200)
    [first] = source_documents(module(function + table + "x = 1\n"), seen)
    assert first == f"# a/b.py\n{function}x = 1\n"
    assert list(source_documents(module(function), seen)) == []


def test_a_line_longer_than_a_document_is_kept_whole() -> None:
    assert list(cut_lines([(0, "a\n"), (0, "x" * 50 + "\n"), (2, "b\n")], 10)) == [
        "a\n", "x" * 50 + "\n", "b\n",
    ]  # fmt: skip


def test_topics_share_no_paragraph() -> None:
    part = "This paragraph is in two topics, word for word.\n"
    topics = {"if": part, "compound": f"Compound\n\n{part}\n\nMore of it.", "other": "Another one."}
    texts = list(topic_documents(ast.parse(f"topics = {topics!r}")))
    assert texts == [f"Compound\n\n{part}\n\nMore of it.\n", "Another one.\n"]


def test_the_corpus_is_of_the_size_and_kinds_that_were_promised(documents: list[str]) -> None:
    assert 6e6 < sum(len(text.encode()) for text in documents) < 16e6
    assert len(documents) > 800
    assert max(len(text.encode()) for text in documents) <= MAX_DOCUMENT_BYTES
    pages = [text for text in documents if text.startswith("Help on module ")]
    sources = [text for text in documents if re.match(r"# \S+\.py\n", text)]
    assert len(pages) > 200 and len(sources) > 400
    assert any(text.startswith('The "assert" statement') for text in documents)
    assert not any("lone_test_case" in text for text in sources)


def test_no_docstring_of_the_library_is_in_two_documents(documents: list[str]) -> None:
    text = "\n".join(re.sub(r"\s+", " ", document) for document in documents)
    long = {
        re.sub(r"\s+", " ", docstring)
        for name in ("json.decoder", "textwrap", "argparse", "collections.__init__")
        for docstring in _docstrings(name)
        if len(docstring) > 200
    }
    assert len(long) > 20
    assert {docstring: text.count(docstring) for docstring in long} == dict.fromkeys(long, 1)


def _docstrings(name: str) -> list[str]:
    path = dict(library_files())[name.replace(".", "/") + ".py"]
    nodes = ast.walk(ast.parse(path.read_bytes()))
    owners = (node for node in nodes if isinstance(node, stdlib.Definition | ast.Module))
    return [docstring for node in owners if (docstring := ast.get_docstring(node))]


@pytest.mark.slow
def test_the_corpus_is_the_same_twice(documents: list[str]) -> None:
    assert list(corpus_documents()) == documents


def test_nothing_of_the_library_is_imported_by_reading_it() -> None:
    before = set(sys.modules)
    for read in read_modules():
        assert read.name not in ("antigravity.x", "test")
    assert set(sys.modules) - before <= {"idna"}
    assert "antigravity" not in sys.modules and "this" not in sys.modules


def test_a_python_without_its_source_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match="no standard library source"):
        library_files()
    (tmp_path / "test").mkdir()
    (tmp_path / "test/x.py").write_text("x = 1")
    (tmp_path / "alone.py").write_text('"""Docs."""\nx = 1\n')
    assert [name for name, _ in library_files()] == ["alone.py"]
    assert list(corpus_documents()) == ["Help on module alone:\n\nDocs.\n", "# alone.py\nx = 1\n"]


def test_chats_are_many_short_and_mostly_answerable(chats: list[dict[str, object]]) -> None:
    kinds = Counter(str(chat["kind"]) for chat in chats)
    assert 20_000 < len(chats) < 60_000
    answerable = sum(count for kind, count in kinds.items() if kind not in FROM_MEMORY)
    assert answerable / len(chats) == pytest.approx(0.7, abs=0.01)
    assert min(kinds.values()) > 500
    questions = [_question(chat) for chat in chats]
    assert len(set(questions)) == len(questions)
    assert all(0 < len(_answer(chat)) <= MAX_ANSWER_CHARACTERS for chat in chats)


def test_answers_equal_those_of_inspect(chats: list[dict[str, object]]) -> None:
    num_checked = Counter[str]()
    for chat in chats[::7]:
        asked = re.search(r"`((\w+)\(.*\))`", _question(chat))
        if asked is None or (parameters := _parameters(asked[1])) is None:
            continue
        kind, names, found = str(chat["kind"]), list(parameters), _answer(chat)
        if kind == "default":
            about = re.findall(r"`(\w+)`", _question(chat))[0]
            default = parameters[about]
            assert callable(default) or eval(found, {}) == default
        else:
            expected = {
                "name": asked[2],
                "parameters": ", ".join(names) or "none",
                "first_parameter": names[0] if names else None,
                "last_parameter": names[-1] if names else None,
            }
            assert found == expected[kind]
        num_checked[kind] += 1
    assert len(num_checked) == 5 and num_checked.total() > 1000


def _parameters(text: str) -> dict[str, object] | None:
    """Return the defaults by name, starred; None where a default needs its module."""
    space: dict[str, Callable[..., object]] = {}
    try:
        exec(f"def {text}: pass", {}, space)
    except (NameError, AttributeError):
        return None
    [function] = space.values()
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    found = inspect.signature(function).parameters.values()
    return {stars.get(one.kind, "") + one.name: one.default for one in found}


def _question(chat: dict[str, object]) -> str:
    return chat["messages"][0]["content"]  # type: ignore[index]


def _answer(chat: dict[str, object]) -> str:
    return chat["messages"][1]["content"]  # type: ignore[index]


def test_all_questions_on_one_signature_have_one_group(chats: list[dict[str, object]]) -> None:
    for chat in chats:
        if asked := re.search(r"`(\w+\(.*\))`", _question(chat)):
            assert chat["group"] == asked[1]
        if chat["kind"] == "signature":
            assert _answer(chat) == chat["group"]


def test_pairs_have_the_right_answer_of_a_chat_and_a_wrong_one(
    chats: list[dict[str, object]],
) -> None:
    pairs = list(preference_records())
    assert len(pairs) > 15_000
    assert pairs == list(preference_records()), "the same twice"
    assert {pair["kind"] for pair in pairs} == {
        "parameters", "first_parameter", "last_parameter", "default", "name",
    }  # fmt: skip
    right = {_question(chat): (_answer(chat), chat["group"], chat["kind"]) for chat in chats}
    for pair in pairs:
        assert right[str(pair["prompt"])] == (pair["chosen"], pair["group"], pair["kind"])
        assert 0 < len(str(pair["rejected"]).strip()) <= MAX_ANSWER_CHARACTERS
        assert pair["rejected"] != pair["chosen"]


def test_wrong_answers_come_from_the_signature() -> None:
    pairs = list(preference_records())
    for pair in pairs[::5]:
        asked, rejected = str(pair["group"]), str(pair["rejected"])
        if pair["kind"] in ("name", "first_parameter", "last_parameter"):
            assert rejected in asked
        if pair["kind"] == "parameters" and rejected not in ("none", "self"):
            chosen = str(pair["chosen"]).split(", ")
            assert set(rejected.split(", ")) <= set(chosen)


def test_the_pairs_of_a_held_out_function_are_held_out(tmp_path: Path) -> None:
    """Chats and pairs are split by the same group, so both sides agree on every function."""
    chats, pairs = list(chat_records())[:2000], list(preference_records())[:2000]
    sides: dict[str, set[str]] = {"train": set(), "validation": set()}
    for content, records in (("chats", chats), ("preferences", pairs)):
        group_of = {
            str(record["prompt"] if content == "preferences" else _question(record)):
            str(record["group"]) for record in records
        }  # fmt: skip
        _, outputs, _ = run_clean(tmp_path / content, {"a.jsonl": jsonl([*records])}, content)
        for side, groups in sides.items():
            groups |= {group_of[_question(document)] for document in outputs[side]}
    assert not sides["train"] & sides["validation"]
    assert len(sides["validation"]) > 10
