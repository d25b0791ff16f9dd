"""The keys expected in records of text and of chats, checked on the first records of a file.

Single records that lack a key are dropped and counted. If the first hundred of a file all do, the
settings or the file are wrong, which is an error at once and not after hours of reading.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from llm.artifact import Json
from llm.data.raw.records import ReadOptions, Record
from llm.errors import DataError

FIRST_RECORDS = 100


@dataclass(slots=True)
class FirstRecords:
    """Checks the layout of a file's records until one is known."""

    options: ReadOptions
    num_checked: int = 0
    first: Record | None = None

    def check(self, record: Record) -> None:
        """Check the next record.

        Raises:
            DataError: it is the last of FIRST_RECORDS of which none has a known layout.
        """
        if self.num_checked >= FIRST_RECORDS:
            return
        if isinstance(record.value, str) or has_layout(record.value, self.options):
            self.num_checked = FIRST_RECORDS
            return
        self.num_checked += 1
        self.first = self.first or record
        if self.num_checked == FIRST_RECORDS:
            location = self.first.location
            raise DataError(
                f"{location.file}: none of the first {FIRST_RECORDS} records, from line"
                f" {location.line} on, has a known layout; found {shown_keys(self.first)};"
                f" {expected_layout(self.options)}"
            )


def has_layout(record: Mapping[str, Json], options: ReadOptions) -> bool:
    """Return whether a record has the keys that are read, whatever their values."""
    if options.content == "text":
        return options.text_key in record
    match record.get("messages"):
        case [dict() as message, *_]:
            return "role" in message and "content" in message
        case None:
            return "instruction" in record and "output" in record
        case _:
            return True


def shown_keys(record: Record) -> str:
    """Return the keys of a record for an error message."""
    if isinstance(record.value, str):
        return "text"
    keys = [*record.value, *record.other_keys]
    match record.value.get("messages"):
        case [dict() as message, *_]:
            keys.append(f"in its messages {', '.join(map(repr, message)) or 'none'}")
        case _:
            pass
    return f"the keys {', '.join(map(str, keys)) or 'none'}"


def expected_layout(options: ReadOptions) -> str:
    """Return the expected keys and the remedy, for an error message."""
    if options.content == "text":
        return (
            f"expected {options.text_key!r} to hold the text; name the key that does with"
            f" {options.setting}.text_key"
        )
    return (
        f"expected 'messages', a list of 'role' and 'content', or else 'instruction', 'output' and"
        f" perhaps 'input'; rename the keys in the files of {options.setting}, with jq for example:"
        ' jq -c \'{messages: [{role: "user", content: .prompt},'
        ' {role: "assistant", content: .response}]}\''
    )
