"""Formats of chats and preference pairs in records: which keys hold which part.

A record is of the first format in the table whose keys it all has. The value of a key is a text, a
message or a list of messages, whose role is under `role` or `from` and whose text under `content`
or `value`; in a CSV file a list is its JSON. null counts as absent. Settings read the table, so
importing it is light.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from llm.artifact import Json
from llm.data.content import Content
from llm.data.raw.conversations import (
    Conversation,
    ToolTurns,
    Turn,
    UnusableError,
    make_chat,
    make_pair,
    role_of,
)

AUTO = "auto"
MISSING_KEY, WRONG_TYPE = "missing key", "wrong type"
INSTRUCTION, INPUT, HISTORY = "instruction", "input", "history"
"""Alpaca's prompt, the text it is about, and earlier (question, answer) pairs."""
OPTIONAL = ("system", "kind", "group")
"""Keys of any format: the system prompt, the category, what stays on one side of the split."""
MESSAGE_LISTS = ("messages", "conversations")
ROLE_KEYS, TEXT_KEYS = ("role", "from"), ("content", "value")
CALL_KEYS = ("tool_calls", "function_call")
PAIR = ("chosen", "rejected")


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordFormat:
    """Where the parts of a conversation are in a record."""

    content: Content
    prompt: str = ""
    """Key of the prompt, or of the whole chat; empty where the answers repeat the prompt."""
    answers: tuple[str, ...] = ()
    """Keys of the answers after the prompt."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that a record needs."""
        return (self.prompt, *self.answers) if self.prompt else self.answers

    def fits(self, record: Mapping[str, Json]) -> bool:
        """Return whether a record has the keys, and its first messages have a role."""
        values = [record.get(key) for key in self.keys]
        if any(value is None for value in values):
            return False
        if not self.prompt and not all(isinstance(value, list) for value in values):
            return False  # without a prompt, texts do not say where the answer begins
        return all(_has_role(value) for value in values)


RECORD_FORMATS = {
    "messages": RecordFormat(content="chats", prompt="messages"),
    "sharegpt": RecordFormat(content="chats", prompt="conversations"),
    "alpaca": RecordFormat(content="chats", prompt=INSTRUCTION, answers=("output",)),
    "prompt_response": RecordFormat(content="chats", prompt="prompt", answers=("response",)),
    "prompt_completion": RecordFormat(content="chats", prompt="prompt", answers=("completion",)),
    "question_answer": RecordFormat(content="chats", prompt="question", answers=("answer",)),
    "prompt_pair": RecordFormat(content="preferences", prompt="prompt", answers=PAIR),
    "alpaca_pair": RecordFormat(content="preferences", prompt=INSTRUCTION, answers=PAIR),
    "question_pair": RecordFormat(content="preferences", prompt="question", answers=PAIR),
    "messages_pair": RecordFormat(content="preferences", prompt="messages", answers=PAIR),
    "sharegpt_pair": RecordFormat(content="preferences", prompt="conversations", answers=PAIR),
    "implicit_pair": RecordFormat(content="preferences", answers=PAIR),
}
"""In the order of recognition. TRL's conversational form is `prompt_pair` with lists of messages,
and `implicit_pair` where both answers repeat the prompt.
"""
FORMAT_NAMES = dict.fromkeys((AUTO, *RECORD_FORMATS))
"""The values of the setting."""


def formats_of(content: Content, name: str = AUTO) -> dict[str, RecordFormat]:
    """Return the formats that records of a content are compared with: all, or the named one."""
    return {
        known: layout
        for known, layout in RECORD_FORMATS.items()
        if layout.content == content and name in (AUTO, known)
    }


def recognize(record: Mapping[str, Json], formats: Mapping[str, RecordFormat]) -> str:
    """Return the name of the first format that fits a record, or ""."""
    return next((name for name, layout in formats.items() if layout.fits(record)), "")


def keys_read(content: Content, name: str) -> tuple[str, ...]:
    """Return the keys that are read from records of chats or preferences."""
    formats = formats_of(content, name).values()
    found = [*(key for one in formats for key in one.keys), *OPTIONAL]
    return tuple(dict.fromkeys([*found, INPUT, HISTORY] if INSTRUCTION in found else found))


def read_conversation(
    record: Mapping[str, Json], formats: Mapping[str, RecordFormat], tool_turns: ToolTurns
) -> Conversation:
    """Return the chat or the preference pair in a record.

    Raises:
        UnusableError: why there is none.
    """
    if not (name := recognize(record, formats)):
        raise UnusableError(MISSING_KEY)
    layout = formats[name]
    system = optional_text(record, "system")
    prompt = [Turn(role="system", text=system)] if system else []
    if layout.prompt == INSTRUCTION:
        prompt += [*_history(record), _instruction(record)]
    elif layout.prompt:
        prompt += _turns(record[layout.prompt], "user", layout.prompt)
    answers = [_turns(record[key], "assistant", key) for key in layout.answers]
    if layout.content == "chats":
        return make_chat([*prompt, *(turn for turns in answers for turn in turns)], tool_turns)
    return make_pair(prompt, answers[0], answers[1], tool_turns)


def optional_text(record: Mapping[str, Json], key: str) -> str:
    """Return a text that may be absent or blank, "" then.

    Raises:
        UnusableError: the value is no text.
    """
    value = record.get(key)
    if not isinstance(value, str | None):
        raise UnusableError(WRONG_TYPE)
    return value if value and value.strip() else ""


def _has_role(value: Json) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    return not isinstance(first, dict) or any(key in first for key in ROLE_KEYS)


def _instruction(record: Mapping[str, Json]) -> Turn:
    parts = [optional_text(record, key) for key in (INSTRUCTION, INPUT)]
    return Turn(role="user", text="\n\n".join(part for part in parts if part))


def _history(record: Mapping[str, Json]) -> list[Turn]:
    turns: list[Turn] = []
    for pair in _parsed(record.get(HISTORY) or []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise UnusableError(WRONG_TYPE)
        turns += _turns(pair[0], "user") + _turns(pair[1], "assistant")
    return turns


def _turns(value: Json, role: str, key: str = "") -> list[Turn]:
    """Return the turns in a value: a text of `role`, a message, or a list of messages."""
    if key in MESSAGE_LISTS:
        value = _parsed(value)
    if isinstance(value, str):
        return [Turn(role=role, text=value)]
    return [_turn(message) for message in (value if isinstance(value, list) else [value])]


def _parsed(value: Json) -> list[Json]:
    """Return a list, or the one whose JSON the value is."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UnusableError(WRONG_TYPE) from error
    if not isinstance(value, list):
        raise UnusableError(WRONG_TYPE)
    return cast(list[Json], value)


def _turn(message: Json) -> Turn:
    if not isinstance(message, dict):
        raise UnusableError(WRONG_TYPE)
    found = [message[key] for key in CALL_KEYS if message.get(key)]
    has_text = any(message.get(key) is not None for key in TEXT_KEYS)
    try:
        calls = json.dumps(found[0], ensure_ascii=False, default=str) if found else ""
    except RecursionError as error:
        raise UnusableError(WRONG_TYPE) from error
    return Turn(
        role=role_of(_text(message, ROLE_KEYS)),
        text=_text(message, TEXT_KEYS) if has_text or not found else "",
        calls=calls,
    )


def _text(message: Mapping[str, Json], keys: tuple[str, ...]) -> str:
    found = [message[key] for key in keys if key in message]
    if not found:
        raise UnusableError(MISSING_KEY)
    value = next((value for value in found if value is not None), None)
    if not isinstance(value, str):
        raise UnusableError(WRONG_TYPE)
    return value
