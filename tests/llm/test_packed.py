"""Packed sequences on disk: all shards are read as written, and damage is found."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.artifact import ArtifactWriter
from llm.data.packed import (
    HEADER,
    MAGIC,
    PACK_JSON,
    PADDING_ID,
    PackedArrays,
    PackedLayout,
    PackedSequences,
    sequence_order,
    shard_prefix,
    write_pack_json,
)
from llm.data.packed_writer import EncodedDocument, EncodedDocuments, Segments, write_packed_shard
from llm.errors import ArtifactError

BOS, PAD = 0, 5
IDS = [bytes([number]) * 16 for number in range(3)]

# T = 4; sequences: 0 7 8 0 9 | 9 10 0 11 .    the second document continues in the second
TEXT = [[0, 7, 8], [0, 9, 10], [0, 11]]
PIECES = [(0, 0, 3, 0, 0), (1, 0, 2, 0, 3), (1, 1, 2, 1, 0), (2, 0, 2, 1, 2)]
ROWS = [[0, 7, 8, 0, 9], [9, 10, 0, 11, 5]]

# a document of two sequences, which ends in the middle of the second
LONG = [[0, 7, 8, 9, 10, 11], [0, 12, 13]]
LONG_PIECES = [(0, 0, 5, 0, 0), (1, 0, 3, 1, 0), (0, 4, 2, 1, 3)]
LONG_ROWS = [[0, 7, 8, 9, 10], [0, 12, 13, 10, 11]]

Shard = tuple[Sequence[Sequence[int]], Sequence[tuple[int, ...]]]


def write(
    folder: Path,
    *shards: Shard,
    masks: Sequence[Sequence[int]] | None = None,
    vocab_size: int = 300,
    seq_len: int = 4,
) -> Path:
    """Write a pack artifact whose only split is `train`, without a manifest."""
    layout = PackedLayout(
        seq_len=seq_len,
        vocab_size=vocab_size,
        content="text" if masks is None else "chats",
        bos_id=BOS,
        pad_id=PAD,
    )
    writer = ArtifactWriter(folder)
    token_bytes = np.ones(vocab_size, dtype=np.int64)
    token_bytes[:6] = 0
    infos = []
    for number, (tokens, pieces) in enumerate(shards):
        documents = EncodedDocuments(layout.dtype)
        for ordinal, ids in enumerate(tokens):
            mask = None if masks is None else np.array(masks[ordinal], dtype=np.bool_)
            array, kind = np.array(ids, dtype=np.uint32), f"kind {number} {ordinal}"
            documents.add([EncodedDocument(id=IDS[ordinal], tokens=array, mask=mask, kind=kind)])
        laid, prefix = Segments(*np.array(pieces).T), shard_prefix("train", number)
        infos.append(write_packed_shard(writer, prefix, layout, documents, laid, token_bytes))
    write_pack_json(writer, layout, {"train": infos})
    return folder


def test_text_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = PackedSequences(write(tmp_path / "out", (TEXT, PIECES)), "train")
    tokens, mask, documents = rows.read([1, 0, 1])
    assert tokens.dtype == documents.dtype == np.int64 and mask.dtype == np.bool_
    assert tokens.tolist() == [ROWS[1], ROWS[0], ROWS[1]]
    assert mask.tolist()[:2] == [[False, True, True, True, False], [False] + [True] * 4]
    assert documents.tolist()[:2] == [[1, 1, 2, 2, PADDING_ID], [0, 0, 0, 1, 1]]
    assert (rows.num_sequences, rows.seq_len) == (2, 4)
    assert rows.cut_documents().tolist() == [1]
    assert rows.read([]).tokens.shape == (0, 5)


def test_a_continued_segment_inside_a_sequence_does_not_begin_with_a_target(tmp_path: Path) -> None:
    for masks in (None, [[1] * 6, [1] * 3]):
        rows = PackedSequences(
            write(tmp_path / str(masks), (LONG, LONG_PIECES), masks=masks), "train"
        )
        tokens, mask, documents = rows.read([0, 1])
        assert tokens.tolist() == LONG_ROWS
        assert documents.tolist() == [[0] * 5, [1, 1, 1, 0, 0]]
        learned = [[False] + [True] * 4, [False, True, True, False, True]]
        assert mask.tolist() == learned
        assert rows.info.num_target_tokens == 7
        assert rows.info.num_bytes == 7, "the repeated token counts once"
        assert (rows.info.num_tokens, rows.info.num_cut_documents) == (9, 1)


def test_sequences_of_many_shards_have_consecutive_indices(tmp_path: Path) -> None:
    shards = [(TEXT, PIECES), (LONG, LONG_PIECES), (TEXT, PIECES)]
    rows = PackedSequences(write(tmp_path / "out", *shards), "train")
    apart = [
        PackedSequences(write(tmp_path / f"{n}", shard), "train") for n, shard in enumerate(shards)
    ]
    first_documents = [0, 3, 5]
    indices = [4, 0, 3, 3, 5, 1, 2]
    tokens, mask, documents = rows.read(indices)
    for place, index in enumerate(indices):
        one = apart[index // 2].read([index % 2])
        assert tokens[place].tolist() == one.tokens[0].tolist()
        assert mask[place].tolist() == one.mask[0].tolist()
        ids = one.document_ids[0]
        expected = np.where(ids == PADDING_ID, ids, ids + first_documents[index // 2])
        assert documents[place].tolist() == expected.tolist()
    assert rows.info.num_documents == 8
    assert rows.info.num_tokens == sum(each.info.num_tokens for each in apart)
    assert rows.cut_documents().tolist() == [1, 3, 6]
    for outside in (-1, 6):
        with pytest.raises(IndexError, match="of 6"):
            rows.read([0, outside])


def test_bidirectional_attention_leaves_padding_out_with_and_without_a_document_mask(
    tmp_path: Path,
) -> None:
    arrays = PackedSequences(write(tmp_path / "out", (TEXT, PIECES)), "train").read([0, 1])
    assert arrays.attention_ids(True).tolist() == [[0, 0, 0, 1, 1], [1, 1, 2, 2, PADDING_ID]]
    assert arrays.attention_ids(False).tolist() == [[0] * 5, [0, 0, 0, 0, PADDING_ID]]


def test_all_targets_are_the_mask_of_text_and_every_next_token_of_chats(tmp_path: Path) -> None:
    for tokens, pieces in ((TEXT, PIECES), (LONG, LONG_PIECES)):
        text = PackedSequences(write(tmp_path / str(tokens), (tokens, pieces)), "train").read(
            [0, 1]
        )
        assert text.all_targets().tolist() == text.mask.tolist()
    masks = [[0, 0, 1], [0, 1], [0, 0]]
    tokens = [[0, 7, 8], [0, 9], [0, 11]]
    pieces = [(0, 0, 3, 0, 0), (1, 0, 2, 0, 3), (2, 0, 2, 1, 0)]
    folder = write(tmp_path / "chats", (tokens, pieces), masks=masks)
    chats = PackedSequences(folder, "train").read([0, 1])
    assert chats.all_targets().tolist() == [
        [False, True, True, False, True],
        [False, True, False, False, False],
    ]


@settings(max_examples=100)
@given(pairs=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=8))
def test_the_halves_of_pairs_keep_answers_apart_and_sum_them_apart(
    pairs: list[tuple[int, int]],
) -> None:
    """The oracle walks through each row, token by token."""
    generator = np.random.default_rng(len(pairs))
    tokens = np.full((2, 90), PAD)
    document_ids = np.full((2, 90), PADDING_ID)
    fills, expected = [0, 0], np.full((2, 90), PADDING_ID)
    counts = [0, 0]
    for ordinal, lengths in enumerate(pairs):
        row = ordinal % 2
        for length in lengths:
            for position in range(fills[row], fills[row] + length):
                tokens[row, position] = 7 + position % 5
                document_ids[row, position], expected[row, position] = ordinal, counts[row]
            tokens[row, fills[row]] = BOS
            fills[row] += length
            counts[row] += 1
    mask = (tokens > PAD) & (generator.random(tokens.shape) < 0.5)
    arrays = PackedArrays(tokens, mask, document_ids)
    halves = arrays.half_ids(BOS)
    assert halves.tolist() == expected.tolist()
    values = generator.normal(size=tokens.shape)
    for row in range(2):
        sums = np.zeros(sum(map(len, pairs)))
        np.add.at(sums, halves[row][mask[row]], values[row][mask[row]])
        for half in range(counts[row]):
            by_hand = sum(
                values[row, position]
                for position in range(90)
                if mask[row, position] and expected[row, position] == half
            )
            assert sums[half] == pytest.approx(by_hand)


def test_counts_have_each_token_once(tmp_path: Path) -> None:
    info = PackedSequences(write(tmp_path / "out", (TEXT, PIECES)), "train").info
    assert (info.num_rows, info.num_documents, info.num_cut_documents) == (2, 3, 1)
    assert info.num_tokens == 8, "the 9 that both rows hold is one token"
    assert (info.num_padding_tokens, info.num_target_tokens) == (1, 7)
    assert info.num_bytes == 5, "control tokens stand for none"


def test_the_mask_of_chats_has_the_targets_but_never_position_0(tmp_path: Path) -> None:
    masks = [[0, 1, 0], [0, 1, 1], [1, 0]]
    rows = PackedSequences(
        write(tmp_path / "out", (TEXT, PIECES), (TEXT, PIECES), masks=masks), "train"
    )
    learned = [[False, True, False, False, True], [False, True, True, False, False]]
    assert rows.read([0, 1, 2, 3]).mask.tolist() == learned * 2
    assert rows.info.num_target_tokens == 8
    expected = [f"kind {number} {ordinal}" for number in range(2) for ordinal in range(3)]
    assert [rows.kind(ordinal) for ordinal in range(6)] == expected


@pytest.mark.parametrize(
    ("vocab_size", "dtype", "item_bytes"),
    [(65_536, "<u2", 2), (65_537, "<u4", 4), (200_000, "<u4", 4)],
)
def test_the_last_id_fits_the_smallest_dtype(
    tmp_path: Path, vocab_size: int, dtype: str, item_bytes: int
) -> None:
    tokens = [[0, vocab_size - 1, 7, 8, vocab_size - 2]]
    folder = write(tmp_path / "out", (tokens, [(0, 0, 5, 0, 0)]), vocab_size=vocab_size)
    assert PackedSequences(folder, "train").read([0]).tokens.tolist() == tokens
    assert json.loads((folder / PACK_JSON).read_text())["dtype"] == dtype
    assert (folder / "train/00000.tokens.bin").stat().st_size == HEADER.size + 5 * item_bytes


def test_files_are_little_endian_and_as_documented(tmp_path: Path) -> None:
    masks = [[0, 1, 0], [0, 1, 1], [1, 0]]
    folder = write(tmp_path / "out", (TEXT, PIECES), masks=masks)

    def body(name: str, kind: bytes, shape: tuple[int, int]) -> bytes:
        data = (folder / f"train/00000.{name}.bin").read_bytes()
        expected = (MAGIC, 2, kind.ljust(8, b"\0"), name.encode().ljust(16, b"\0"), *shape)
        assert HEADER.unpack(data[:64]) == expected
        return data[64:]

    tokens = bytes(byte for row in ROWS for token in row for byte in (token, 0))
    assert body("tokens", b"<u2", (2, 5)) == tokens
    assert body("mask", b"<u1", (2, 5)) == bytes([0, 1, 0, 0, 1, 0, 1, 1, 0, 0])
    pieces = [(piece[0], piece[1], piece[4]) for piece in PIECES]
    assert body("pieces", b"<u4", (4, 3)) == np.array(pieces, dtype="<u4").tobytes()
    first_pieces = np.array([0, 2, 4], dtype="<u8").tobytes()
    assert body("first_pieces", b"<u8", (3, 1)) == first_pieces
    assert body("document_ids", b"<u1", (3, 16)) == b"".join(IDS)
    assert body("kinds", b"<u2", (3, 1)) == bytes([0, 0, 1, 0, 2, 0])


@pytest.mark.parametrize("name", ["tokens", "mask", "pieces", "first_pieces"])
@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "grown", "magic", "version", "shape"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    masks = [[0, 1, 0], [0, 1, 1], [1, 0]]
    folder = write(tmp_path / "out", (TEXT, PIECES), masks=masks)
    path = folder / f"train/00000.{name}.bin"
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage in ("magic", "version", "shape"):
        place = {"magic": 0, "version": 8, "shape": 40}[damage]
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    else:
        path.write_bytes({"empty": b"", "cut": data[:-1], "grown": data + b"\0"}[damage])
    with pytest.raises(ArtifactError, match=rf"00000\.{name}\.bin") as caught:
        PackedSequences(folder, "train").read([0])
    assert "run pack again" in str(caught.value)


def test_another_seq_len_in_pack_json_does_not_pass(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", (TEXT, PIECES))
    path = folder / PACK_JSON
    path.write_text(path.read_text().replace('"seq_len": 4', '"seq_len": 3'))
    with pytest.raises(ArtifactError, match="84 bytes, expected 80"):
        PackedSequences(folder, "train").read([0])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"version": 2', '"version": 1'),
        ('"format": "fromscratch.rows"', '"format": "other"'),
        ('"dtype": "<u2"', '"dtype": "<u4"'),
        ('"seq_len"', '"sequence"'),
        ('"num_rows"', '"rows"'),
        ('"splits"', '"parts"'),
        ("{", "["),
    ],
)
def test_a_damaged_pack_json_is_named(tmp_path: Path, old: str, new: str) -> None:
    folder = write(tmp_path / "out", (TEXT, PIECES))
    path = folder / PACK_JSON
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ArtifactError, match=r"pack\.json: damaged"):
        PackedSequences(folder, "train")


def test_a_missing_split_or_pack_json_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", (TEXT, PIECES))
    with pytest.raises(ArtifactError, match="no split validation; there are train"):
        PackedSequences(folder, "validation")
    (folder / PACK_JSON).unlink()
    with pytest.raises(ArtifactError, match=r"pack\.json: not there; run pack"):
        PackedSequences(folder, "train")


@pytest.mark.parametrize("num_rows", [1, 2, 7, 100, 1000])
def test_an_epoch_has_every_sequence_once_and_the_next_another_order(num_rows: int) -> None:
    orders = [sequence_order(1, epoch, np.arange(num_rows), num_rows) for epoch in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(num_rows))
    if num_rows > 7:
        assert len({tuple(order.tolist()) for order in orders}) == 3


def test_the_order_is_a_function_of_the_index_alone() -> None:
    whole = sequence_order(1, 0, np.arange(1000), 1000)
    parts = [sequence_order(1, 0, np.arange(start, 1000, 3), 1000) for start in range(3)]
    for start, part in enumerate(parts):
        assert np.array_equal(part, whole[start::3])
    assert not np.array_equal(whole, sequence_order(2, 0, np.arange(1000), 1000))
