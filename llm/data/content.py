"""What documents hold: texts, chats with their roles, or preference pairs."""

import re
from typing import Literal, TypedDict

Content = Literal["text", "chats", "preferences"]
"""preferences: the messages of a prompt, a chosen and a rejected answer."""
ROLES = ("system", "user", "assistant")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a surrogate pair: JSON can write it, UTF-8 cannot encode it."""


class Message(TypedDict):
    """One message of a chat: its role, one of ROLES, and its text."""

    role: str
    content: str
