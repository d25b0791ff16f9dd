"""The first records of a file: one of a known format must be among them.

Single records of an unknown format are dropped and counted. If the first hundred of a file all are,
the settings or the file are wrong, which is an error at once and not after hours of reading.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from llm.artifact import Json
from llm.data.raw.record_formats import AUTO, MESSAGE_LISTS, RecordFormat, recognize
from llm.data.raw.records import ReadOptions, Record
from llm.errors import DataError

FIRST_RECORDS = 100


@dataclass(slots=True)
class FirstRecords:
    """Checks the format of a file's records until one is known."""

    options: ReadOptions
    num_checked: int = 0
    first: Record | None = None

    def check(self, record: Record) -> None:
        """Check the next record.

        Raises:
            DataError: it is the last of FIRST_RECORDS of which none has a known format.
        """
        if self.num_checked >= FIRST_RECORDS:
            return
        if isinstance(record.value, str) or has_format(record.value, self.options):
            self.num_checked = FIRST_RECORDS
            return
        self.num_checked += 1
        self.first = self.first or record
        if self.num_checked == FIRST_RECORDS:
            raise unknown_format(self.first, FIRST_RECORDS, self.options)


def has_format(record: Mapping[str, Json], options: ReadOptions) -> bool:
    """Return whether a record has the keys that are read, whatever their values."""
    if options.content == "text":
        return options.text_key in record
    return bool(recognize(record, options.formats))


def unknown_format(first: Record, num_records: int, options: ReadOptions) -> DataError:
    """Return the error for a file whose first records, `first` and more, have no known format."""
    location = first.location
    return DataError(
        f"{location.file}: none of the first {num_records} records, from line {location.line} on,"
        f" has a known format; found {shown_keys(first)}; {expected_format(options)}"
    )


def shown_keys(record: Record) -> str:
    """Return the keys of a record for an error message."""
    if isinstance(record.value, str):
        return "text"
    keys = [*record.value, *record.other_keys]
    for name in MESSAGE_LISTS:
        match record.value.get(name):
            case [dict() as message, *_]:
                keys.append(f"in its {name} {', '.join(map(repr, message)) or 'none'}")
            case _:
                pass
    return f"the keys {', '.join(map(str, keys)) or 'none'}"


def expected_format(options: ReadOptions) -> str:
    """Return the expected keys and the remedy, for an error message."""
    if options.content == "text":
        return (
            f"expected {options.text_key!r} to hold the text; name the key that does with"
            f" {options.setting}.text_key"
        )
    known = ", ".join(_shown(name, layout) for name, layout in options.formats.items())
    remedy = f"; or set {options.setting}.format to {AUTO}" if options.format != AUTO else ""
    answers = "response: .B" if options.content == "chats" else "chosen: .B, rejected: .C"
    return (
        f"known formats of {options.content}: {known}; rename the keys in the files, with jq for"
        f" example: jq -c '{{prompt: .A, {answers}}}'{remedy}"
    )


def _shown(name: str, layout: RecordFormat) -> str:
    return f"{name} ({', '.join(layout.keys)})"
