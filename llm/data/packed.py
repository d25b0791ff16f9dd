"""Packed sequences on disk: written once by `pack`, memory-mapped by training and evaluation.

A sequence holds T + 1 tokens: positions 0 .. T-1 are the inputs and 1 .. T the targets. It consists
of segments of documents, then padding. A segment that continues a document repeats the last token
of the segment before, so that its next token has an input; each token is a target once at most.

`pack.json` lists the shards of each split. The files of one, with N sequences, P segments and D
documents (sequences are called rows on disk, and segments pieces):

    <split>/00000.tokens.bin        uint16 or uint32 (N, T+1)
    <split>/00000.mask.bin          uint8 (N, T+1), not of text: 1 where the token is a target
    <split>/00000.pieces.bin        uint32 (P, 3), by sequence: a segment's document, the position
                                    of its first token there, and the same in the sequence
    <split>/00000.first_pieces.bin  uint64 (N + 1, 1): the first segment of each sequence, and P
    <split>/00000.document_ids.bin  uint8 (D, 16): the ids that `clean` gave
    <split>/00000.kinds.bin         uint16 (D, 1), not of text: an index into `PackedShard.kinds`

A preference pair is one document: the prompt with the chosen answer, then the prompt with the
rejected one, each beginning with bos. The targets are the tokens of both answers and their ends.

All are little endian and begin with a header of 64 bytes: see `HEADER`.

Shapes: B sequences read, T positions, N sequences, P segments and D documents of a shard.
"""

import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llm.artifact import ArtifactWriter, Json
from llm.data.content import Content
from llm.data.permutation import permute
from llm.errors import ArtifactError
from llm.seeds import derive_seed

PACK_JSON = "pack.json"
PACK_FORMAT, PACK_VERSION = "fromscratch.rows", 2
MAGIC = b"\x89FSROWS\n"
HEADER = struct.Struct("<8sI4x8s16sQQ8x")  # magic, version, dtype, name, shape
DOCUMENT_ID_BYTES = 16
PADDING_ID = -1  # instead of a document's ordinal


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedLayout:
    """What all sequences of an artifact have in common."""

    seq_len: int
    """T: positions in a sequence."""
    vocab_size: int
    """Ids run from 0 to vocab_size - 1."""
    content: Content
    """text: all tokens but padding are targets; else those of the mask."""
    bos_id: int
    """First token of every document, and of each half of a preference pair."""
    pad_id: int
    """Fills the end of a sequence."""

    @property
    def dtype(self) -> str:
        """Of tokens on disk."""
        return "<u2" if self.vocab_size <= 1 << 16 else "<u4"


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedCounts:
    """Counts of a shard, or of all shards of a split together, named as in `pack.json`."""

    num_rows: int = 0
    """Sequences."""
    num_documents: int = 0
    num_cut_documents: int = 0
    """Documents with tokens that cannot attend to all before them, in another sequence."""
    num_pieces: int = 0
    """Segments."""
    num_tokens: int = 0
    """Tokens of all documents; one that a segment repeats counts once."""
    num_padding_tokens: int = 0
    num_target_tokens: int = 0
    num_bytes: int = 0
    """UTF-8 bytes of the targets: all of a text, the assistant's messages of a chat, and template
    text that shares a token with them.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedShard:
    """The entry of a shard in `pack.json`."""

    counts: PackedCounts
    kinds: tuple[str, ...] = ()
    """Kinds of chats, such as a task's name, if their source has them."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "PackedShard":
        """Make an entry from its JSON."""
        return cls(counts=PackedCounts(**data["counts"]), kinds=tuple(data["kinds"]))


class PackedArrays(NamedTuple):
    """B packed sequences, (B, T+1) each."""

    tokens: npt.NDArray[np.int64]
    mask: npt.NDArray[np.bool_]
    """Whether each token is a target."""
    document_ids: npt.NDArray[np.int64]
    """The ordinal of each token's document; PADDING_ID for padding."""

    def attention_ids(self, document_mask: bool) -> npt.NDArray[np.int64]:
        """Return ids (B, T+1) for bidirectional attention: a token attends to tokens of its id.

        With `document_mask` that is its document, else the whole sequence without padding.
        """
        return self.document_ids if document_mask else np.minimum(self.document_ids, 0)

    def all_targets(self) -> npt.NDArray[np.bool_]:
        """Return whether each token is a target if the mask leaves no token of a document out.

        That adds all tokens of chats but the first; of text it adds none.
        """
        inside = self.document_ids[:, 1:] == self.document_ids[:, :-1]  # (B, T)
        inside &= self.document_ids[:, 1:] != PADDING_ID
        first = np.zeros((len(inside), 1), dtype=np.bool_)  # its input is in another sequence
        return self.mask | np.concatenate([first, inside], axis=1)  # (B, T+1)

    def half_ids(self, bos_id: int) -> npt.NDArray[np.int64]:
        """Return, of preference pairs, the half of each token (B, T+1); PADDING_ID for padding.

        Halves are numbered in their sequence: 2 n is the prompt with the chosen answer of pair n,
        2 n + 1 the prompt with the rejected one. As ids of attention they keep halves apart.
        """
        # every half begins with bos, and no text gives a control token
        halves = np.cumsum(self.tokens == bos_id, axis=1) - 1  # (B, T+1)
        return np.where(self.document_ids == PADDING_ID, PADDING_ID, halves)


