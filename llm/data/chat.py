"""Chat formats: how a conversation becomes tokens, for training, for asking and for export.

A format is a table: a template for the messages of each role. The renderer and the Jinja template
that exported models carry are both made from it, and a test holds them equal. Messages are written
where they stand, in any order of roles, and their texts are not changed. A tokenizer names its
format, so that a model answers in the one that it was trained on.

The special strings of a template stand for the tokenizer's seven control tokens, so that formats
share vocabularies. Two are the same in all: `<|bos|>` begins a chat, `<|end|>` ends an answer.

Text between two control tokens is encoded as one, whoever wrote it, as transformers encodes a
rendered chat. So a token may hold the end of the template's text and the beginning of an answer. A
token is a target if it holds bytes of an answer, or is the `<|end|>` after one.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, groupby, pairwise
from typing import TYPE_CHECKING, NamedTuple

from llm.data.content import ROLES, Message
from llm.errors import ArtifactError, DataError

if TYPE_CHECKING:  # settings read the table, and importing them is light
    from llm.tokenizer.base import Tokenizer

SPECIAL_STRING = re.compile(r"(<\|\w+\|>)")
TEXT = "{text}"  # of the message, in a template


class RenderedChat(NamedTuple):
    """The tokens of a chat and, for each, whether it is a target of training."""

    ids: list[int]
    mask: list[bool]


class AnsweredPrompt(NamedTuple):
    """A chat, split before its last answer."""

    prompt_ids: list[int]
    answer: str


class ChatPart(NamedTuple):
    """A part of a rendered chat: a control token by its name, or text to encode."""

    text: str
    is_control: bool = False
    is_target: bool = False


Parts = tuple[ChatPart, ...]
BEGIN, END = (ChatPart(name, is_control=True) for name in ("<|bos|>", "<|end|>"))


class ChatFormat(NamedTuple):
    """A way to write chats; `make_format` makes one."""

    before: Mapping[str, Parts]
    """By role, what precedes a message's text."""
    after: Mapping[str, Parts]
    """By role, what follows it; `<|end|>` first for the assistant."""
    preamble: Parts
    """Text for chats that do not begin with a system message."""

    def render(self, messages: Sequence[Message]) -> list[ChatPart]:
        """Return the parts of a chat.

        Raises:
            DataError: no messages, or an unknown role.
        """
        if not messages:
            raise DataError("a chat without messages; give it at least one")
        return [*self.head(messages), *self._render_all(messages[self._num_system(messages) :])]

    def head(self, messages: Sequence[Message]) -> list[ChatPart]:
        """Return the parts before the first turn: `<|bos|>`, and system message or preamble."""
        system = messages[: self._num_system(messages)]
        return [BEGIN, *(self._render_all(system) if system else self.preamble)]

    def _num_system(self, messages: Sequence[Message]) -> int:
        return int(messages[0]["role"] == "system")

    def _render_all(self, messages: Sequence[Message]) -> Iterator[ChatPart]:
        for message in messages:
            if (role := message["role"]) not in ROLES:
                raise DataError(f"the role {role!r} in a chat; expected one of {', '.join(ROLES)}")
            is_answer = role == "assistant"
            yield from self.before[role]
            yield ChatPart(message["content"], is_target=is_answer)
            for part in self.after[role]:
                yield part._replace(is_target=is_answer and part.is_control)

    def jinja(self, names: Mapping[str, str], content: str) -> str:
        """Return the same in Jinja, from the exported names of the control tokens, and the
        expression of a message's text without these names.
        """

        def written(*parts: ChatPart) -> str:
            text = "".join(names[part.text] if part.is_control else part.text for part in parts)
            # an expression: in template text, Jinja would drop line ends after its tags
            return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""

        by_role = "".join(
            f"{{% {'elif' if index else 'if'} message['role'] == '{role}' %}}"
            f"{written(*self.before[role])}{{{{ {content} }}}}{written(*self.after[role])}"
            for index, role in enumerate(ROLES)
        )
        preamble = "{% if messages[0]['role'] != 'system' %}" + written(*self.preamble)
        return (
            f"{written(BEGIN)}{preamble + '{% endif %}' if self.preamble else ''}"
            f"{{% for message in messages %}}{by_role}"
            f"{{% else %}}{{{{ raise_exception('a role other than {', '.join(ROLES)}') }}}}"
            "{% endif %}{% endfor %}"
            f"{{% if add_generation_prompt %}}{written(*self.before['assistant'])}{{% endif %}}"
        )


