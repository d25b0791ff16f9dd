"""Read the documents that `clean` left, in any order, without holding them in memory."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from llm.data.chat import Message
from llm.errors import ArtifactError

SPLITS = ("train", "validation")
SCAN_BYTES = 1 << 22

Content = Literal["text", "chats"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One document: its text, or its messages."""

    id: bytes
    """16 bytes."""
    text: str = ""
    messages: tuple[Message, ...] = ()
    size_bytes: int
    """Length of its line in the file."""

    @property
    def texts(self) -> list[str]:
        """Everything a person wrote in it."""
        return [message["content"] for message in self.messages] if self.messages else [self.text]


class DocumentFile:
    """The documents of `train.jsonl` or `validation.jsonl`, located by their lines' offsets."""

    def __init__(self, folder: Path, split: str) -> None:
        """Open the file and find its lines.

        Raises:
            ArtifactError: it is missing.
        """
        self.path = folder / f"{split}.jsonl"
        self._content: Content = read_content(folder)
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise ArtifactError(f"{self.path}: not there; run clean again") from error
        self._offsets = self._line_offsets()  # (num_documents + 1,)

    def __enter__(self) -> "DocumentFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def size_bytes(self) -> int:
        """Length of the file."""
        return int(self._offsets[-1])

    def read(self, ordinals: Iterable[int]) -> Iterator[Document]:
        """Yield the documents on the given lines, counted from 0.

        Raises:
            ArtifactError: a line is no document; the message names file and line.
        """
        for ordinal in ordinals:
            start, end = int(self._offsets[ordinal]), int(self._offsets[ordinal + 1])
            line = os.pread(self._descriptor, end - start, start)
            try:
                yield _parse(line, self._content)
            except (ValueError, TypeError, KeyError) as error:
                raise ArtifactError(
                    f"{self.path}:{ordinal + 1}: no document of kind {self._content}"
                    f" ({type(error).__name__}: {error}); run clean again"
                ) from error

    def _line_offsets(self) -> npt.NDArray[np.int64]:
        """Return where each line starts, and at last the length of the file."""
        size = os.fstat(self._descriptor).st_size
        ends: list[npt.NDArray[np.int64]] = [np.zeros(1, dtype=np.int64)]
        for start in range(0, size, SCAN_BYTES):
            piece = os.pread(self._descriptor, SCAN_BYTES, start)
            ends.append(
                np.flatnonzero(np.frombuffer(piece, dtype=np.uint8) == ord("\n")) + start + 1
            )
        offsets = np.concatenate(ends)
        return offsets if offsets[-1] == size else np.append(offsets, size)


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
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{path}: damaged ({error!r}); run clean again") from error
    if content not in ("text", "chats"):
        raise ArtifactError(f"{path}: content is {content!r}, expected text or chats")
    return content


def _parse(line: bytes, content: Content) -> Document:
    record = cast(dict[str, Any], json.loads(line))
    identifier = bytes.fromhex(record["id"])
    if len(identifier) != 16:
        raise ValueError(f"id of {len(identifier)} bytes, expected 16")
    if content == "text":
        if not isinstance(record["text"], str):
            raise TypeError("text is no string")
        return Document(id=identifier, text=record["text"], size_bytes=len(line))
    messages = tuple(_parse_message(message) for message in record["messages"])
    if not messages:
        raise ValueError("a chat without messages")
    return Document(id=identifier, messages=messages, size_bytes=len(line))


def _parse_message(record: dict[str, Any]) -> Message:
    role, content = record["role"], record["content"]
    if not (isinstance(role, str) and isinstance(content, str)):
        raise TypeError("the role or content of a message is no string")
    return Message(role=role, content=content)
