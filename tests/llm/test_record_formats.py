"""Each format of chats and preference pairs, as published datasets write it, through `clean`."""

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.artifact import Json
from llm.config import SourceConfig
from llm.data.raw.conversations import UnusableError
from llm.data.raw.record_formats import (
    FORMAT_NAMES,
    RECORD_FORMATS,
    formats_of,
    keys_read,
    read_conversation,
    recognize,
)
from llm.errors import ConfigError
from llm.recipes import load_config
from tests.llm.cleaning import jsonl, run_clean

U, A, S = "user", "assistant", "system"
Said = list[tuple[str, str]]


def messages(*said: tuple[str, str], role: str = "role", text: str = "content") -> list[Json]:
    return [{role: speaker, text: words} for speaker, words in said]


def share(*said: tuple[str, str]) -> list[Json]:
    return messages(*said, role="from", text="value")


CHATS: dict[str, tuple[str, dict[str, Json], Said]] = {
    "OpenAI": (
        "messages",
        {"messages": messages((S, "Be brief."), (U, "2 + 2?"), (A, "4"), (U, "+ 1?"), (A, "5"))},
        [(S, "Be brief."), (U, "2 + 2?"), (A, "4"), (U, "+ 1?"), (A, "5")],
    ),
    "UltraChat, with the prompt again": (
        "messages",
        {"prompt": "Hello?", "prompt_id": "f0e", "messages": messages((U, "Hello?"), (A, "Hi"))},
        [(U, "Hello?"), (A, "Hi")],
    ),
    "ShareGPT": (
        "sharegpt",
        {"id": "i_0", "conversations": share(("human", "Who are you?"), ("gpt", "A model."))},
        [(U, "Who are you?"), (A, "A model.")],
    ),
    "LLaMA-Factory's ShareGPT with a system prompt": (
        "sharegpt",
        {"system": "Be kind.", "conversations": share(("human", "Hi"), ("gpt", "Hello"))},
        [(S, "Be kind."), (U, "Hi"), (A, "Hello")],
    ),
    "OpenHermes": (
        "sharegpt",
        {"conversations": share(("system", "You know."), ("human", "Why?"), ("gpt", "Because.")),
         "source": "airoboros", "skip_prompt_formatting": None},
        [(S, "You know."), (U, "Why?"), (A, "Because.")],
    ),
    "Alpaca": (
        "alpaca",
        {"instruction": "Add the numbers.", "input": "3 and 4", "output": "7",
         "text": "Below is an instruction ..."},
        [(U, "Add the numbers.\n\n3 and 4"), (A, "7")],
    ),
    "Alpaca without input": (
        "alpaca",
        {"instruction": "Say hello.", "input": "", "output": "Hello."},
        [(U, "Say hello."), (A, "Hello.")],
    ),
    "LLaMA-Factory's Alpaca": (
        "alpaca",
        {"instruction": "And now?", "output": "Three.", "system": "Count.",
         "history": [["First?", "One."], ["Then?", "Two."]]},
        [(S, "Count."), (U, "First?"), (A, "One."), (U, "Then?"), (A, "Two."), (U, "And now?"),
         (A, "Three.")],
    ),
    "prompt and response": (
        "prompt_response", {"prompt": "Name a color.", "response": "Red."},
        [(U, "Name a color."), (A, "Red.")],
    ),
    "TRL's prompt and completion": (
        "prompt_completion", {"prompt": "The sky is", "completion": " blue."},
        [(U, "The sky is"), (A, " blue.")],
    ),
    "TRL's conversational prompt and completion": (
        "prompt_completion",
        {"prompt": messages((S, "Rhyme."), (U, "Cat?")), "completion": messages((A, "Hat."))},
        [(S, "Rhyme."), (U, "Cat?"), (A, "Hat.")],
    ),
    "GSM8K": (
        "question_answer", {"question": "How many?", "answer": "It is 2 * 2 = 4.\n#### 4"},
        [(U, "How many?"), (A, "It is 2 * 2 = 4.\n#### 4")],
    ),
}  # fmt: skip

