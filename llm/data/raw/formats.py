"""Raw file formats by file name, shared by the code that lists files and the code that reads them.

`corpus.jsonl`, `corpus.jsonl.zst` and `corpus.tar.gz` are read as their suffixes say; members of an
archive by the suffixes of their own names.
"""

from dataclasses import dataclass

from llm.data.content import Content
from llm.errors import DataError
from llm.role import Role

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
RECORD_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
COMPRESSION_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
ARCHIVE_SUFFIXES = (".zip", ".tar")
SHORT_SUFFIXES = {".tgz": ".tar.gz", ".tzst": ".tar.zst", ".tbz2": ".tar.bz2", ".txz": ".tar.xz"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """How to read a file, by the suffixes of its name."""

    suffix: str
    """Of the data itself, or of the archive."""
    compression: str = ""
    """Suffix of the compression; empty for none."""

    @property
    def is_archive(self) -> bool:
        """Whether the file is an archive of others."""
        return self.suffix in ARCHIVE_SUFFIXES


def format_of(name: str) -> Format | None:
    """Return the format of a file of this name, None for an unknown one."""
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
    """Return what a dataset holds by its name up to the first hyphen.

    `corpus` is text; `chats`, `chats-math` and `chats.sources.1` are chats.
    """
    contents: dict[str, Content] = {
        "corpus": "text",
        "chats": "chats",
        "preferences": "preferences",
    }
    return contents[Role.parse(role).name.partition("-")[0]]


def is_readable(name: str, role: str) -> bool:
    """Return whether a source of this role can be read from such a file; only text has no keys."""
    found = format_of(name)
    is_text = found is not None and found.suffix in TEXT_SUFFIXES
    return found is not None and not (is_text and content_of(role) != "text")


def readable_suffixes(role: str) -> str:
    """Return the suffixes that can be read as `role`, for an error message."""
    suffixes = RECORD_SUFFIXES if content_of(role) != "text" else TEXT_SUFFIXES + RECORD_SUFFIXES
    return (
        f"{', '.join(suffixes)} (optionally compressed: {', '.join(COMPRESSION_SUFFIXES)}) or"
        f" {', '.join(ARCHIVE_SUFFIXES)}"
    )


def refuse_name(name: str, role: str, key: str) -> None:
    """Raise when a file of this name cannot be read.

    Raises:
        DataError: naming the setting `download.<role>.<key>`.
    """
    if not is_readable(name, role):
        raise DataError(
            f"download.{role}.{key}: the format of {name} is unknown, expected"
            f" {readable_suffixes(role)}; convert or rename it"
        )
