"""Rendering chats: the formats, which tokens are targets, and cutting and splitting chats."""

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data.chat import (
    CHAT_FORMATS,
    Message,
    RenderedChat,
    render_chat,
    render_chats,
    render_pairs,
    render_prompt,
    split_last_answer,
    truncate_left,
)
from llm.errors import DataError
from llm.tokenizer.base import CONTROL_TOKENS, Tokenizer
from llm.tokenizer.bpe import ByteLevelBPE
from llm.tokenizer.characters import ByteTokenizer, CharacterTokenizer

FORMATS = pytest.mark.parametrize("chat_format", CHAT_FORMATS)
SYSTEM, QUESTION, ANSWER = (
    Message(role=role, content=content)
    for role, content in (("system", "be brief"), ("user", "2 + 2?"), ("assistant", "4"))
)
# as the formats' authors render them; control tokens there are those here by this table
WRITTEN = {
    "turns": "<|bos|><|system|>be brief<|end|><|user|>2 + 2?<|end|><|assistant|>4<|end|>",
    "chatml": "<|bos|><|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n"
    "<|im_start|>assistant\n4<|im_end|>\n",
    "llama3": "<|bos|><|start_header_id|>system<|end_header_id|>\n\nbe brief<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n2 + 2?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n4<|eot_id|>",
    "alpaca": "<|bos|>be brief\n\n### Instruction:\n2 + 2?\n\n### Response:\n4<|end|>",
}
SAME_TOKEN = {
    "<|im_start|>": "<|user|>", "<|im_end|>": "<|end|>", "<|start_header_id|>": "<|user|>",
    "<|end_header_id|>": "<|assistant|>", "<|eot_id|>": "<|end|>",
}  # fmt: skip

contents = st.lists(
    st.text(max_size=6)
    | st.sampled_from([*CONTROL_TOKENS, *SAME_TOKEN, "\n", "\n\n", " ", "### Response:\n"]),
    max_size=4,
).map("".join)
messages_of_chats = st.lists(
    st.builds(Message, role=st.sampled_from(["system", "user", "assistant"]), content=contents),
    min_size=1,
    max_size=5,
)


@pytest.fixture(scope="module")
def make(corpus: list[str]) -> Callable[[str, str], Tokenizer]:
    """Return a function that gives a tokenizer of a kind with a chat format."""
    made = {
        "bpe": ByteLevelBPE.train(corpus, 600),
        # in which line ends are one token with what follows, so that targets share tokens
        "long": ByteLevelBPE.train(
            ["### Response:\n\n\n\n\n 4 the user\n the"] * 9, 400, "gpt2", 0
        ),
        "bytes": ByteTokenizer(),
        "characters": CharacterTokenizer.train(corpus),
    }

    def get(kind: str, chat_format: str) -> Tokenizer:
        made[kind].chat_format = chat_format
        return made[kind]

    return get


KINDS = pytest.mark.parametrize("kind", ["bpe", "long", "bytes", "characters"])
Make = Callable[[str, str], Tokenizer]


