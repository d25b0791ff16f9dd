"""Rows of tokens on disk: written once by `pack`, read memory-mapped by training and evaluation.

A row holds T + 1 tokens: positions 0 .. T-1 are the inputs and 1 .. T the targets. Files of a split
of N rows, little endian:

    <split>.tokens.bin          uint16 or uint32 (N, T+1)
    <split>.mask.bin            uint8 (N, T+1), chats only: 1 where the token is a target to learn
    <split>.first_document.bin  uint64 (N,): the document a row begins in, its place in packed order
    <split>.document_ids.bin    16 bytes a document, in packed order
    <split>.kinds.bin           uint16 a document, chats only: a place in `SplitInfo.kinds`

and `pack.json`. Every document begins with bos, so document boundaries need no further file.

Shapes: B rows read, T positions, N rows in the split.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from llm.artifact import ArtifactWriter, Json
from llm.data.permutation import permute
from llm.errors import ArtifactError
from llm.seeds import derive_seed

PACK_JSON = "pack.json"
FORMAT, VERSION = "fromscratch.rows", 1
DOCUMENT_ID_BYTES = 16
MAX_KINDS = 1000  # a source that gives every chat a kind of its own says nothing by it
OTHER_KINDS = "other"


@dataclass(frozen=True, kw_only=True, slots=True)
class RowLayout:
    """What all rows of an artifact have in common."""

    seq_len: int
    """T: positions in a row."""
    vocab_size: int
    """Ids run from 0 to vocab_size - 1."""
    content: Literal["text", "chats"]
    """text: every token but padding is a target; chats: the mask says which."""
    bos_id: int
    """Begins every document."""
    pad_id: int
    """Fills the end of a row."""

    @property
    def dtype(self) -> str:
        """The type of a token on disk."""
        return "uint16" if self.vocab_size <= 1 << 16 else "uint32"


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitInfo:
    """The figures of one split."""

    num_rows: int
    num_documents: int
    num_tokens: int
    """Tokens of all documents; the one by which a row repeats the end of another counts once."""
    num_padding_tokens: int
    num_target_tokens: int
    num_bytes: int
    """UTF-8 bytes that the targets stand for: all of a text, the assistant's words of a chat."""
    num_split_chats: int
    """Chats longer than a row, which go on in the next."""
    kinds: tuple[str, ...] = ()
    """What the chats ask for, where their source says so; `kinds.bin` counts in this list."""


class RowArrays(NamedTuple):
    """Some rows, (B, T+1) each: tokens, whether each is a target, its document's ordinal."""

    tokens: npt.NDArray[np.int64]
    mask: npt.NDArray[np.bool_]
    document_ids: npt.NDArray[np.int64]


class RowWriter:
    """Write the rows of one split and count what they hold."""

    def __init__(
        self,
        writer: ArtifactWriter,
        split: str,
        layout: RowLayout,
        token_bytes: npt.NDArray[np.int64],
    ) -> None:
        self.layout = layout
        self.num_split_chats = 0  # counted by the packer, which alone knows
        self._token_bytes = token_bytes
        self._stack = ExitStack()
        names = ["tokens", "first_document", "document_ids"]
        names += ["mask", "kinds"] if layout.content == "chats" else []
        self._files: dict[str, IO[bytes]] = {
            name: self._stack.enter_context(writer.open(f"{split}.{name}.bin")) for name in names
        }
        self._num_rows = self._num_documents = self._num_tokens = 0
        self._num_padding = self._num_targets = self._num_bytes = 0
        self._last_document = -1
        self._kinds: dict[str, int] = {}

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def write_rows(
        self,
        tokens: npt.NDArray[np.uint32],
        mask: npt.NDArray[np.bool_] | None,
        first_documents: npt.NDArray[np.int64],
    ) -> None:
        """Append rows: tokens (B, T+1), mask (B, T+1) for chats, first_documents (B,)."""
        is_padding = tokens == self.layout.pad_id
        targets = ~is_padding if mask is None else mask & ~is_padding
        targets[:, 0] = False  # the input before it is in another row
        self._files["tokens"].write(tokens.astype(_little_endian(self.layout)).tobytes())
        self._files["first_document"].write(first_documents.astype("<u8").tobytes())
        if mask is not None:
            self._files["mask"].write(targets.tobytes())
        last = first_documents + (tokens[:, 1:] == self.layout.bos_id).sum(axis=1)
        before = np.concatenate([[self._last_document], last[:-1]])
        self._last_document = int(last[-1])
        num_repeated = int((first_documents == before).sum())  # rows that go on with a document
        self._num_rows += len(tokens)
        self._num_padding += int(is_padding.sum())
        self._num_tokens += int((~is_padding).sum()) - num_repeated
        self._num_targets += int(targets.sum())
        self._num_bytes += int(self._token_bytes[tokens[targets]].sum())

    def write_documents(self, documents: Sequence[tuple[bytes, str]]) -> None:
        """Append the ids, 16 bytes each, and kinds of the next documents in packed order."""
        assert all(len(identifier) == DOCUMENT_ID_BYTES for identifier, _ in documents)
        self._files["document_ids"].write(b"".join(identifier for identifier, _ in documents))
        if "kinds" in self._files:
            numbers = [self._kind_number(kind) for _, kind in documents]
            self._files["kinds"].write(np.array(numbers, dtype="<u2").tobytes())
        self._num_documents += len(documents)

    def _kind_number(self, kind: str) -> int:
        if kind not in self._kinds and len(self._kinds) >= MAX_KINDS:
            kind = OTHER_KINDS
        return self._kinds.setdefault(kind, len(self._kinds))

    def info(self) -> SplitInfo:
        """Return the figures of what was written so far."""
        assert self._last_document == self._num_documents - 1
        return SplitInfo(
            num_rows=self._num_rows,
            num_documents=self._num_documents,
            num_tokens=self._num_tokens,
            num_padding_tokens=self._num_padding,
            num_target_tokens=self._num_targets,
            num_bytes=self._num_bytes,
            num_split_chats=self.num_split_chats,
            kinds=tuple(self._kinds),
        )


