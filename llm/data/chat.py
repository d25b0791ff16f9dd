"""The one way a conversation becomes tokens, for training and for asking.

<|bos|> <|user|> question <|end|> <|assistant|> answer <|end|>
"""

from collections.abc import Sequence
from typing import NamedTuple

from llm.data.documents import Message
from llm.errors import DataError
from llm.tokenizer.base import Tokenizer

ROLES = ("system", "user", "assistant")


class RenderedChat(NamedTuple):
    """The tokens of a chat and, for each, whether it is to be learned as a target."""

    ids: list[int]
    mask: list[bool]


def render_chat(messages: Sequence[Message], tokenizer: Tokenizer) -> RenderedChat:
    """Return ids and mask; True exactly on the assistant's text and the `<|end|>` after it.

    Raises:
        DataError: no messages, or a role that is none of ROLES.
    """
    return render_chats([messages], tokenizer)[0]


def render_chats(chats: Sequence[Sequence[Message]], tokenizer: Tokenizer) -> list[RenderedChat]:
    """Render many chats at once, encoded together on all cores.

    Raises:
        DataError: a chat without messages, or a role that is none of ROLES.
    """
    encoded = iter(tokenizer.encode_batch([m["content"] for chat in chats for m in chat]))
    rendered: list[RenderedChat] = []
    for messages in chats:
        if not messages:
            raise DataError("a chat without messages; give it at least one")
        ids, mask = [tokenizer.bos_id], [False]
        for message in messages:
            text = next(encoded)
            ids += [_role_id(message["role"], tokenizer), *text, tokenizer.end_id]
            mask += [False] + [message["role"] == "assistant"] * (len(text) + 1)
        rendered.append(RenderedChat(ids, mask))
    return rendered


def render_prompt(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Return the ids after which the assistant's next answer is to be generated.

    Raises:
        DataError: no messages, or a role that is none of ROLES.
    """
    return [*render_chat(messages, tokenizer).ids, tokenizer.assistant_id]


def _role_id(role: str, tokenizer: Tokenizer) -> int:
    ids = {
        "system": tokenizer.system_id,
        "user": tokenizer.user_id,
        "assistant": tokenizer.assistant_id,
    }
    if role not in ids:
        raise DataError(f"the role {role!r} in a chat; expected one of {', '.join(ROLES)}")
    return ids[role]
