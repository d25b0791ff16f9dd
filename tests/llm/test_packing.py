"""Packing: no token lost, none twice, each a target once, documents that fit a sequence not cut."""

import tempfile
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.artifact import ArtifactWriter
from llm.data import packed_writer
from llm.data.packed import PADDING_ID, PackedLayout, PackedSequences, shard_prefix, write_pack_json
from llm.data.packed_writer import EncodedDocument, EncodedDocuments, Segments, write_packed_shard
from llm.data.packing import pack_best_fit, pack_concatenated

BOS, PAD, VOCAB_SIZE = 0, 5, 300
TOKEN_BYTES = np.r_[np.zeros(6, dtype=np.int64), np.arange(1, VOCAB_SIZE - 5)]
PACKERS = {"concatenate": pack_concatenated, "best-fit": pack_best_fit}

lengths_of_documents = st.lists(st.integers(1, 40) | st.integers(1, 4), min_size=1, max_size=60)


def pack_lengths(name: str, lengths: Sequence[int], seq_len: int) -> Segments:
    return PACKERS[name](np.array(lengths, dtype=np.int64), seq_len)


def make_documents(lengths: Sequence[int], *, is_chats: bool) -> list[EncodedDocument]:
    """Documents of the given lengths, bos included, of random tokens; for chats a random mask."""
    generator = np.random.default_rng(len(lengths))
    documents: list[EncodedDocument] = []
    for number, length in enumerate(lengths):
        tokens = generator.integers(6, VOCAB_SIZE, length).astype(np.uint32)
        tokens[0] = BOS
        mask = generator.random(length) < 0.5
        mask[0] = False
        identifier = number.to_bytes(16, "big")
        documents.append(
            EncodedDocument(id=identifier, tokens=tokens, mask=mask if is_chats else None)
        )
    return documents


def write_documents(
    folder: Path, documents: Sequence[EncodedDocument], name: str, seq_len: int
) -> PackedSequences:
    """Pack documents into one shard and write it."""
    content = "text" if documents[0].mask is None else "chats"
    layout = PackedLayout(
        seq_len=seq_len, vocab_size=VOCAB_SIZE, content=content, bos_id=BOS, pad_id=PAD
    )
    writer = ArtifactWriter(folder)
    encoded = EncodedDocuments(layout.dtype)
    encoded.add(documents[:7])
    encoded.add(documents[7:])
    segments = PACKERS[name](encoded.lengths, seq_len)
    info = write_packed_shard(
        writer, shard_prefix("train", 0), layout, encoded, segments, TOKEN_BYTES
    )
    write_pack_json(writer, layout, {"train": [info]})
    return PackedSequences(folder, "train")


def check_nothing_is_lost(
    rows: PackedSequences, documents: Sequence[EncodedDocument], segments: Segments
) -> None:
    """Walk all positions: all tokens are there, each a target at most once."""
    arrays = rows.read(np.arange(rows.num_sequences))
    times_learned = [np.zeros(len(document.tokens), dtype=int) for document in documents]
    is_there = [np.zeros(len(document.tokens), dtype=bool) for document in documents]
    is_filled = np.zeros(arrays.tokens.shape, dtype=bool)
    for document, offset, length, row, start in np.array(segments).T.tolist():
        where = row, slice(start, start + length)
        span = slice(offset, offset + length)
        assert not is_filled[where].any()
        is_filled[where] = True
        assert arrays.tokens[where].tolist() == documents[document].tokens[span].tolist()
        assert (arrays.document_ids[where] == document).all()
        is_there[document][span] = True
        times_learned[document][span] += arrays.mask[where]
    assert all(found.all() for found in is_there)
    assert (arrays.tokens[~is_filled] == PAD).all() and not arrays.mask[~is_filled].any()
    assert (arrays.document_ids[~is_filled] == PADDING_ID).all()
    assert (np.diff(is_filled.astype(int), axis=1) <= 0).all(), "padding is at the end"
    learned_tokens: list[int] = []
    for document, times in zip(documents, times_learned, strict=True):
        learned_tokens += document.tokens[times > 0].tolist()
        if document.mask is not None:
            assert times.tolist() == document.mask.astype(int).tolist()
        else:  # all but the first of a sequence, which has no input
            assert times[0] <= 1 and (times[1:] == 1).all()
    info = rows.info
    assert info.num_documents == len(documents)
    assert info.num_tokens == sum(len(document.tokens) for document in documents)
    assert info.num_target_tokens == len(learned_tokens)
    assert info.num_bytes == TOKEN_BYTES[learned_tokens].sum()
    assert info.num_padding_tokens == (~is_filled).sum()
    assert info.num_padding_tokens + info.num_tokens + info.num_pieces - info.num_documents == (
        rows.num_sequences * (rows.seq_len + 1)
    )


@settings(max_examples=60)
@given(
    lengths=lengths_of_documents,
    seq_len=st.integers(1, 50),
    name=st.sampled_from(list(PACKERS)),
    is_chats=st.booleans(),
    rows_at_once=st.integers(1, 5),
)
def test_documents_are_restored_from_sequences_and_every_token_is_a_target_once(
    lengths: list[int], seq_len: int, name: str, is_chats: bool, rows_at_once: int
) -> None:
    documents = make_documents(lengths, is_chats=is_chats)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_writer, "TOKENS_PER_WRITE", rows_at_once * (seq_len + 1))
        rows = write_documents(Path(folder) / "out", documents, name, seq_len)
        check_nothing_is_lost(rows, documents, pack_lengths(name, lengths, seq_len))


