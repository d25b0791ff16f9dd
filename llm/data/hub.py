"""Read a dataset of the Hugging Face hub, pinned to a commit, record by record."""

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

from llm.artifact import Json
from llm.config import SourceConfig
from llm.data.formats import content_of
from llm.errors import DataError

CHAT_KEYS = ("messages", "instruction", "input", "output", "kind", "group")


def hub_records(source: SourceConfig, role: str) -> Iterator[dict[str, Json]]:
    """Yield the records of a hub dataset, streamed, with the keys that `clean` reads.

    The token of a private dataset comes from the environment (HF_TOKEN) alone.

    Raises:
        DataError: there is no such dataset, configuration, split, commit or key.
        ConnectionError: the hub cannot be reached.
    """
    try:
        from datasets import exceptions, load_dataset  # slow to import, and absent on a bare node
    except ImportError as error:
        raise DataError(
            f"download.{role}.kind: hub needs the package `datasets`; pip install datasets, or set"
            " another kind"
        ) from error
    keys = CHAT_KEYS if content_of(role) == "chats" else (source.text_key,)
    name = f"download.{role}: the dataset {source.hub_name} at {source.hub_revision[:12]}"
    try:
        stream = load_dataset(
            source.hub_name,
            source.hub_config or None,
            split=source.hub_split,
            revision=source.hub_revision,
            streaming=True,
            token=os.environ.get("HF_TOKEN") or False,
        )
        for record in cast(Iterable[Mapping[str, Any]], stream):
            found = {key: record[key] for key in keys if record.get(key) is not None}
            if not found and not any(key in record for key in keys):
                raise DataError(
                    f"{name} has the keys {', '.join(record)}, none of {', '.join(keys)}"
                    + ("" if len(keys) > 1 else f"; set download.{role}.text_key")
                )
            yield found
    except (exceptions.DatasetsError, ValueError, KeyError) as error:
        raise DataError(f"{name} cannot be read: {error}") from error
    except OSError as error:
        raise ConnectionError(f"{name} cannot be reached: {error}") from error
