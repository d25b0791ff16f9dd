"""Rendering chats: the template, and which tokens are learned."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data.chat import Message, render_chat, render_chats, render_prompt
from llm.errors import DataError
from llm.tokenizer.base import CONTROL_TOKENS
from llm.tokenizer.bpe import ByteLevelBPE

contents = st.text(max_size=20) | st.sampled_from(CONTROL_TOKENS)
messages_of_chats = st.lists(
    st.builds(Message, role=st.sampled_from(["system", "user", "assistant"]), content=contents),
    min_size=1,
    max_size=5,
)


def test_a_chat_is_rendered_by_the_template(tokenizer: ByteLevelBPE) -> None:
    chat = [
        Message(role="system", content="be brief"),
        Message(role="user", content="2 + 2?"),
        Message(role="assistant", content="4"),
    ]
    system, question, answer = tokenizer.encode_batch(["be brief", "2 + 2?", "4"])
    ids, mask = render_chat(chat, tokenizer)
    bos, user, assistant, system_id, end = 0, 1, 2, 3, 4
    assert ids == [
        bos, system_id, *system, end, user, *question, end, assistant, *answer, end,
    ]  # fmt: skip
    assert mask == [False] * (len(ids) - len(answer) - 1) + [True] * (len(answer) + 1)


@settings(max_examples=200, deadline=None)
@given(chats=st.lists(messages_of_chats, max_size=4))
def test_exactly_the_assistants_words_and_their_end_are_learned(
    tokenizer: ByteLevelBPE, chats: list[list[Message]]
) -> None:
    rendered = render_chats(chats, tokenizer)
    assert rendered == [render_chat(chat, tokenizer) for chat in chats]
    for chat, (ids, mask) in zip(chats, rendered, strict=True):
        answers = [m["content"] for m in chat if m["role"] == "assistant"]
        learned = [token for token, is_target in zip(ids, mask, strict=True) if is_target]
        assert tokenizer.decode_bytes(learned) == "".join(answers).encode()
        assert learned.count(tokenizer.end_id) == len(answers)
        assert tokenizer.decode_bytes(ids) == "".join(m["content"] for m in chat).encode()
        num_controls = sum(token < len(CONTROL_TOKENS) for token in ids)
        assert num_controls == 1 + 2 * len(chat), "typed control tokens are bytes"
        assert ids.count(tokenizer.bos_id) == 1 and ids[0] == tokenizer.bos_id


@settings(max_examples=100, deadline=None)
@given(messages=messages_of_chats, answer=contents)
def test_a_prompt_and_its_answer_are_the_chat_that_was_trained_on(
    tokenizer: ByteLevelBPE, messages: list[Message], answer: str
) -> None:
    whole, mask = render_chat([*messages, Message(role="assistant", content=answer)], tokenizer)
    prompt = render_prompt(messages, tokenizer)
    assert whole[: len(prompt)] == prompt
    assert whole[len(prompt) :] == [*tokenizer.encode_batch([answer])[0], tokenizer.end_id]
    assert all(mask[len(prompt) :]) and not mask[len(prompt) - 1]


def test_an_unknown_role_is_refused(tokenizer: ByteLevelBPE) -> None:
    with pytest.raises(DataError, match="role 'human' in a chat; expected one of system, user"):
        render_chat([Message(role="human", content="hello")], tokenizer)


def test_a_chat_without_messages_is_refused(tokenizer: ByteLevelBPE) -> None:
    with pytest.raises(DataError, match="without messages"):
        render_chat([], tokenizer)