PAIRS: dict[str, tuple[str, dict[str, Json], Said, str, str]] = {
    "TRL": (
        "prompt_pair", {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        [(U, "The sky is")], " blue.", " green.",
    ),
    "TRL, conversational": (
        "prompt_pair",
        {"prompt": messages((U, "Color of the sky?")), "chosen": messages((A, "Blue.")),
         "rejected": messages((A, "Green."))},
        [(U, "Color of the sky?")], "Blue.", "Green.",
    ),
    "TRL, conversational, with an implicit prompt": (
        "implicit_pair",
        {"chosen": messages((U, "Sky?"), (A, "Up."), (U, "Color?"), (A, "Blue.")),
         "rejected": messages((U, "Sky?"), (A, "Up."), (U, "Color?"), (A, "Green."))},
        [(U, "Sky?"), (A, "Up."), (U, "Color?")], "Blue.", "Green.",
    ),
    "UltraFeedback, binarized": (
        "prompt_pair",
        {"prompt": "Why?", "prompt_id": "a1", "chosen": messages((U, "Why?"), (A, "So.")),
         "rejected": messages((U, "Why?"), (A, "No.")),
         "messages": messages((U, "Why?"), (A, "So.")), "score_chosen": 8.5, "score_rejected": 6.0},
        [(U, "Why?")], "So.", "No.",
    ),
    "Alpaca": (
        "alpaca_pair",
        {"instruction": "Add.", "input": "1 and 2", "chosen": "3", "rejected": "12"},
        [(U, "Add.\n\n1 and 2")], "3", "12",
    ),
    "Orca": (
        "question_pair",
        {"system": "You are an assistant.", "question": "Is it?", "chosen": "Yes.",
         "rejected": "Maybe."},
        [(S, "You are an assistant."), (U, "Is it?")], "Yes.", "Maybe.",
    ),
    "Orca without a system prompt": (
        "question_pair", {"system": "", "question": "It is?", "chosen": "Y", "rejected": "N"},
        [(U, "It is?")], "Y", "N",
    ),
    "LLaMA-Factory's ShareGPT": (
        "sharegpt_pair",
        {"conversations": share(("human", "Best?")), "chosen": {"from": "gpt", "value": "This."},
         "rejected": {"from": "gpt", "value": "That."}},
        [(U, "Best?")], "This.", "That.",
    ),
    "messages and answers": (
        "messages_pair", {"messages": messages((U, "Left?")), "chosen": "No.", "rejected": "Yes."},
        [(U, "Left?")], "No.", "Yes.",
    ),
}  # fmt: skip


def as_file(records: list[dict[str, Json]], suffix: str) -> bytes:
    """Write records to a file; in CSV lists and objects are JSON, as pandas users store them."""
    if suffix == ".json":
        return json.dumps(records).encode()
    if suffix == ".jsonl":
        return jsonl([*records])
    names = list(dict.fromkeys(name for record in records for name in record))
    if suffix == ".csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, names)
        writer.writeheader()
        for record in records:
            writer.writerow({
                name: value if isinstance(value, str) else json.dumps(value)
                for name, value in record.items()
            })  # fmt: skip
        return text.getvalue().encode()
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    out = io.BytesIO()
    rows = [{name: record.get(name) for name in names} for record in records]
    parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


def said(messages: Json) -> Said:
    return [(one["role"], one["content"]) for one in messages]  # type: ignore[index,union-attr]


def padded(record: dict[str, Json]) -> list[dict[str, Json]]:
    """Return the record and 80 distinct ones of its format: no side of the split is empty."""
    return [record, *(record | {"group": str(number)} | _changed(record, number)
                      for number in range(80))]  # fmt: skip


def _changed(record: dict[str, Json], number: int) -> dict[str, Json]:
    key = next(key for key in ("output", "response", "completion", "answer", "chosen", "messages",
                               "conversations") if key in record)  # fmt: skip
    value = record[key]
    if isinstance(value, str):
        return {key: f"{value} {number}"}
    one = value[-1] if isinstance(value, list) else value
    assert isinstance(one, dict)
    text = "value" if "value" in one else "content"
    last = one | {text: f"{one[text]} {number}"}
    return {key: [*value[:-1], last] if isinstance(value, list) else last}


SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", CHATS)
def test_chats_of_every_format_are_read_from_every_kind_of_file(
    tmp_path: Path, name: str, suffix: str
) -> None:
    record_format, record, expected = CHATS[name]
    if suffix == ".csv" and name == "TRL's conversational prompt and completion":
        pytest.skip("in CSV such a list is a text like others")
    assert recognize(record, formats_of("chats")) == record_format
    records = padded(record)
    summary, outputs, _ = run_clean(
        tmp_path, {f"a{suffix}": as_file(records, suffix)}, "chats", validation_fraction=0.3
    )
    assert summary["skipped"] == {} and "edited_conversations" not in summary
    assert expected in [said(chat["messages"]) for chat in outputs["train"] + outputs["validation"]]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_every_format_are_read_from_every_kind_of_file(
    tmp_path: Path, name: str, suffix: str
) -> None:
    record_format, record, prompt, chosen, rejected = PAIRS[name]
    assert recognize(record, formats_of("preferences")) == record_format
    if suffix == ".csv" and not isinstance(record["chosen"], str):
        pytest.skip("in CSV a list of messages as an answer is a text like others")
    records = padded(record)
    summary, outputs, _ = run_clean(
        tmp_path, {f"a{suffix}": as_file(records, suffix)}, "preferences", validation_fraction=0.3
    )
    assert summary["skipped"] == {}
    found = [
        (said(pair["messages"]), pair["chosen"], pair["rejected"])
        for pair in outputs["train"] + outputs["validation"]
    ]
    assert (prompt, chosen, rejected) in found


def test_every_format_has_a_fixture() -> None:
    tested = {name for name, *_ in CHATS.values()} | {name for name, *_ in PAIRS.values()}
    assert tested == set(RECORD_FORMATS)


def test_a_file_may_mix_formats_and_parquet_fills_them_with_null(tmp_path: Path) -> None:
    records = [record for _, record, _ in CHATS.values() if "history" not in record]
    records = [record for record in records if not isinstance(record.get("prompt"), list)]
    for suffix in (".jsonl", ".parquet"):
        _, outputs, _ = run_clean(
            tmp_path / suffix[1:], {f"a{suffix}": as_file(records, suffix)}, "chats",
            validation_fraction=0.5,
        )  # fmt: skip
        found = [said(chat["messages"]) for chat in outputs["train"] + outputs["validation"]]
        assert sorted(found) == sorted(
            chat for _, record, chat in CHATS.values() if record in records
        )


def test_a_format_can_be_set_where_the_first_one_is_not_meant(tmp_path: Path) -> None:
    records: list[Json] = [
        {"messages": messages((U, "x"), (A, f"long {number}")), "prompt": "x",
         "response": f"short {number}"}
        for number in range(50)
    ]  # fmt: skip
    for name, expected in (("auto", "long"), ("messages", "long"), ("prompt_response", "short")):
        _, outputs, _ = run_clean(
            tmp_path, {"a.jsonl": jsonl(records)}, "chats", record_format=name,
            validation_fraction=0.3,
        )  # fmt: skip
        assert all(said(chat["messages"])[-1][1].startswith(expected) for chat in outputs["train"])


def test_edited_conversations_are_counted(tmp_path: Path) -> None:
    records: list[Json] = []
    for number in range(50):
        records.append({"messages": messages((U, "Hi"), (A, f"Ho {number}"), (U, "And?"))})
    records.append({"messages": messages((U, "a"), (U, "b"), (A, "c"))})
    summary, _, _ = run_clean(
        tmp_path, {"a.jsonl": jsonl(records)}, "chats", validation_fraction=0.3
    )
    assert summary["edited_conversations"] == {
        "last questions cut off": 50, "messages of one role joined": 1,
    }  # fmt: skip


def test_tool_turns_are_dropped_or_become_text(tmp_path: Path) -> None:
    call: Json = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    records: list[Json] = [
        {"messages": [{"role": "user", "content": f"Add {number}."},
                      {"role": "assistant", "content": None, "tool_calls": [call]},
                      {"role": "tool", "content": f"{number + 1}"},
                      {"role": "assistant", "content": "Done."}]}
        for number in range(50)
    ]  # fmt: skip
    _, outputs, _ = run_clean(
        tmp_path, {"a.jsonl": jsonl(records)}, "chats", tool_turns="as_text",
        validation_fraction=0.3,
    )  # fmt: skip
    chat = said(outputs["train"][0]["messages"])
    assert [role for role, _ in chat] == [U, A, U, A] and json.loads(chat[1][1]) == [call]
    plain: list[Json] = [{"prompt": f"{number}", "response": "x"} for number in range(50)]
    summary, _, _ = run_clean(
        tmp_path, {"a.jsonl": jsonl(records + plain)}, "chats", validation_fraction=0.3
    )
    assert summary["skipped"] == {"tool turns": 50}


def test_only_columns_that_are_read_are_named() -> None:
    assert keys_read("chats", "alpaca") == (
        "instruction", "output", "system", "kind", "group", "input", "history",
    )  # fmt: skip
    assert set(keys_read("preferences", "prompt_pair")) == {
        "prompt", "chosen", "rejected", "system", "kind", "group",
    }  # fmt: skip
    assert "chosen" not in keys_read("chats", "auto")


def test_the_setting_takes_the_names_of_the_table() -> None:
    assert load_config("quickstart", ["download.chats.format=sharegpt"]).download.chats.format
    with pytest.raises(ConfigError, match=r"download\.chats\.format: .*did you mean sharegpt"):
        load_config("quickstart", ["download.chats.format=sharegtp"])
    assert next(iter(FORMAT_NAMES)) == SourceConfig().format == "auto"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5)
    | st.sampled_from(["user", "gpt", "tool", "system", '[{"role": "user"}]', "[" * 2000]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["role", "from", "content", "value", "tool_calls", "x"]), inner, max_size=4
    ),
    max_leaves=12,
)  # fmt: skip
KEYS = sorted({key for one in RECORD_FORMATS.values() for key in one.keys} | {"history", "input"})


@given(st.dictionaries(st.sampled_from([*KEYS, "system"]), JSON, max_size=5))
@settings(max_examples=200, deadline=None)
def test_any_record_is_a_conversation_or_unusable(record: dict[str, Json]) -> None:
    for content in ("chats", "preferences"):
        for tool_turns in ("drop", "as_text"):
            try:
                found = read_conversation(record, formats_of(content), tool_turns)  # type: ignore[arg-type]
            except UnusableError as error:
                assert str(error)
                continue
            assert all(message["content"].strip() for message in found.messages)
            is_pair = content == "preferences"
            assert found.messages[-1]["role"] == ("user" if is_pair else "assistant")
            assert bool(found.chosen.strip() and found.rejected.strip()) == is_pair
