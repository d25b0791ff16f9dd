"""Name the raw file formats: who lists files and who reads them agree here."""

from typing import Literal

from llm.errors import DataError

Content = Literal["text", "chats"]

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
RECORD_SUFFIXES = (".jsonl", ".json")


def content_of(role: str) -> Content:
    """Return what a source holds by its role: `corpus` is text, `chats` are chats."""
    contents: dict[str, Content] = {"corpus": "text", "chats": "chats"}
    return contents[role]


def suffixes_of(role: str) -> tuple[str, ...]:
    """Return the file endings a source of this role is read from; chats are always records."""
    return RECORD_SUFFIXES if content_of(role) == "chats" else TEXT_SUFFIXES + RECORD_SUFFIXES


def refuse_suffix(name: str, role: str, key: str) -> None:
    """Raise when a file of this name cannot be read.

    Raises:
        DataError: naming the setting `download.<role>.<key>`.
    """
    if not name.lower().endswith(suffixes_of(role)):
        raise DataError(
            f"download.{role}.{key}: {name} ends in none of {', '.join(suffixes_of(role))},"
            " so there is no knowing how to read it; convert or rename it"
        )