@given(lengths=lengths_of_documents, seq_len=st.integers(1, 50))
def test_concatenated_documents_are_split_and_only_the_last_sequence_is_padded(
    lengths: list[int], seq_len: int
) -> None:
    """The oracle writes the stream out and splits it."""
    segments = pack_lengths("concatenate", lengths, seq_len)
    stream = [(number, position) for number, n in enumerate(lengths) for position in range(n)]
    num_rows = max(1, -(-(len(stream) - 1) // seq_len))
    rows = [stream[row * seq_len : row * seq_len + seq_len + 1] for row in range(num_rows)]
    found: list[list[tuple[int, int]]] = [[] for _ in range(num_rows)]
    for document, offset, length, row, start in np.array(segments).T.tolist():
        assert start == len(found[row])
        found[row] += [(document, position) for position in range(offset, offset + length)]
    assert found == rows


def rooms_of_textbook_best_fit(lengths: Sequence[int], width: int) -> list[int]:
    """Best-fit decreasing, one segment at a time: the room left in each sequence, ascending."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        index = bisect_left(rooms, length)
        room = rooms.pop(index) if index < len(rooms) else width
        insort(rooms, room - length)
    return rooms


@settings(max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 60) | st.integers(1, 9), min_size=1, max_size=300),
    seq_len=st.integers(2, 50),
)
def test_best_fit_is_that_of_the_textbook_and_cuts_no_document_that_fits(
    lengths: list[int], seq_len: int
) -> None:
    segments = pack_lengths("best-fit", lengths, seq_len)
    width = seq_len + 1
    ends = segments.start + segments.length
    is_last_in_row = np.diff(segments.sequence, append=-1) != 0
    rooms = sorted((width - ends[is_last_in_row]).tolist())
    assert rooms == rooms_of_textbook_best_fit(segments.length.tolist(), width)
    num_segments = Counter(segments.document.tolist())
    for ordinal, length in enumerate(lengths):
        mine = segments.document == ordinal
        assert num_segments[ordinal] == max(1, -(-(length - 1) // seq_len))
        offsets, sizes = segments.offset[mine], segments.length[mine]
        assert sorted(offsets.tolist()) == list(range(0, num_segments[ordinal] * seq_len, seq_len))
        assert sizes[np.argsort(offsets)].tolist() == [
            min(length - offset, width) for offset in sorted(offsets.tolist())
        ]


def test_best_fit_keeps_the_order_of_documents() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(3, 1, 5000).astype(int) + 1
    segments = pack_lengths("best-fit", lengths, 128)
    is_begin = np.diff(segments.sequence, prepend=-1) != 0
    in_row = np.diff(segments.document)[~is_begin[1:]]
    assert (in_row >= 0).all(), "ascending in a sequence"
    longest = np.maximum.reduceat(lengths[segments.document], np.flatnonzero(is_begin))
    half = len(longest) // 2
    # the first half is like the second: means of some hundred lengths differ by chance
    assert abs(longest[:half].mean() - longest[half:].mean()) < 4 * longest.std() / half**0.5


def test_best_fit_leaves_one_position_in_200_at_most(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).lognormal(5.5, 1, 50_000).astype(int) + 1
    segments = pack_lengths("best-fit", lengths, 2048)
    num_positions = (segments.sequence[-1] + 1) * 2049
    assert segments.length.sum() >= 0.995 * num_positions


@pytest.mark.parametrize("name", PACKERS)
@pytest.mark.parametrize("is_chats", [False, True])
def test_a_document_of_full_sequences_gets_no_empty_sequence(
    tmp_path: Path, name: str, is_chats: bool
) -> None:
    documents = make_documents([4 * 8 + 1], is_chats=is_chats)
    rows = write_documents(tmp_path / "out", documents, name, seq_len=8)
    assert (rows.num_sequences, rows.info.num_padding_tokens) == (4, 0)
    assert rows.info.num_cut_documents == 1


def test_chats_that_fill_a_sequence_exactly_share_it(tmp_path: Path) -> None:
    documents = make_documents([9, 5, 4], is_chats=True)
    rows = write_documents(tmp_path / "out", documents, "best-fit", seq_len=8)
    assert (rows.num_sequences, rows.info.num_padding_tokens) == (2, 0)
    assert rows.info.num_cut_documents == 0


def test_the_remainder_of_a_long_chat_shares_a_sequence(tmp_path: Path) -> None:
    documents = make_documents([5, 8 + 1 + 3], is_chats=True)
    rows = write_documents(tmp_path / "out", documents, "best-fit", seq_len=8)
    assert rows.read([0, 1]).document_ids.tolist() == [[0] * 5 + [1] * 4, [1] * 9]
    assert not rows.read([0]).mask[0, 5], "the sequence before has this target"


def test_a_short_text_gives_one_padded_sequence(tmp_path: Path) -> None:
    documents = make_documents([3], is_chats=False)
    for name in PACKERS:
        rows = write_documents(tmp_path / name, documents, name, seq_len=8)
        assert rows.read([0]).mask.tolist() == [[False, True, True] + [False] * 6]
        assert rows.info.num_padding_tokens == 6
