"""Roles are written and read back as the dotted paths that keys and job files hold."""

import pytest

from llm.role import Role


@pytest.mark.parametrize(
    ("text", "role"),
    [
        ("", Role()),
        ("corpus", Role("corpus")),
        ("chats.sources.10", Role("chats", 10)),
        ("corpus.sources.0", Role("corpus", 0)),
    ],
)
def test_a_role_is_read_as_it_was_written(text: str, role: Role) -> None:
    assert str(role) == text
    assert Role.parse(text) == role