def make_format(
    templates: Mapping[str, str], specials: Mapping[str, str] | None = None, preamble: str = ""
) -> ChatFormat:
    """Make a format from the template of each role, with `{text}` where the message's text stands.

    `specials` are the control tokens that the templates' special strings stand for, where they are
    not the tokenizer's own names.
    """

    def parse(template: str) -> Parts:
        # re.split gives texts at even and special strings at odd indices
        parts = enumerate(SPECIAL_STRING.split(template))
        controls = specials or {}
        return tuple(
            ChatPart(controls.get(part, part), is_control=bool(index % 2))
            for index, part in parts
            if part
        )

    halves = {role: templates[role].partition(TEXT) for role in ROLES}
    after = {role: parse(text) for role, (_, _, text) in halves.items()}
    # generation stops there, and targets and packed pairs are found by it
    assert after["assistant"][0] == END, "<|end|> must follow the assistant's text"
    return ChatFormat(
        before={role: parse(text) for role, (text, _, _) in halves.items()},
        after=after,
        preamble=parse(preamble),
    )


def render_chat(messages: Sequence[Message], tokenizer: "Tokenizer") -> RenderedChat:
    """Return the ids and the mask of one chat; raises as `render_chats` does."""
    return render_chats([messages], tokenizer)[0]


def render_chats(chats: Sequence[Sequence[Message]], tokenizer: "Tokenizer") -> list[RenderedChat]:
    """Render chats in the tokenizer's format; their texts are encoded together on all cores.

    Raises:
        DataError: a chat without messages, or an unknown role.
    """
    chat_format = chat_format_of(tokenizer)
    return _encode([chat_format.render(messages) for messages in chats], tokenizer)


def render_prompt(messages: Sequence[Message], tokenizer: "Tokenizer") -> list[int]:
    """Return the ids to generate the assistant's next answer from; raises as `render_chats`."""
    chat_format = chat_format_of(tokenizer)
    parts = [*chat_format.render(messages), *chat_format.before["assistant"]]
    return _encode([parts], tokenizer)[0].ids


def render_pairs(
    pairs: Sequence[tuple[Sequence[Message], str, str]], tokenizer: "Tokenizer"
) -> list[RenderedChat]:
    """Render preference pairs, each a prompt with its chosen and its rejected answer.

    The ids are those of two chats in a row. Targets are the two answers; earlier answers in the
    prompt, which both sides share, are not. Raises as `render_chats` does.
    """
    chats = [
        [*messages, Message(role="assistant", content=answer)]
        for messages, *answers in pairs
        for answer in answers
    ]
    halves = [_last_answer_only(chat, tokenizer) for chat in render_chats(chats, tokenizer)]
    return [
        RenderedChat(chosen.ids + rejected.ids, chosen.mask + rejected.mask)
        for chosen, rejected in zip(halves[::2], halves[1::2], strict=True)
    ]


def truncate_left(
    messages: Sequence[Message], chat: RenderedChat, num_tokens: int, tokenizer: "Tokenizer"
) -> RenderedChat:
    """Return at most `num_tokens` of a rendered chat, without those before that its end needs.

    Kept are also `<|bos|>` and a system message in front, or the format's preamble.
    """
    head = chat_format_of(tokenizer).head(messages)
    parts = chat_format_of(tokenizer).render(messages)
    is_head = [part._replace(is_target=index < len(head)) for index, part in enumerate(parts)]
    num_head = sum(_encode([is_head], tokenizer)[0].mask)
    start = len(chat.ids) - max(0, num_tokens - num_head)
    return RenderedChat(
        ids=(chat.ids[:num_head] + chat.ids[start:])[:num_tokens],
        mask=(chat.mask[:num_head] + chat.mask[start:])[:num_tokens],
    )


def split_last_answer(
    ids: Sequence[int], mask: Sequence[bool], tokenizer: "Tokenizer"
) -> AnsweredPrompt | None:
    """Split a rendered chat into the prompt, as `render_prompt` gives it, and the last answer.

    None if the chat does not end with a whole answer: a user's message follows, or it was cut.
    """
    chat_format, ids = chat_format_of(tokenizer), list(ids)
    before, after = chat_format.before["assistant"], chat_format.after["assistant"]
    end = max(_answer_ends(ids, mask, tokenizer), default=0)
    if not end or ids[end + 1 :] != tokenizer.encode_batch([_text(after)])[0]:
        return None
    start = max(index for index in range(end) if ids[index] in tokenizer.control_ids) + 1
    last = max((index for index, part in enumerate(before) if part.is_control), default=-1)
    if last >= 0 and ids[start - 1] != tokenizer.control_id(before[last].text):
        return None
    first = next((index for index in range(start, end) if mask[index]), end)
    question, answer = (tokenizer.decode_bytes(ids[a:b]) for a, b in ((start, first), (first, end)))
    # the first target may begin with the last bytes of the text that precedes an answer
    num_bytes = max(1, len(tokenizer.decode_bytes(ids[first : first + 1])))
    prefix = _text(before[last + 1 :]).encode()
    for num_shared in range(num_bytes):
        prompt = question + answer[:num_shared]
        if prompt.endswith(prefix):
            encoded = tokenizer.encode_batch([prompt.decode(errors="replace")])[0]
            text = answer[num_shared:].decode(errors="replace")
            return AnsweredPrompt([*ids[:start], *encoded], text)
    return None


