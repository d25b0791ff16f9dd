"""Which keys a record of text or of a chat has; a file of other records is an error at once.

A few records that lack a key are counted and left out. Where the first hundred of a file all do,
it is the settings or the file that are wrong, and nobody should wait for the end to hear of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from llm.artifact import Json
from llm.data.content import Content
from llm.data.raw.records import Record
from llm.errors import DataError

FIRST_RECORDS = 100


@dataclass(kw_only=True, slots=True)
class FirstRecords:
    """Looks at the records of one file, from its beginning, until one has a known layout."""

    content: Content
    text_key: str
    setting: str
    """The source: `download.corpus`, `download.chats.sources.1`."""
    num_seen: int = 0
    first: Record | None = field(default=None)

    def see(self, record: Record) -> None:
        """Take the next record.

        Raises:
            DataError: it is the last of FIRST_RECORDS of which none has a known layout.
        """
        if self.num_seen >= FIRST_RECORDS:
            return
        if isinstance(record.value, str) or has_layout(record.value, self.content, self.text_key):
            self.num_seen = FIRST_RECORDS
            return
        self.num_seen += 1
        self.first = self.first or record
        if self.num_seen == FIRST_RECORDS:
            place = self.first.place
            raise DataError(
                f"{place.file}: none of the first {FIRST_RECORDS} records, from line {place.line}"
                f" on, has a known layout; found {shown_keys(self.first)};"
                f" {expected_layout(self.content, self.text_key, self.setting)}"
            )


def has_layout(record: Mapping[str, Json], content: Content, text_key: str) -> bool:
    """Tell whether a record has the keys that are read, whatever they hold."""
    if content == "text":
        return text_key in record
    match record.get("messages"):
        case [dict() as message, *_]:
            return "role" in message and "content" in message
        case None:
            return "instruction" in record and "output" in record
        case _:
            return True


def shown_keys(record: Record) -> str:
    """Return the keys of a record for a message."""
    if isinstance(record.value, str):
        return "text"
    keys = [*record.value, *record.other_keys]
    match record.value.get("messages"):
        case [dict() as message, *_]:
            keys.append(f"in its messages {', '.join(map(repr, message)) or 'none'}")
        case _:
            pass
    return f"the keys {', '.join(map(str, keys)) or 'none'}"


def expected_layout(content: Content, text_key: str, setting: str) -> str:
    """Return what is expected of a record, and what to do."""
    if content == "text":
        return (
            f"expected {text_key!r} to hold the text; name the key that does with"
            f" {setting}.text_key"
        )
    return (
        f"expected 'messages', a list of 'role' and 'content', or else 'instruction', 'output' and"
        f" perhaps 'input'; rename the keys in the files of {setting}, with jq for example: jq -c"
        ' \'{messages: [{role: "user", content: .prompt},'
        ' {role: "assistant", content: .response}]}\''
    )