def file_shapes(layout: PackedLayout, counts: PackedCounts) -> dict[str, tuple[str, int, int]]:
    """Return the dtype and the shape of every file of a shard."""
    N, D, width = counts.num_rows, counts.num_documents, layout.seq_len + 1
    shapes = {
        "tokens": (layout.dtype, N, width),
        "pieces": ("<u4", counts.num_pieces, 3),
        "first_pieces": ("<u8", N + 1, 1),
        "document_ids": ("<u1", D, DOCUMENT_ID_BYTES),
    }
    with_mask = {"mask": ("<u1", N, width), "kinds": ("<u2", D, 1)}
    return shapes | (with_mask if layout.content != "text" else {})


def file_header(name: str, dtype: str, shape: tuple[int, int]) -> bytes:
    """Return the first bytes of a file."""
    return HEADER.pack(MAGIC, PACK_VERSION, dtype.encode(), name.encode(), *shape)


def starts(counts: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Return the sum of the counts before each."""
    counts = np.asarray(counts, dtype=np.int64)
    return np.cumsum(counts) - counts


def write_pack_json(
    writer: ArtifactWriter,
    layout: PackedLayout,
    splits: Mapping[str, Sequence[PackedShard]],
    sources: Sequence[Mapping[str, Json]] = (),
) -> None:
    """Write `pack.json`, from which `PackedSequences` finds and checks the other files.

    `sources` reports, for people, what each source of a mixture gave to training.
    """
    head = {"format": PACK_FORMAT, "version": PACK_VERSION, "dtype": layout.dtype}
    infos = {split: [asdict(info) for info in shards] for split, shards in splits.items()}
    mixture = {"sources": list(sources)} if sources else {}
    writer.write_json(PACK_JSON, head | asdict(layout) | {"splits": infos} | mixture)


def shard_prefix(split: str, number: int) -> str:
    """Return the beginning of the names of a shard's files."""
    return f"{split}/{number:05}."


def add_counts(shards: Sequence[PackedShard]) -> PackedCounts:
    """Return the sum of the shards' counts."""
    names = [known.name for known in fields(PackedCounts)]
    return PackedCounts(**{name: sum(getattr(s.counts, name) for s in shards) for name in names})


class PackedSequences:
    """The packed sequences of one split, memory-mapped."""

    def __init__(self, folder: Path, split: str) -> None:
        """Open a split of a pack artifact; its shards are opened when first read.

        Raises:
            ArtifactError: `pack.json` is missing or damaged, or does not know the split.
        """
        self.layout, splits = _read_pack_json(folder)
        if split not in splits:
            raise ArtifactError(f"{folder}: no split {split}; there are {', '.join(splits)}")
        self.split, infos = split, splits[split]
        self.info = add_counts(infos)
        self.num_sequences, self.seq_len = self.info.num_rows, self.layout.seq_len
        self._first_sequences = starts([info.counts.num_rows for info in infos])
        self._first_documents = starts([info.counts.num_documents for info in infos])
        self._shards = [
            _Shard(folder, shard_prefix(split, number), self.layout, info)
            for number, info in enumerate(infos)
        ]

    def read(self, indices: npt.ArrayLike) -> PackedArrays:
        """Return the sequences at `indices` (B,).

        Raises:
            ArtifactError: a file of a shard is missing, or not what `pack.json` says.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < self.num_sequences:
            raise IndexError(
                f"sequences {indices.min()} to {indices.max()} of {self.num_sequences}"
            )
        shape = len(indices), self.seq_len + 1
        arrays = PackedArrays(
            tokens=np.empty(shape, dtype=np.int64),
            mask=np.empty(shape, dtype=np.bool_),
            document_ids=np.empty(shape, dtype=np.int64),
        )
        numbers = np.searchsorted(self._first_sequences, indices, side="right") - 1
        order = np.argsort(numbers, kind="stable")
        for where in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
            if len(where):
                number = int(numbers[where[0]])
                found = self._shards[number].read(indices[where] - self._first_sequences[number])
                arrays.tokens[where], arrays.mask[where] = found.tokens, found.mask
                arrays.document_ids[where] = found.document_ids + self._first_documents[number]
        arrays.document_ids[arrays.tokens == self.layout.pad_id] = PADDING_ID
        return arrays

    def cut_documents(self) -> npt.NDArray[np.int64]:
        """Return the ordinals of the documents with several segments, ascending."""
        found = [np.zeros(0, dtype=np.int64)]
        for shard, first in zip(self._shards, self._first_documents, strict=True):
            found.append(first + np.flatnonzero(np.bincount(shard.array("pieces")[:, 0]) > 1))
        return np.concatenate(found)

    def document_ids(self) -> list[str]:
        """Return the ids that `clean` gave, of all documents in the order of their ordinals."""
        arrays = [shard.array("document_ids") for shard in self._shards]
        return [row.tobytes().hex() for array in arrays for row in array]

    def kind(self, ordinal: int) -> str:
        """Return the kind of chat `ordinal`; empty if its source had none."""
        number = int(np.searchsorted(self._first_documents, ordinal, side="right")) - 1
        return self._shards[number].kind(ordinal - int(self._first_documents[number]))


class _Shard:
    """The files of a shard, each mapped on first use."""

    def __init__(self, folder: Path, prefix: str, layout: PackedLayout, info: PackedShard) -> None:
        self._folder, self._prefix, self._layout, self._info = folder, prefix, layout, info
        self._arrays: dict[str, npt.NDArray[Any]] = {}

    def read(self, indices: npt.NDArray[np.int64]) -> PackedArrays:
        """Return sequences; document ids count from the shard's first document."""
        first_segments = self.array("first_pieces")[:, 0]  # (N + 1,)
        first = first_segments[indices]  # (B,)
        counts = (first_segments[indices + 1] - first).astype(np.int64)
        row = np.repeat(np.arange(len(indices)), counts)  # (segments read,)
        nth = np.arange(len(row)) - np.repeat(starts(counts), counts)
        segments = self.array("pieces")[np.repeat(first.astype(np.int64), counts) + nth]
        document, offset, start = segments.astype(np.int64).T
        tokens = self.array("tokens")[indices]  # (B, T+1)
        if self._layout.content != "text":
            mask = self.array("mask")[indices] != 0
        else:
            mask = tokens != self._layout.pad_id
            mask[:, 0] = False  # its input is in another sequence
            mask[row[offset > 0], start[offset > 0]] = False  # repeated
        document_ids = np.zeros(tokens.shape, dtype=np.int64)
        document_ids[row, start] = np.diff(document, prepend=0)
        document_ids[row[nth == 0], 0] = document[nth == 0]
        np.cumsum(document_ids, axis=1, out=document_ids)
        return PackedArrays(tokens.astype(np.int64), mask, document_ids)

    def kind(self, ordinal: int) -> str:
        """Return the kind of a chat."""
        if self._layout.content == "text":
            return ""
        return self._info.kinds[int(self.array("kinds")[ordinal, 0])]

    def array(self, name: str) -> npt.NDArray[Any]:
        """Return the content of a file."""
        if name in self._arrays:
            return self._arrays[name]
        dtype, *shape = file_shapes(self._layout, self._info.counts)[name]
        try:
            file = (self._folder / f"{self._prefix}{name}.bin").open("rb")
        except FileNotFoundError as error:
            raise ArtifactError(f"{error.filename}: not there; run pack again") from error
        with file:
            self._arrays[name] = _map_file(file, name, dtype, (shape[0], shape[1]))
        return self._arrays[name]


def sequence_order(
    seed: int, epoch: int, indices: npt.ArrayLike, num_sequences: int
) -> npt.NDArray[np.int64]:
    """Return the sequences at `indices` (0 .. num_sequences - 1) of an epoch's order.

    A function of its arguments alone: no state to save, the same on any number of processes.
    """
    return permute(indices, num_sequences, derive_seed(seed, "row order", epoch))


def _read_pack_json(folder: Path) -> tuple[PackedLayout, dict[str, list[PackedShard]]]:
    path = folder / PACK_JSON
    try:
        data = json.loads(path.read_bytes())
        found = (data.pop("format"), data.pop("version"))
        if found != (PACK_FORMAT, PACK_VERSION):
            raise ValueError(f"format and version {found}, expected {(PACK_FORMAT, PACK_VERSION)}")
        splits = {
            split: [PackedShard.from_json(info) for info in infos]
            for split, infos in data.pop("splits").items()
        }
        dtype = data.pop("dtype")
        data.pop("sources", None)  # for people
        layout = PackedLayout(**data)
        if layout.dtype != dtype:
            raise ValueError(f"dtype {dtype} for a vocabulary of {layout.vocab_size}")
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: not there; run pack") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path}: damaged ({error!r}); run pack again") from error
    return layout, splits


def _map_file(file: IO[bytes], name: str, dtype: str, shape: tuple[int, int]) -> npt.NDArray[Any]:
    expected = HEADER.size + np.dtype(dtype).itemsize * shape[0] * shape[1]
    header, size = file.read(HEADER.size), os.fstat(file.fileno()).st_size
    if size != expected:
        raise ArtifactError(f"{file.name}: {size} bytes, expected {expected}; run pack again")
    if header != file_header(name, dtype, shape):
        raise ArtifactError(
            f"{file.name}: its header says {HEADER.unpack(header)}, expected"
            f" {HEADER.unpack(file_header(name, dtype, shape))}; run pack again"
        )
    mapped = np.memmap(file, dtype=dtype, mode="r", offset=HEADER.size, shape=shape)
    return mapped.view(np.ndarray)
