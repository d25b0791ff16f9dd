"""The policy for conversations: what becomes of every kind of turn.

| Turn | What becomes of it |
|---|---|
| system, at the start | kept; the first message of the chat |
| system, later | the conversation is dropped: "late system message" |
| several of one role in a row | joined by a blank line |
| user or system without text | removed |
| assistant without text | the conversation is dropped: "empty answer" |
| assistant before any user | cut off: answers without a question |
| user at the end | cut off: a question without an answer |
| tool call or result | `clean.tool_turns`. drop: the conversation is dropped: "tool turns"; |
| | as_text: a call becomes text of the assistant in JSON, its result a message of the user |
| of another role | the conversation is dropped: "unknown role" |

All turns of a conversation are kept otherwise, and texts are not changed. Dropped conversations are
counted by reason, and edited ones by what was done.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llm.data.content import Message

ToolTurns = Literal["drop", "as_text"]
NAMES = {
    "system": ("system", "developer"),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "chatgpt", "bard", "bing", "model"),
    "tool result": ("tool", "function", "ipython", "observation", "function_response",
                    "tool_response"),
    "tool call": ("function_call", "tool_call"),
}  # fmt: skip
ROLE_OF_NAME = {name: role for role, names in NAMES.items() for name in names}
TOOL_ROLES = {"tool result": "user", "tool call": "assistant"}
"""The role of a tool's turn as text."""
BLANK, JOINED = "messages without text removed", "messages of one role joined"
FIRST, LAST = "first answers cut off", "last questions cut off"


class UnusableError(Exception):
    """Why a record is dropped; the readers of records catch it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One message as a record holds it."""

    role: str
    """A key of NAMES."""
    text: str
    calls: str = ""
    """JSON of the tools called."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """The messages of a chat, or of the prompt of a preference pair with its two answers."""

    messages: list[Message]
    chosen: str = ""
    rejected: str = ""
    edits: tuple[str, ...] = ()
    """What was done to the turns, each kind once."""


def role_of(name: str) -> str:
    """Return the role that a record calls `name`.

    Raises:
        UnusableError: it is unknown.
    """
    if (role := ROLE_OF_NAME.get(name.strip().lower())) is None:
        raise UnusableError("unknown role")
    return role


def make_chat(turns: Sequence[Turn], tool_turns: ToolTurns) -> Conversation:
    """Return the chat of these turns by the policy.

    Raises:
        UnusableError: the conversation is dropped.
    """
    messages, edits = _edit(turns, tool_turns)
    if messages and messages[-1]["role"] == "user":
        messages, edits = messages[:-1], [*edits, LAST]
    if not messages or messages[-1]["role"] != "assistant":
        raise UnusableError("no assistant message")
    return Conversation(messages=messages, edits=tuple(edits))


def make_pair(
    prompt: Sequence[Turn], chosen: Sequence[Turn], rejected: Sequence[Turn], tool_turns: ToolTurns
) -> Conversation:
    """Return the preference pair of a prompt and two answers, each of which may repeat the prompt.

    Raises:
        UnusableError: an answer is not one message after the prompt, or the pair is dropped.
    """
    if not chosen or not rejected:
        raise UnusableError("no assistant message")
    context = list(chosen[:-1])
    if context != list(rejected[:-1]):
        raise UnusableError("answers after different messages")
    if context and context[len(context) - len(prompt) :] != list(prompt):
        raise UnusableError("answer of several messages")
    messages, edits = _edit(context or prompt, tool_turns)
    if not messages or messages[-1]["role"] != "user":
        raise UnusableError("no user message")
    answers = [_answer(side[-1], tool_turns) for side in (chosen, rejected)]
    return Conversation(
        messages=messages, chosen=answers[0], rejected=answers[1], edits=tuple(edits)
    )


def _edit(turns: Sequence[Turn], tool_turns: ToolTurns) -> tuple[list[Message], list[str]]:
    """Return the messages of turns, and what was done to them; the last may be of any role."""
    messages: list[Message] = []
    edits: dict[str, None] = {}
    for turn in turns:
        message = _message(turn, tool_turns)
        role, text = message["role"], message["content"]
        before = messages[-1]["role"] if messages else ""
        if not text.strip():
            if role == "assistant":
                raise UnusableError("empty answer")
            edits[BLANK] = None
        elif role == "assistant" and before in ("", "system"):
            edits[FIRST] = None
        elif role == before:
            messages[-1]["content"] += f"\n\n{text}"
            edits[JOINED] = None
        elif role == "system" and messages:
            raise UnusableError("late system message")
        else:
            messages.append(message)
    return messages, list(edits)


def _message(turn: Turn, tool_turns: ToolTurns) -> Message:
    if tool_turns == "drop" and (turn.calls or turn.role in TOOL_ROLES):
        raise UnusableError("tool turns")
    text = f"{turn.text}\n\n{turn.calls}" if turn.text.strip() and turn.calls else turn.text
    return Message(role=TOOL_ROLES.get(turn.role, turn.role), content=text or turn.calls)


def _answer(turn: Turn, tool_turns: ToolTurns) -> str:
    message = _message(turn, tool_turns)
    if message["role"] != "assistant":
        raise UnusableError("no assistant message")
    if not message["content"].strip():
        raise UnusableError("empty answer")
    return message["content"]