def write_pack_json(
    writer: ArtifactWriter,
    layout: RowLayout,
    splits: Mapping[str, SplitInfo],
    sources: Sequence[Mapping[str, Json]] = (),
) -> None:
    """Write `pack.json`, by which `Rows` reads the other files.

    `sources` says of a mixture, for people, what each of its sources gave to the training rows.
    """
    head = {"format": FORMAT, "version": VERSION, "dtype": layout.dtype}
    infos = {split: asdict(info) for split, info in splits.items()}
    mixture = {"sources": list(sources)} if sources else {}
    writer.write_json(PACK_JSON, head | asdict(layout) | {"splits": infos} | mixture)


class Rows:
    """The rows of one split, memory-mapped: only the rows asked for are read."""

    def __init__(self, folder: Path, split: str) -> None:
        """Open a split of a pack artifact.

        Raises:
            ArtifactError: a file is missing, damaged or of another size than `pack.json` says.
        """
        self.layout, infos = _read_pack_json(folder)
        if split not in infos:
            raise ArtifactError(f"{folder}: no split {split}; there are {', '.join(infos)}")
        self.info = infos[split]
        self.num_rows, self.seq_len = self.info.num_rows, self.layout.seq_len
        width = self.seq_len + 1
        N, D = self.num_rows, self.info.num_documents

        def map_file(name: str, kind: npt.DTypeLike, shape: tuple[int, ...]) -> npt.NDArray[Any]:
            return _map_file(folder / f"{split}.{name}.bin", np.dtype(kind), shape)

        self._tokens = map_file("tokens", _little_endian(self.layout), (N, width))
        self._first_document = map_file("first_document", "<u8", (N,))
        self._document_ids = map_file("document_ids", "u1", (D, DOCUMENT_ID_BYTES))
        has_mask = self.layout.content == "chats"
        self._mask = map_file("mask", "u1", (N, width)) if has_mask else None
        self._kinds = map_file("kinds", "<u2", (D,)) if has_mask else None

    def read(self, indices: npt.ArrayLike) -> RowArrays:
        """Return the rows at `indices` (B,)."""
        indices = np.asarray(indices, dtype=np.int64)
        tokens = self._tokens[indices].astype(np.int64)  # (B,) -> (B, T+1)
        if self._mask is None:
            mask = tokens != self.layout.pad_id
            mask[:, 0] = False
        else:
            mask = self._mask[indices] != 0
        document_ids = (tokens == self.layout.bos_id).astype(np.int64)
        document_ids[:, 0] = self._first_document[indices]
        np.cumsum(document_ids, axis=1, out=document_ids)
        return RowArrays(tokens, mask, document_ids)

    def kind(self, ordinal: int) -> str:
        """Return what the chat `ordinal` asks for, or nothing where its source did not say."""
        return "" if self._kinds is None else self.info.kinds[int(self._kinds[ordinal])]

    def source_id(self, ordinal: int) -> str:
        """Return the id, 32 hexadecimal characters, that `clean` gave the document `ordinal`."""
        return self._document_ids[ordinal].tobytes().hex()


def row_order(
    seed: int, epoch: int, indices: npt.ArrayLike, num_rows: int
) -> npt.NDArray[np.int64]:
    """Return the rows at places `indices` (0 .. num_rows - 1) of an epoch's order.

    A function of its arguments alone: no state to lose, the same on any number of processes.
    """
    return permute(indices, num_rows, derive_seed(seed, "row order", epoch))


def _little_endian(layout: RowLayout) -> np.dtype[Any]:
    return np.dtype(layout.dtype).newbyteorder("<")


def _read_pack_json(folder: Path) -> tuple[RowLayout, dict[str, SplitInfo]]:
    path = folder / PACK_JSON
    try:
        data = json.loads(path.read_bytes())
        found = (data.pop("format"), data.pop("version"))
        if found != (FORMAT, VERSION):
            raise ValueError(f"format and version {found}, expected {(FORMAT, VERSION)}")
        infos: dict[str, SplitInfo] = {}
        for split, info in data.pop("splits").items():
            info["kinds"] = tuple(info["kinds"])
            infos[split] = SplitInfo(**info)
        dtype = data.pop("dtype")
        data.pop("sources", None)  # of a mixture, for people
        layout = RowLayout(**data)
        if layout.dtype != dtype:
            raise ValueError(f"dtype {dtype} for a vocabulary of {layout.vocab_size}")
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: not there; run pack") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(f"{path}: damaged ({error!r}); run pack again") from error
    return layout, infos


def _map_file(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    expected = dtype.itemsize * int(np.prod(shape))
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: not there; run pack again") from error
    if size != expected or size == 0:
        raise ArtifactError(f"{path}: {size} bytes, expected {expected}; run pack again")
    return np.memmap(path, dtype=dtype, mode="r", shape=shape).view(np.ndarray)