def spelled(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of ids, control tokens by their names."""
    names = dict(zip(tokenizer.control_ids, CONTROL_TOKENS, strict=True))
    return b"".join(
        names[index].encode() if index in names else tokenizer.decode_bytes([index])
        for index in ids
    ).decode()


@FORMATS
@KINDS
def test_a_chat_is_rendered_by_the_template(kind: str, chat_format: str, make: Make) -> None:
    tokenizer = make(kind, chat_format)
    expected = WRITTEN[chat_format]
    for theirs, ours in SAME_TOKEN.items():
        expected = expected.replace(theirs, ours)
    ids, mask = render_chat([SYSTEM, QUESTION, ANSWER], tokenizer)
    assert spelled(ids, tokenizer) == expected
    targets = [index for index, is_target in zip(ids, mask, strict=True) if is_target]
    assert targets[-1] == tokenizer.end_id and len(targets) == 2
    assert tokenizer.decode(targets).endswith("4")
    prompt = spelled(render_prompt([SYSTEM, QUESTION], tokenizer), tokenizer)
    assert prompt == expected[: expected.rindex("4<|end|>")]


def test_ids_of_our_own_format(tokenizer: ByteLevelBPE) -> None:
    system, question, answer = tokenizer.encode_batch(["be brief", "2 + 2?", "4"])
    ids, mask = render_chat([SYSTEM, QUESTION, ANSWER], tokenizer)
    bos, user, assistant, system_id, end = 0, 1, 2, 3, 4
    assert ids == [
        bos, system_id, *system, end, user, *question, end, assistant, *answer, end,
    ]  # fmt: skip
    assert mask == [False] * (len(ids) - len(answer) - 1) + [True] * (len(answer) + 1)


def test_alpaca_begins_with_its_preamble_where_no_system_message_does(make: Make) -> None:
    tokenizer = make("bpe", "alpaca")
    text = tokenizer.decode(render_chat([QUESTION, SYSTEM, ANSWER], tokenizer).ids)
    preamble, _, rest = text.partition("\n\n")
    assert preamble == (
        "Below is an instruction that describes a task. Write a response that appropriately"
        " completes the request."
    )
    assert rest == "### Instruction:\n2 + 2?\n\nbe brief\n\n### Response:\n4"


def target_bytes(chat_format: str, messages: Sequence[Message]) -> tuple[bytes, list[bool], int]:
    """The oracle writes the chat out: its bytes without control tokens, whether each is of an
    answer, and the number of control tokens.
    """
    written, is_target, num_controls = b"", [], 0
    for part in CHAT_FORMATS[chat_format].render(messages):
        if part.is_control:
            num_controls += 1
            continue
        is_answer = part.is_target
        written += part.text.encode()
        is_target += [is_answer] * len(part.text.encode())
    return written, is_target, num_controls


@FORMATS
@KINDS
@settings(max_examples=60)
@given(chats=st.lists(messages_of_chats, max_size=4))
def test_exactly_the_tokens_with_bytes_of_answers_and_their_ends_are_targets(
    kind: str, chat_format: str, make: Make, chats: list[list[Message]]
) -> None:
    tokenizer = make(kind, chat_format)
    rendered = render_chats(chats, tokenizer)
    assert rendered == [render_chat(chat, tokenizer) for chat in chats]
    for chat, (ids, mask) in zip(chats, rendered, strict=True):
        answers = [m["content"] for m in chat if m["role"] == "assistant"]
        written, is_target, num_controls = target_bytes(chat_format, chat)
        assert sum(is_target) == len("".join(answers).encode())
        assert tokenizer.decode_bytes(ids) == written
        place = 0
        for index, is_learned in zip(ids, mask, strict=True):
            size = len(tokenizer.bytes_of_token[index])
            if index not in tokenizer.control_ids:
                assert is_learned == any(is_target[place : place + size])
            else:
                assert not is_learned or index == tokenizer.end_id
            place += size
        ends = [
            is_learned for i, is_learned in zip(ids, mask, strict=True) if i == tokenizer.end_id
        ]
        assert sum(ends) == len(answers)
        typed = sum(index in tokenizer.control_ids for index in ids)
        assert typed == num_controls, "typed control tokens are bytes"
        assert ids.count(tokenizer.bos_id) == 1 and ids[0] == tokenizer.bos_id


@FORMATS
@KINDS
@settings(max_examples=60)
@given(messages=messages_of_chats, answer=contents)
def test_a_chat_is_split_into_its_prompt_and_its_last_answer(
    kind: str, chat_format: str, make: Make, messages: list[Message], answer: str
) -> None:
    tokenizer = make(kind, chat_format)
    chat = [*messages, Message(role="assistant", content=answer)]
    whole = render_chat(chat, tokenizer)
    split = split_last_answer(*whole, tokenizer)
    assert split == (render_prompt(messages, tokenizer), answer)
    asked = [*chat, Message(role="user", content=answer)]
    assert split_last_answer(*render_chat(asked, tokenizer), tokenizer) is None
    end = max(place for place, index in enumerate(whole.ids) if index == tokenizer.end_id)
    for cut in (end, end - 1):
        kept = [i for i, m in enumerate(whole.mask[:cut]) if m and whole.ids[i] == tokenizer.end_id]
        if not kept:
            assert split_last_answer(whole.ids[:cut], whole.mask[:cut], tokenizer) is None


def test_a_prompt_of_ours_is_the_beginning_of_the_chat_trained_on(tokenizer: ByteLevelBPE) -> None:
    whole, mask = render_chat([SYSTEM, QUESTION, ANSWER], tokenizer)
    prompt = render_prompt([SYSTEM, QUESTION], tokenizer)
    assert whole[: len(prompt)] == prompt
    assert all(mask[len(prompt) :]) and not mask[len(prompt) - 1]


@FORMATS
@KINDS
@settings(max_examples=40)
@given(messages=messages_of_chats, answers=st.tuples(contents, contents))
def test_a_pair_is_two_chats_whose_last_answers_alone_are_targets(
    kind: str, chat_format: str, make: Make, messages: list[Message], answers: tuple[str, str]
) -> None:
    tokenizer = make(kind, chat_format)
    ((ids, mask),) = render_pairs([(messages, *answers)], tokenizer)
    chats = [
        render_chat([*messages, Message(role="assistant", content=answer)], tokenizer)
        for answer in answers
    ]
    assert ids == chats[0].ids + chats[1].ids and ids.count(tokenizer.bos_id) == 2
    half = len(chats[0].ids)
    for chat, found in zip(chats, (mask[:half], mask[half:]), strict=True):
        assert sum(m and i == tokenizer.end_id for i, m in zip(chat.ids, found, strict=True)) == 1
        # from the last answer's first token on as in the chat, before it nothing
        first = found.index(True)
        assert found[first:] == chat.mask[first:]
        prompt = render_prompt(messages, tokenizer)
        assert first <= len(prompt) + 3
        earlier = render_chat(messages, tokenizer)
        ends = [i for i, m in enumerate(earlier.mask) if m and earlier.ids[i] == tokenizer.end_id]
        assert not any(found[: max(ends, default=0) + 1])


@FORMATS
@KINDS
@settings(max_examples=60)
@given(messages=messages_of_chats, share=st.floats(0.1, 0.99))
def test_a_chat_cut_at_its_beginning_keeps_bos_system_message_and_end(
    kind: str, chat_format: str, make: Make, messages: list[Message], share: float
) -> None:
    tokenizer = make(kind, chat_format)
    chat = render_chat(messages, tokenizer)
    num_tokens = max(1, int(share * len(chat.ids)))
    cut = truncate_left(messages, chat, num_tokens, tokenizer)
    pairs, cut_pairs = (list(zip(*each, strict=True)) for each in (chat, cut))
    assert len(cut_pairs) == num_tokens and cut_pairs[0] == pairs[0]
    head = 1
    while head < num_tokens and cut_pairs[head] == pairs[head]:
        head += 1
    written = CHAT_FORMATS[chat_format].head(messages)
    num_bytes = sum(len(part.text.encode()) for part in written if not part.is_control)
    num_kept = len(tokenizer.decode_bytes(cut.ids[:head]))
    assert num_kept >= num_bytes or head == num_tokens, "the head is whole if there is room"
    assert any(
        cut_pairs[start:] == pairs[len(pairs) - num_tokens + start :]
        for start in range(head + 1)
        if start == num_tokens or len(tokenizer.decode_bytes(cut.ids[:start])) >= num_bytes
    )


def test_a_system_message_without_room_leaves_no_targets(tokenizer: ByteLevelBPE) -> None:
    messages = [Message(role="system", content="x y " * 20), QUESTION, ANSWER]
    cut = truncate_left(messages, render_chat(messages, tokenizer), 20, tokenizer)
    assert len(cut.ids) == 20 and not any(cut.mask)


def test_an_unknown_role_is_refused(tokenizer: ByteLevelBPE) -> None:
    with pytest.raises(DataError, match="role 'human' in a chat; expected one of system, user"):
        render_chat([Message(role="human", content="hello")], tokenizer)


def test_a_chat_without_messages_is_refused(tokenizer: ByteLevelBPE) -> None:
    with pytest.raises(DataError, match="without messages"):
        render_chat([], tokenizer)


def test_a_chat_cut_inside_its_only_answer_has_no_prompt(tokenizer: ByteLevelBPE) -> None:
    chat = render_chat([QUESTION, Message(role="assistant", content="yes " * 30)], tokenizer)
    cut = truncate_left([QUESTION], chat, 20, tokenizer)
    assert split_last_answer(*cut, tokenizer) is None
    assert split_last_answer(*RenderedChat(chat.ids[:-1], chat.mask[:-1]), tokenizer) is None
