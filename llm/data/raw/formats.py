"""Name the raw file formats: who lists files and who reads them agree here.

`corpus.jsonl`, `corpus.jsonl.zst` and `corpus.tar.gz` are read by what their names say; what is in
an archive is read by the names of its members.
"""

from dataclasses import dataclass

from llm.data.content import Content
from llm.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
RECORD_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
COMPRESSION_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
ARCHIVE_SUFFIXES = (".zip", ".tar")
SHORT_SUFFIXES = {".tgz": ".tar.gz", ".tzst": ".tar.zst", ".tbz2": ".tar.bz2", ".txz": ".tar.xz"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """How a file is read, by the endings of its name."""

    suffix: str
    """Of the data itself, or of the archive."""
    compression: str = ""
    """Its suffix; empty for none."""

    @property
    def is_archive(self) -> bool:
        """Whether there are files inside it."""
        return self.suffix in ARCHIVE_SUFFIXES


def format_of(name: str) -> Format | None:
    """Return how to read a file of this name, None where the name does not say."""
    name = name.lower()
    for short, long in SHORT_SUFFIXES.items():
        name = name.removesuffix(short) + long if name.endswith(short) else name
    compression = next((suffix for suffix in COMPRESSION_SUFFIXES if name.endswith(suffix)), "")
    name = name.removesuffix(compression)
    for suffix in (*TEXT_SUFFIXES, *RECORD_SUFFIXES, *ARCHIVE_SUFFIXES):
        if name.endswith(suffix) and not (suffix == ".zip" and compression):
            return Format(suffix=suffix, compression=compression)
    return None


def content_of(role: str) -> Content:
    """Return what a source holds by its role: `corpus` is text, `chats.sources.1` are chats."""
    contents: dict[str, Content] = {"corpus": "text", "chats": "chats"}
    return contents[role.partition(".")[0]]


def keys_of(content: Content, text_key: str) -> tuple[str, ...]:
    """Return the keys of a record that are read; of a chat, those of both ways to write it."""
    chat_keys = ("messages", "instruction", "input", "output", "kind", "group")
    return chat_keys if content == "chats" else (text_key,)


def is_readable(name: str, role: str) -> bool:
    """Tell whether a source of this role is read from files of this name; chats are records."""
    found = format_of(name)
    is_text = found is not None and found.suffix in TEXT_SUFFIXES
    return found is not None and not (is_text and content_of(role) == "chats")


def endings(role: str) -> str:
    """Return the file endings a source of this role is read from, for a message."""
    suffixes = RECORD_SUFFIXES if content_of(role) == "chats" else TEXT_SUFFIXES + RECORD_SUFFIXES
    return (
        f"{', '.join(suffixes)}, nor in one of these and {', '.join(COMPRESSION_SUFFIXES)}, nor in"
        f" {', '.join(ARCHIVE_SUFFIXES)}"
    )


def refuse_name(name: str, role: str, key: str) -> None:
    """Raise when a file of this name cannot be read.

    Raises:
        DataError: naming the setting `download.<role>.<key>`.
    """
    if not is_readable(name, role):
        raise DataError(
            f"download.{role}.{key}: {name} ends in none of {endings(role)}, so there is no knowing"
            " how to read it; convert or rename it"
        )
