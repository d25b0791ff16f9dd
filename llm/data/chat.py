"""Chat formats: how a conversation becomes tokens, for training, for asking and for export.

Each format is a renderer and the same as a Jinja template, which exported models carry; a test
holds the two equal. A tokenizer names its format, so that a model answers in the one that it was
trained on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from llm.data.content import ROLES, Message
from llm.errors import ArtifactError, DataError

if TYPE_CHECKING:  # settings read the table, and importing them is light
    from llm.tokenizer.base import Tokenizer


class RenderedChat(NamedTuple):
    """The tokens of a chat and, for each, whether it is a target of training."""

    ids: list[int]
    mask: list[bool]


class ChatPart(NamedTuple):
    """A part of a rendered chat: a control token by its name, or text to encode."""

    text: str
    is_control: bool = False
    is_target: bool = False


class ChatFormat(NamedTuple):
    """A way to write chats."""

    render: Callable[[Sequence[Message]], Iterator[ChatPart]]
    """From the messages of a chat; raises DataError for a role it does not know."""
    answer_prefix: tuple[ChatPart, ...]
    """Follows a chat when the assistant's next answer is to be generated."""
    template: Callable[[Mapping[str, str], str], str]
    """The same in Jinja, from the exported names of the control tokens, and the expression of a
    message's text without these names."""


def render_chat(messages: Sequence[Message], tokenizer: "Tokenizer") -> RenderedChat:
    """Return the ids and the mask of one chat; raises as `render_chats` does."""
    return render_chats([messages], tokenizer)[0]


def render_chats(chats: Sequence[Sequence[Message]], tokenizer: "Tokenizer") -> list[RenderedChat]:
    """Render chats in the tokenizer's format; their texts are encoded together on all cores.

    Raises:
        DataError: a chat without messages, or an unknown role.
    """
    render = chat_format_of(tokenizer).render
    parts: list[list[ChatPart]] = []
    for messages in chats:
        if not messages:
            raise DataError("a chat without messages; give it at least one")
        parts.append(list(render(messages)))
    return _encode_parts(parts, tokenizer)


def render_prompt(messages: Sequence[Message], tokenizer: "Tokenizer") -> list[int]:
    """Return the ids to generate the assistant's next answer from; raises as `render_chats`."""
    prefix = chat_format_of(tokenizer).answer_prefix
    return render_chat(messages, tokenizer).ids + _encode_parts([prefix], tokenizer)[0].ids


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


def _encode_parts(
    chats: Sequence[Sequence[ChatPart]], tokenizer: "Tokenizer"
) -> list[RenderedChat]:
    texts = [part.text for parts in chats for part in parts if not part.is_control]
    encoded = iter(tokenizer.encode_batch(texts))
    rendered: list[RenderedChat] = []
    for parts in chats:
        chat = RenderedChat([], [])
        for part in parts:
            ids = [tokenizer.control_id(part.text)] if part.is_control else next(encoded)
            chat.ids.extend(ids)
            chat.mask.extend([part.is_target] * len(ids))
        rendered.append(chat)
    return rendered


def _render_turns(messages: Sequence[Message]) -> Iterator[ChatPart]:
    """Yield <|bos|> <|user|> question <|end|> <|assistant|> answer <|end|>.

    Targets are exactly the assistant's texts and the <|end|> after each.
    """
    yield ChatPart("<|bos|>", is_control=True)
    for message in messages:
        if (role := message["role"]) not in ROLES:
            raise DataError(f"the role {role!r} in a chat; expected one of {', '.join(ROLES)}")
        is_target = role == "assistant"
        yield ChatPart(f"<|{role}|>", is_control=True)
        yield ChatPart(message["content"], is_target=is_target)
        yield ChatPart("<|end|>", is_control=True, is_target=is_target)


def _turns_template(names: Mapping[str, str], content: str) -> str:
    roles = ", ".join(ROLES)
    written = "".join(
        f"{{% {'elif' if index else 'if'} message['role'] == '{role}' %}}{names[f'<|{role}|>']}"
        for index, role in enumerate(ROLES)
    )
    return (
        f"{names['<|bos|>']}{{% for message in messages %}}{written}"
        f"{{% else %}}{{{{ raise_exception('a role other than {roles}') }}}}{{% endif %}}"
        f"{{{{ {content} }}}}{names['<|end|>']}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{names['<|assistant|>']}{{% endif %}}"
    )


CHAT_FORMATS: dict[str, ChatFormat] = {
    "turns": ChatFormat(
        _render_turns, (ChatPart("<|assistant|>", is_control=True),), _turns_template
    ),
}
