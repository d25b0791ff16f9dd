"""Write packed sequences as the files of a shard; `llm/data/packed.py` has their format.

B sequences written at once, T positions, N sequences, P segments, D documents and S tokens of a
shard.
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

TOKENS_PER_WRITE = 1 << 22
MAX_CHAT_KINDS = 1000  # with a kind for every chat, kinds say nothing
OTHER_KINDS = "other"

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedDocument:
    """A document as tokens (S,), the first of them bos, and but for text their mask (S,)."""

    id: bytes
    tokens: npt.NDArray[np.uint32]
    mask: npt.NDArray[np.bool_] | None = None
    kind: str = ""


class EncodedDocuments:
    """The encoded documents of a shard, concatenated, in the dtype of their file."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.kinds: list[str] = []
        self._tokens, self._mask, self._ids = bytearray(), bytearray(), bytearray()
        self._lengths: list[int] = []

    def add(self, documents: Sequence[EncodedDocument]) -> None:
        """Append documents."""
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
        """Ids of the documents, (D, 16)."""
        return np.frombuffer(self._ids, dtype=np.uint8).reshape(-1, DOCUMENT_ID_BYTES)

    @property
    def tokens(self) -> npt.NDArray[Any]:
        """All tokens, (S,)."""
        return np.frombuffer(self._tokens, dtype=self.dtype)

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """Whether each token is a target, (S,), but of text."""
        return np.frombuffer(self._mask, dtype=np.bool_)


class Segments(NamedTuple):
    """Parts of documents in sequences, (P,) each, ordered by sequence and start."""

    document: Integers
    offset: Integers
    """Position in its document of a segment's first token."""
    length: Integers
    sequence: Integers
    start: Integers
    """Position in its sequence of a segment's first token."""


def write_packed_shard(
    writer: ArtifactWriter,
    prefix: str,
    layout: PackedLayout,
    documents: EncodedDocuments,
    segments: Segments,
    token_bytes: npt.NDArray[np.int64],
) -> PackedShard:
    """Write the files of a shard, named `prefix` and a name of `file_shapes`, and count.

    `token_bytes` (V,) is the number of bytes of each id.
    """
    num_sequences = int(segments.sequence[-1]) + 1 if len(segments.sequence) else 0
    first_segments = np.searchsorted(segments.sequence, np.arange(num_sequences + 1))
    kinds, kind_numbers = _number_kinds(documents.kinds)
    tables: dict[str, npt.NDArray[Any]] = {
        "pieces": np.stack([segments.document, segments.offset, segments.start], axis=1),
        "first_pieces": first_segments[:, None],
        "document_ids": documents.ids,
        "kinds": kind_numbers[:, None],
    }
    is_cut = (segments.offset > 0) & (segments.length > 1)
    counts = PackedCounts(
        num_rows=num_sequences,
        num_documents=len(documents),
        num_cut_documents=len(np.unique(segments.document[is_cut])),
        num_pieces=len(segments.sequence),
    )
    num_padding = num_targets = num_bytes = 0
    bytes_of = token_bytes.astype(np.min_scalar_type(token_bytes.max()))  # less memory traffic
    with ExitStack() as stack:
        files: dict[str, IO[bytes]] = {}
        for name, (dtype, count, width) in file_shapes(layout, counts).items():
            files[name] = stack.enter_context(writer.open(f"{prefix}{name}.bin"))
            files[name].write(file_header(name, dtype, (count, width)))
            if name in tables:
                files[name].write(tables[name].astype(dtype).data)
        for tokens, targets in _sequences(layout, documents, segments, first_segments):
            files["tokens"].write(tokens.data)
            if layout.content != "text":
                files["mask"].write(targets.data)
            num_padding += int((tokens == layout.pad_id).sum())
            num_targets += int(targets.sum())
            num_bytes += int((bytes_of[tokens] * targets).sum(dtype=np.int64))
    num_repeated = counts.num_pieces - counts.num_documents
    counts = replace(
        counts,
        num_tokens=num_sequences * (layout.seq_len + 1) - num_padding - num_repeated,
        num_padding_tokens=num_padding,
        num_target_tokens=num_targets,
        num_bytes=num_bytes,
    )
    return PackedShard(counts=counts, kinds=kinds if layout.content != "text" else ())


def _sequences(
    layout: PackedLayout,
    documents: EncodedDocuments,
    segments: Segments,
    first_segments: Integers,
) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]]:
    """Yield the tokens of B sequences and whether each is a target, (B, T+1) each."""
    width, num_sequences = layout.seq_len + 1, len(first_segments) - 1
    begins = starts(documents.lengths)[segments.document] + segments.offset
    positions = segments.sequence * width + segments.start
    at_once = max(1, TOKENS_PER_WRITE // width)
    for first in range(0, num_sequences, at_once):
        end = min(first + at_once, num_sequences)
        some = slice(first_segments[first], first_segments[end])
        where = positions[some] - first * width, begins[some], segments.length[some]
        tokens = np.full((end - first, width), layout.pad_id, dtype=layout.dtype)
        _copy_segments(documents.tokens, tokens, *where)
        targets = tokens != layout.pad_id
        if layout.content != "text":
            targets = np.zeros(tokens.shape, dtype=np.bool_)
            _copy_segments(documents.mask, targets, *where)
        targets[:, 0] = False  # its input is in another sequence
        targets.reshape(-1)[where[0][segments.offset[some] > 0]] = False  # repeated
        yield tokens, targets


def _copy_segments(
    source: npt.NDArray[Any],
    sequences: npt.NDArray[Any],
    positions: Integers,
    begins: Integers,
    lengths: Integers,
) -> None:
    flat = sequences.reshape(-1)  # (B, T+1) -> (B * (T+1),)
    ends, position_ends = (begins + lengths).tolist(), (positions + lengths).tolist()
    spans = zip(positions.tolist(), position_ends, begins.tolist(), ends, strict=True)
    for position, position_end, begin, end in spans:
        flat[position:position_end] = source[begin:end]


def _number_kinds(kinds: Sequence[str]) -> tuple[tuple[str, ...], Integers]:
    """Return the distinct kinds and, for each document, its kind's index among them."""
    numbers: dict[str, int] = {}
    indices = np.empty(len(kinds), dtype=np.int64)
    for ordinal, kind in enumerate(kinds):
        if kind not in numbers and len(numbers) >= MAX_CHAT_KINDS:
            kind = OTHER_KINDS
        indices[ordinal] = numbers.setdefault(kind, len(numbers))
    return tuple(numbers), indices
