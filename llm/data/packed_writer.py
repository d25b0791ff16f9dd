"""Pack encoded documents into sequences and write them as the files of a shard.

The format is that of `llm/data/packed.py`.

B rows at once, T positions, N rows, P pieces and D documents of the shard, S tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llm.artifact import ArtifactWriter
from llm.data.packed import (
    DOCUMENT_ID_BYTES,
    PackedCounts,
    PackedLayout,
    PackedShard,
    file_header,
    file_shapes,
    starts,
)

TOKENS_AT_ONCE = 1 << 22
MAX_KINDS = 1000  # a source that gives every chat a kind of its own says nothing by it
OTHER_KINDS = "other"

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedDocument:
    """A document as tokens (S,), the first of them bos, and for chats their mask (S,)."""

    id: bytes
    tokens: npt.NDArray[np.uint32]
    mask: npt.NDArray[np.bool_] | None = None
    kind: str = ""


class Documents:
    """The encoded documents of a shard, held end to end in the type that they have on disk."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.kinds: list[str] = []
        self._tokens, self._mask, self._ids = bytearray(), bytearray(), bytearray()
        self._lengths: list[int] = []

    def add(self, documents: Sequence[EncodedDocument]) -> None:
        """Take the next documents."""
        if not documents:
            return
        assert all(len(document.id) == DOCUMENT_ID_BYTES for document in documents)
        tokens = np.concatenate([document.tokens for document in documents])
        self._tokens += tokens.astype(self.dtype).data.cast("B")
        masks = [document.mask for document in documents if document.mask is not None]
        if masks:
            self._mask += np.concatenate(masks).data.cast("B")
        self._ids += b"".join([document.id for document in documents])
        self._lengths += [len(document.tokens) for document in documents]
        self.kinds += [document.kind for document in documents]

    def __len__(self) -> int:
        return len(self.kinds)

    @property
    def lengths(self) -> Integers:
        """Tokens of each document, (D,)."""
        return np.array(self._lengths, dtype=np.int64)

    @property
    def ids(self) -> npt.NDArray[np.uint8]:
        """The documents' ids, (D, 16)."""
        return np.frombuffer(self._ids, dtype=np.uint8).reshape(-1, DOCUMENT_ID_BYTES)

    @property
    def tokens(self) -> npt.NDArray[Any]:
        """All tokens, (S,)."""
        return np.frombuffer(self._tokens, dtype=self.dtype)

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """Whether each token of chats is to be learned, (S,)."""
        return np.frombuffer(self._mask, dtype=np.bool_)


class Pieces(NamedTuple):
    """How documents lie in rows, (P,) each: row after row, and in a row from its begin on."""

    document: Integers
    offset: Integers
    """The place in its document of a piece's first token."""
    length: Integers
    row: Integers
    start: Integers
    """The place in its row of a piece's first token."""


def write_shard(
    writer: ArtifactWriter,
    prefix: str,
    layout: PackedLayout,
    documents: Documents,
    pieces: Pieces,
    token_bytes: npt.NDArray[np.int64],
) -> PackedShard:
    """Write the files of a shard, their names after `prefix`, and count what they hold.

    `token_bytes` (V,) is the number of bytes each id stands for.
    """
    num_rows = int(pieces.row[-1]) + 1 if len(pieces.row) else 0
    first_pieces = np.searchsorted(pieces.row, np.arange(num_rows + 1))
    kinds, kind_numbers = _number_kinds(documents.kinds)
    tables: dict[str, npt.NDArray[Any]] = {
        "pieces": np.stack([pieces.document, pieces.offset, pieces.start], axis=1),
        "first_pieces": first_pieces[:, None],
        "document_ids": documents.ids,
        "kinds": kind_numbers[:, None],
    }
    is_cut = (pieces.offset > 0) & (pieces.length > 1)
    counts = PackedCounts(
        num_rows=num_rows,
        num_documents=len(documents),
        num_cut_documents=len(np.unique(pieces.document[is_cut])),
        num_pieces=len(pieces.row),
    )
    num_padding = num_targets = num_bytes = 0
    bytes_of = token_bytes.astype(np.min_scalar_type(token_bytes.max()))  # less to move
    with ExitStack() as stack:
        files: dict[str, IO[bytes]] = {}
        for name, (kind, count, width) in file_shapes(layout, counts).items():
            files[name] = stack.enter_context(writer.open(f"{prefix}{name}.bin"))
            files[name].write(file_header(name, kind, (count, width)))
            if name in tables:
                files[name].write(tables[name].astype(kind).data)
        for tokens, targets in _lay(layout, documents, pieces, first_pieces):
            files["tokens"].write(tokens.data)
            if layout.content == "chats":
                files["mask"].write(targets.data)
            num_padding += int((tokens == layout.pad_id).sum())
            num_targets += int(targets.sum())
            num_bytes += int((bytes_of[tokens] * targets).sum(dtype=np.int64))
    num_repeated = counts.num_pieces - counts.num_documents
    counts = replace(
        counts,
        num_tokens=num_rows * (layout.seq_len + 1) - num_padding - num_repeated,
        num_padding_tokens=num_padding,
        num_target_tokens=num_targets,
        num_bytes=num_bytes,
    )
    return PackedShard(counts=counts, kinds=kinds if layout.content == "chats" else ())


def _lay(
    layout: PackedLayout,
    documents: Documents,
    pieces: Pieces,
    first_pieces: npt.NDArray[np.int64],
) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]]:
    """Yield rows of tokens and whether each is a target, (B, T+1) each, some at a time."""
    width, num_rows = layout.seq_len + 1, len(first_pieces) - 1
    begins = starts(documents.lengths)[pieces.document] + pieces.offset
    places = pieces.row * width + pieces.start
    at_once = max(1, TOKENS_AT_ONCE // width)
    for first in range(0, num_rows, at_once):
        end = min(first + at_once, num_rows)
        some = slice(first_pieces[first], first_pieces[end])
        where = places[some] - first * width, begins[some], pieces.length[some]
        tokens = np.full((end - first, width), layout.pad_id, dtype=layout.dtype)
        _copy_pieces(documents.tokens, tokens, *where)
        targets = tokens != layout.pad_id
        if layout.content == "chats":
            targets = np.zeros(tokens.shape, dtype=np.bool_)
            _copy_pieces(documents.mask, targets, *where)
        targets[:, 0] = False  # the input before it is in another row
        targets.reshape(-1)[where[0][pieces.offset[some] > 0]] = False  # repeated
        yield tokens, targets


def _copy_pieces(
    source: npt.NDArray[Any],
    rows: npt.NDArray[Any],
    places: npt.NDArray[np.int64],
    begins: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
) -> None:
    flat = rows.reshape(-1)  # (B, T+1) -> (B * (T+1),)
    ends, place_ends = (begins + lengths).tolist(), (places + lengths).tolist()
    spans = zip(places.tolist(), place_ends, begins.tolist(), ends, strict=True)
    for place, place_end, begin, end in spans:
        flat[place:place_end] = source[begin:end]


def _number_kinds(kinds: Sequence[str]) -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
    """Return the kinds there are, and each document's place in these."""
    numbers: dict[str, int] = {}
    places = np.empty(len(kinds), dtype=np.int64)
    for ordinal, kind in enumerate(kinds):
        if kind not in numbers and len(numbers) >= MAX_KINDS:
            kind = OTHER_KINDS
        places[ordinal] = numbers.setdefault(kind, len(numbers))
    return tuple(numbers), places
