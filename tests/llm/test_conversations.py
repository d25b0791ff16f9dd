"""The policy for turns: what is kept, joined, cut off, and why a conversation is dropped."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.data.raw.conversations import (
    BLANK,
    FIRST,
    JOINED,
    LAST,
    ROLE_OF_NAME,
    Conversation,
    Turn,
    UnusableError,
    make_chat,
    make_pair,
    role_of,
)

LETTERS = {"s": "system", "u": "user", "a": "assistant", "t": "tool result", "c": "tool call"}


def turns(text: str) -> list[Turn]:
    """Return a turn per word: the letter of its role, and its text; `u` alone has none."""
    return [Turn(role=LETTERS[word[0]], text=word[1:]) for word in text.split()]


def shown(chat: Conversation) -> str:
    return " ".join(
        f"{message['role'][0]}{message['content']}".replace("\n\n", "|")
        for message in chat.messages
    )


@pytest.mark.parametrize(
    ("found", "expected", "edits"),
    [
        ("u1 a1", "u1 a1", ()),
        ("u1 a1 u2 a2 u3 a3", "u1 a1 u2 a2 u3 a3", ()),
        ("s1 u1 a1", "s1 u1 a1", ()),
        ("s1 s2 u1 a1", "s1|2 u1 a1", (JOINED,)),
        ("u1 u2 a1 a2 a3 u3 a4", "u1|2 a1|2|3 u3 a4", (JOINED,)),
        ("s u1 a1", "u1 a1", (BLANK,)),
        ("u1 a1 u a2", "u1 a1|2", (BLANK, JOINED)),
        ("a0 u1 a1", "u1 a1", (FIRST,)),
        ("s1 a0 a0 u1 a1", "s1 u1 a1", (FIRST,)),
        ("u1 a1 u2", "u1 a1", (LAST,)),
        ("a0 u1 a1 u2 u3", "u1 a1", (FIRST, JOINED, LAST)),
    ],
)
def test_turns_are_kept_joined_or_cut_off(
    found: str, expected: str, edits: tuple[str, ...]
) -> None:
    chat = make_chat(turns(found), "drop")
    assert shown(chat) == expected
    assert chat.edits == edits


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ("", "no assistant message"),
        ("u1", "no assistant message"),
        ("s1", "no assistant message"),
        ("a1", "no assistant message"),
        ("u1 a", "empty answer"),
        ("u1 a u2 a2", "empty answer"),
        ("u1 s1 a1", "late system message"),
        ("u1 a1 s1 u2 a2", "late system message"),
        ("u1 c1 t1 a1", "tool turns"),
    ],
)
def test_a_conversation_is_dropped_for_a_reason(found: str, reason: str) -> None:
    with pytest.raises(UnusableError, match=f"^{reason}$"):
        make_chat(turns(found), "drop")


def test_tool_turns_become_text_where_that_is_set() -> None:
    assert shown(make_chat(turns("u1 c1 t1 a1"), "as_text")) == "u1 a1 u1 a1"
    call = Turn(role="assistant", text="Let me see.", calls='[{"name": "f"}]')
    chat = make_chat([*turns("u1"), call, *turns("t42 a42")], "as_text")
    assert [message["content"] for message in chat.messages] == [
        "1", 'Let me see.\n\n[{"name": "f"}]', "42", "42",
    ]  # fmt: skip
    with pytest.raises(UnusableError, match="tool turns"):
        make_chat([*turns("u1"), call, *turns("a1")], "drop")


def test_roles_are_known_by_many_names_and_others_are_refused() -> None:
    assert role_of("human") == role_of("User ") == "user"
    assert role_of("gpt") == role_of("model") == "assistant"
    assert role_of("developer") == "system"
    assert len(set(ROLE_OF_NAME.values())) == 5
    with pytest.raises(UnusableError, match="unknown role"):
        role_of("judge")


@given(st.lists(st.tuples(st.sampled_from("suatc"), st.sampled_from(["", " ", "x", "y\n"]))))
def test_any_turns_give_a_chat_that_a_template_can_render_or_a_reason(
    found: list[tuple[str, str]],
) -> None:
    given_turns = [Turn(role=LETTERS[letter], text=text) for letter, text in found]
    try:
        chat = make_chat(given_turns, "as_text")
    except UnusableError as error:
        assert str(error) in ("no assistant message", "empty answer", "late system message")
        return
    roles = [message["role"] for message in chat.messages]
    body = roles[1:] if roles[0] == "system" else roles
    assert body == ["user", "assistant"] * (len(body) // 2) and body
    assert all(message["content"].strip() for message in chat.messages)
    said = [(letter, text) for letter, text in found if text.strip()]
    first = next(index for index, (letter, _) in enumerate(said) if letter in "ut")
    last = max(index for index, (letter, _) in enumerate(said) if letter in "ac")
    expected = [text for letter, text in said[:first] if letter == "s"]
    expected += [text for _, text in said[first : last + 1]]
    assert "\n\n".join(message["content"] for message in chat.messages) == "\n\n".join(expected)


def test_a_pair_takes_the_prompt_once_however_the_answers_repeat_it() -> None:
    expected = make_pair(turns("s1 u1 a1 u2"), turns("a3"), turns("a4"), "drop")
    assert shown(expected) == "s1 u1 a1 u2"
    assert (expected.chosen, expected.rejected) == ("3", "4")
    for prompt in ("", "u2", "a1 u2", "s1 u1 a1 u2"):
        chosen, rejected = turns("s1 u1 a1 u2 a3"), turns("s1 u1 a1 u2 a4")
        assert make_pair(turns(prompt), chosen, rejected, "drop") == expected
