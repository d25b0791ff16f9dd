"""The format of a local dataset's records, found in its first records without building anything."""

import tempfile
from itertools import islice
from pathlib import Path

from llm.config import SourceConfig
from llm.data.raw.first_records import FIRST_RECORDS, unknown_format
from llm.data.raw.formats import content_of
from llm.data.raw.reading import read_records
from llm.data.raw.record_formats import recognize
from llm.data.raw.records import ReadOptions, Record
from llm.data.sources.fingerprint import list_files
from llm.errors import DataError


def detected_format(source: SourceConfig, role: str) -> str | None:
    """Return the format of the first records of a local dataset of chats or preferences.

    None is returned for text, for a source that is not local files, and where the first file cannot
    be read (a package is missing, say), which the stage that reads it reports.

    Raises:
        DataError: no record has a known format; `clean` would fail.
    """
    content = content_of(role)
    if source.kind != "files" or content == "text":
        return None
    options = ReadOptions(
        content=content,
        format=source.format,
        setting=f"download.{role}",
        text_document_bytes=1,  # without effect on records
        scratch=Path(tempfile.gettempdir()),
    )
    (name, path), *other_files = list_files(source, role).files
    unknown: list[Record] = []
    num_records = 0
    try:
        for record in islice(read_records(path, name, options), FIRST_RECORDS):
            num_records += 1
            if isinstance(record, Record) and not isinstance(record.value, str):
                if found := recognize(record.value, options.formats):
                    return found
                unknown.append(record)
    except DataError:
        return None
    is_all = not other_files and num_records < FIRST_RECORDS
    if unknown and (is_all or len(unknown) == FIRST_RECORDS):
        raise unknown_format(unknown[0], len(unknown), options)
    return None
