"""Read the documents that `clean` left, in any order, without holding them in memory."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

import numpy as np
import numpy.typing as npt

from llm.errors import ArtifactError

SPLITS = ("train", "validation")
SCAN_BYTES = 1 << 22
HEAD_BYTES = 80
SOURCE_NUMBER = re.compile(rb'\{"id":"[0-9a-f]{32}","source":(\d{1,9}),')

Content = Literal["text", "chats"]


class Message(TypedDict):
    """One turn of a chat: who speaks (`system`, `user` or `assistant`), and what."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A text, or the messages of a chat."""

    id: bytes
    """16 bytes."""
    text: str = ""
    messages: tuple[Message, ...] = ()
    kind: str = ""
    """Of a chat, what it asks for, where its source says so; figures are given by it too."""
    size_bytes: int
    """Length of its line in the file."""

    @property
    def texts(self) -> list[str]:
        """Everything that was written in it."""
        return [message["content"] for message in self.messages] if self.messages else [self.text]


class DocumentFile:
    """The documents of `train.jsonl` or `validation.jsonl`, located by their lines' offsets."""

    def __init__(self, folder: Path, split: str) -> None:
        """Find the lines.

        Raises:
            ArtifactError: the file is missing.
        """
        self.path = folder / f"{split}.jsonl"
        self._content: Content = read_content(folder)
        try:
            self._offsets = _line_offsets(self.path)  # (num_documents + 1,)
        except FileNotFoundError as error:
            raise ArtifactError(f"{self.path}: not there; run clean again") from error

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def size_bytes(self) -> int:
        """Length of the file."""
        return int(self._offsets[-1])

    def source_numbers(self) -> npt.NDArray[np.int64]:
        """Return which of several sources each document is from, (num_documents,).

        Raises:
            ArtifactError: a line does not say.
        """
        numbers = np.zeros(len(self), dtype=np.int64)
        with self.path.open("rb", buffering=0) as file:
            for ordinal, start in enumerate(self._offsets[:-1].tolist()):
                head = SOURCE_NUMBER.match(os.pread(file.fileno(), HEAD_BYTES, start))
                if head is None:
                    raise ArtifactError(
                        f"{self.path}:{ordinal + 1}: does not say which source it is from; run"
                        " clean again"
                    )
                numbers[ordinal] = int(head[1])
        return numbers

    def read(self, ordinals: Iterable[int]) -> Iterator[Document]:
        """Yield the documents on the given lines, counted from 0.

        Raises:
            ArtifactError: a line is no document; the message names file and line.
        """
        with self.path.open("rb", buffering=0) as file:
            for ordinal in ordinals:
                start, end = self._offsets[ordinal : ordinal + 2].tolist()
                line = os.pread(file.fileno(), end - start, start)
                try:
                    yield _parse(line, self._content)
                except (ValueError, TypeError, KeyError, RecursionError) as error:
                    raise ArtifactError(
                        f"{self.path}:{ordinal + 1}: no document of kind {self._content}"
                        f" ({type(error).__name__}: {error}); run clean again"
                    ) from error


def read_content(folder: Path) -> Content:
    """Return whether the documents in `folder` are `text` or `chats`.

    Raises:
        ArtifactError: `documents.json` is missing or damaged.
    """
    path = folder / "documents.json"
    try:
        content = json.loads(path.read_bytes())["content"]
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: not there; run clean again") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ArtifactError(f"{path}: damaged ({error!r}); run clean again") from error
    if content not in ("text", "chats"):
        raise ArtifactError(f"{path}: content is {content!r}, expected text or chats")
    return content


def _line_offsets(path: Path) -> npt.NDArray[np.int64]:
    """Return where each line starts, and at last the length of the file."""
    offsets, size_bytes = [np.zeros(1, dtype=np.int64)], 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(SCAN_BYTES):
            line_ends = np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n"))
            offsets.append(line_ends + size_bytes + 1)
            size_bytes += len(block)
    if offsets[-1].size == 0 or offsets[-1][-1] != size_bytes:
        offsets.append(np.array([size_bytes], dtype=np.int64))  # a last line without an end
    return np.concatenate(offsets)


def _parse(line: bytes, content: Content) -> Document:
    record = cast(dict[str, Any], json.loads(line))
    identifier = bytes.fromhex(record["id"])
    if len(identifier) != 16:
        raise ValueError(f"an id of {len(identifier)} bytes, expected 16")
    if content == "text":
        return Document(id=identifier, text=_string(record["text"]), size_bytes=len(line))
    messages = tuple(
        Message(role=_string(message["role"]), content=_string(message["content"]))
        for message in record["messages"]
    )
    if not messages:
        raise ValueError("a chat without messages")
    return Document(
        id=identifier,
        messages=messages,
        kind=_string(record.get("kind", "")),
        size_bytes=len(line),
    )


def _string(value: Any) -> str:
    """Return `value` if it is text that UTF-8 can say; a lone surrogate is a ValueError."""
    if not isinstance(value, str):
        raise TypeError(f"found {value!r}, expected text")
    value.encode()
    return value
