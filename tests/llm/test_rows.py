"""Rows on disk: what was written is read, figures are true, damage is found."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from llm.artifact import ArtifactWriter
from llm.data.rows import PACK_JSON, RowLayout, Rows, RowWriter, row_order, write_pack_json
from llm.errors import ArtifactError

BOS, PAD = 0, 5
IDS = [bytes([number]) * 16 for number in range(3)]


def write(
    folder: Path,
    tokens: Sequence[Sequence[int]],
    mask: Sequence[Sequence[int]] | None = None,
    first_documents: Sequence[int] = (0, 1),
    vocab_size: int = 300,
) -> Path:
    """Write a pack artifact whose only split is `train`, without a manifest."""
    layout = RowLayout(
        seq_len=len(tokens[0]) - 1,
        vocab_size=vocab_size,
        content="text" if mask is None else "chats",
        bos_id=BOS,
        pad_id=PAD,
    )
    writer = ArtifactWriter(folder)
    token_bytes = np.ones(vocab_size, dtype=np.int64)
    token_bytes[:6] = 0
    with RowWriter(writer, "train", layout, token_bytes) as rows:
        rows.write_documents([(identifier, "") for identifier in IDS[:2]])
        rows.write_documents([(identifier, "") for identifier in IDS[2:]])
        rows.write_rows(
            np.array(tokens, dtype=np.uint32),
            None if mask is None else np.array(mask, dtype=np.bool_),
            np.array(first_documents),
        )
    write_pack_json(writer, layout, {"train": rows.info()})
    return folder


TEXT = [[0, 7, 8, 0, 9], [9, 10, 0, 11, 5]]  # documents 7 8 | 9 9 10 | 11, T = 4


def test_text_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = Rows(write(tmp_path / "out", TEXT), "train")
    tokens, mask, documents = rows.read([1, 0, 1])
    assert tokens.dtype == documents.dtype == np.int64 and mask.dtype == np.bool_
    assert tokens.tolist() == [TEXT[1], TEXT[0], TEXT[1]]
    assert mask.tolist()[:2] == [[False, True, True, True, False], [False] + [True] * 4]
    assert documents.tolist()[:2] == [[1, 1, 2, 2, 2], [0, 0, 0, 1, 1]]
    assert [rows.source_id(ordinal) for ordinal in range(3)] == [name.hex() for name in IDS]
    assert (rows.num_rows, rows.seq_len) == (2, 4)


def test_figures_count_each_token_once(tmp_path: Path) -> None:
    info = Rows(write(tmp_path / "out", TEXT), "train").info
    assert (info.num_rows, info.num_documents) == (2, 3)
    assert info.num_tokens == 8, "the 9 that both rows hold is one token"
    assert (info.num_padding_tokens, info.num_target_tokens) == (1, 7)
    assert info.num_bytes == 5, "control tokens stand for none"


def test_the_mask_of_chats_says_what_is_learned_but_never_position_0(tmp_path: Path) -> None:
    mask = [[0, 1, 0, 0, 1], [1, 1, 0, 0, 0]]
    rows = Rows(write(tmp_path / "out", TEXT, mask), "train")
    assert rows.read([0, 1]).mask.tolist() == [
        [False, True, False, False, True],
        [False, True, False, False, False],
    ]
    assert rows.info.num_target_tokens == 3


@pytest.mark.parametrize(
    ("vocab_size", "dtype", "item_bytes"),
    [(65_536, "uint16", 2), (65_537, "uint32", 4), (200_000, "uint32", 4)],
)
def test_the_last_id_survives_in_the_smallest_type_that_holds_it(
    tmp_path: Path, vocab_size: int, dtype: str, item_bytes: int
) -> None:
    tokens = [[0, vocab_size - 1, 0, 0, vocab_size - 2]]
    folder = write(tmp_path / "out", tokens, first_documents=[0], vocab_size=vocab_size)
    assert Rows(folder, "train").read([0]).tokens.tolist() == tokens
    assert json.loads((folder / PACK_JSON).read_text())["dtype"] == dtype
    assert (folder / "train.tokens.bin").stat().st_size == 5 * item_bytes


def test_files_are_little_endian_and_as_documented(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", TEXT, [[0, 1, 1, 1, 1]] * 2)
    assert (folder / "train.tokens.bin").read_bytes() == bytes(
        byte for row in TEXT for token in row for byte in (token % 256, token // 256)
    )
    assert (folder / "train.mask.bin").read_bytes() == bytes([0, 1, 1, 1, 1, 0, 1, 1, 1, 0])
    assert (folder / "train.first_document.bin").read_bytes() == bytes([0] * 8 + [1] + [0] * 7)
    assert (folder / "train.document_ids.bin").read_bytes() == b"".join(IDS)


FILES = ["train.tokens.bin", "train.mask.bin", "train.first_document.bin", "train.document_ids.bin"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "grown"])
def test_a_file_of_another_size_is_named(tmp_path: Path, name: str, damage: str) -> None:
    folder = write(tmp_path / "out", TEXT, [[0, 1, 1, 1, 1]] * 2)
    path = folder / name
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": data[:-1], "grown": data + b"\0"}[damage])
    with pytest.raises(ArtifactError, match=name) as caught:
        Rows(folder, "train")
    assert "run pack again" in str(caught.value)


def test_another_seq_len_in_pack_json_does_not_pass(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", TEXT)
    path = folder / PACK_JSON
    path.write_text(path.read_text().replace('"seq_len": 4', '"seq_len": 3'))
    with pytest.raises(ArtifactError, match="20 bytes, expected 16"):
        Rows(folder, "train")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"version": 1', '"version": 2'),
        ('"format": "fromscratch.rows"', '"format": "other"'),
        ('"dtype": "uint16"', '"dtype": "uint32"'),
        ('"seq_len"', '"sequence"'),
        ('"num_rows"', '"rows"'),
        ('"splits"', '"parts"'),
        ("{", "["),
    ],
)
def test_a_damaged_pack_json_is_named(tmp_path: Path, old: str, new: str) -> None:
    folder = write(tmp_path / "out", TEXT)
    path = folder / PACK_JSON
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ArtifactError, match=r"pack\.json: damaged"):
        Rows(folder, "train")


def test_a_missing_split_or_pack_json_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "out", TEXT)
    with pytest.raises(ArtifactError, match="no split validation; there are train"):
        Rows(folder, "validation")
    (folder / PACK_JSON).unlink()
    with pytest.raises(ArtifactError, match=r"pack\.json: not there; run pack"):
        Rows(folder, "train")


@pytest.mark.parametrize("num_rows", [1, 2, 7, 100, 1000])
def test_an_epoch_holds_every_row_once_and_the_next_in_another_order(num_rows: int) -> None:
    orders = [row_order(1, epoch, np.arange(num_rows), num_rows) for epoch in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(num_rows))
    if num_rows > 7:
        assert len({tuple(order.tolist()) for order in orders}) == 3


def test_the_order_is_a_function_of_the_place_alone() -> None:
    whole = row_order(1, 0, np.arange(1000), 1000)
    parts = [row_order(1, 0, np.arange(start, 1000, 3), 1000) for start in range(3)]
    for start, part in enumerate(parts):
        assert np.array_equal(part, whole[start::3])
    assert not np.array_equal(whole, row_order(2, 0, np.arange(1000), 1000))
