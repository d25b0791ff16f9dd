"""What documents hold: texts, or chats with their roles."""

import re
from typing import Literal, TypedDict

Content = Literal["text", "chats", "preferences"]
ROLES = ("system", "user", "assistant")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a surrogate pair: JSON can write it, UTF-8 cannot encode it."""


class Message(TypedDict):
    """One message of a chat: its role, one of ROLES, and its text."""

    role: str
    content: str