def chat_format_of(tokenizer: "Tokenizer") -> ChatFormat:
    """Return the format that a tokenizer names.

    Raises:
        ArtifactError: it is not in the table.
    """
    if tokenizer.chat_format not in CHAT_FORMATS:
        known = ", ".join(CHAT_FORMATS)
        raise ArtifactError(
            f"the tokenizer's chat format: found {tokenizer.chat_format!r}, expected one of {known}"
        )
    return CHAT_FORMATS[tokenizer.chat_format]


def _encode(chats: Sequence[Sequence[ChatPart]], tokenizer: "Tokenizer") -> list[RenderedChat]:
    """Encode the parts of chats, adjacent texts as one."""
    runs = [
        [list(run) for _, run in groupby(parts, lambda part: part.is_control)] for parts in chats
    ]
    texts = [_text(run) for chat in runs for run in chat if not run[0].is_control]
    encoded = iter(tokenizer.encode_batch(texts))
    rendered: list[RenderedChat] = []
    for chat in runs:
        ids: list[int] = []
        mask: list[bool] = []
        for run in chat:
            if run[0].is_control:
                ids += [tokenizer.control_id(part.text) for part in run]
                mask += [part.is_target for part in run]
            else:
                ids += (found := next(encoded))
                mask += _text_targets(run, found, tokenizer)
        rendered.append(RenderedChat(ids, mask))
    return rendered


def _text_targets(
    run: Sequence[ChatPart], ids: Sequence[int], tokenizer: "Tokenizer"
) -> list[bool]:
    """Return whether each id of adjacent texts holds bytes of a target."""
    if len(run) == 1:
        return [run[0].is_target] * len(ids)
    is_target = b"".join(bytes([part.is_target]) * len(part.text.encode()) for part in run)
    ends = list(accumulate(len(tokenizer.bytes_of_token[index]) for index in ids))
    return [1 in is_target[start:end] for start, end in pairwise([0, *ends])]


def _answer_ends(ids: Sequence[int], mask: Sequence[bool], tokenizer: "Tokenizer") -> list[int]:
    """Return the positions of the `<|end|>` of each answer."""
    pairs = enumerate(zip(ids, mask, strict=True))
    return [index for index, pair in pairs if pair == (tokenizer.end_id, True)]


def _last_answer_only(chat: RenderedChat, tokenizer: "Tokenizer") -> RenderedChat:
    """Take earlier answers out of the targets."""
    num_earlier = max(_answer_ends(*chat, tokenizer)[:-1], default=-1) + 1
    return chat._replace(mask=[False] * num_earlier + chat.mask[num_earlier:])


def _text(parts: Iterable[ChatPart]) -> str:
    return "".join(part.text for part in parts if not part.is_control)


CHAT_FORMATS: dict[str, ChatFormat] = {
    "turns": make_format({role: f"<|{role}|>{TEXT}<|end|>" for role in ROLES}),
    # OpenAI's ChatML, as Qwen writes it; a <|bos|> is put first
    "chatml": make_format(
        {role: f"<|im_start|>{role}\n{TEXT}<|im_end|>\n" for role in ROLES},
        {"<|im_start|>": "<|user|>", "<|im_end|>": "<|end|>"},
    ),
    # Meta's model card of Llama 3, whose <|begin_of_text|> is <|bos|> here
    "llama3": make_format(
        {role: f"<|start_header_id|>{role}<|end_header_id|>\n\n{TEXT}<|eot_id|>" for role in ROLES},
        {
            "<|start_header_id|>": "<|user|>",
            "<|end_header_id|>": "<|assistant|>",
            "<|eot_id|>": "<|end|>",
        },
    ),
    # Taori et al. 2023, Stanford Alpaca. Its headings are text, which users can type too; a system
    # message takes the place of the preamble.
    "alpaca": make_format(
        {
            "system": f"{TEXT}\n\n",
            "user": f"### Instruction:\n{TEXT}\n\n",
            "assistant": f"### Response:\n{TEXT}<|end|>",
        },
        preamble="Below is an instruction that describes a task. Write a response that"
        " appropriately completes the request.\n\n",
    ),
}
