"""Packing: no token lost, none twice, each learned exactly once, chats whole where they fit."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.artifact import ArtifactWriter
from llm.data import packing
from llm.data.packing import EncodedDocument, make_packer
from llm.data.rows import RowLayout, Rows, RowWriter, write_pack_json

BOS, PAD, VOCAB_SIZE = 0, 5, 300
TOKEN_BYTES = np.r_[np.zeros(6, dtype=np.int64), np.arange(1, VOCAB_SIZE - 5)]

lengths_of_documents = st.lists(st.integers(1, 40) | st.integers(1, 4), min_size=1, max_size=60)
sizes_of_batches = st.lists(st.integers(1, 20), min_size=1, max_size=5)


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


def pack_documents(
    folder: Path, documents: Sequence[EncodedDocument], seq_len: int, batches: Sequence[int] = (20,)
) -> Rows:
    """Pack `documents` in batches of the given sizes, taken in turn."""
    content = "text" if documents[0].mask is None else "chats"
    layout = RowLayout(
        seq_len=seq_len, vocab_size=VOCAB_SIZE, content=content, bos_id=BOS, pad_id=PAD
    )
    writer = ArtifactWriter(folder)
    with RowWriter(writer, "train", layout, TOKEN_BYTES) as rows:
        packer = make_packer(rows)
        start = turn = 0
        while start < len(documents):
            size = batches[turn % len(batches)]
            packer.add(documents[start : start + size])
            start, turn = start + size, turn + 1
        packer.finish()
    write_pack_json(writer, layout, {"train": rows.info()})
    return Rows(folder, "train")


def unpack(rows: Rows) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Walk all rows position by position: each document's tokens, and how often each is learned."""
    tokens_of: dict[str, list[int]] = {}
    times_learned: dict[str, list[int]] = {}
    for index in range(rows.num_rows):
        tokens, mask, ordinals = (array[0].tolist() for array in rows.read([index]))
        is_padding = [token == PAD for token in tokens]
        assert is_padding == sorted(is_padding), "padding is at the end"
        for position, token in enumerate(tokens):
            if token == PAD:
                assert not mask[position]
                continue
            name = rows.source_id(ordinals[position])
            if position == 0 and name in tokens_of:
                assert tokens_of[name][-1] == token, "a row goes on with the last token before"
                assert not mask[0]
                continue
            tokens_of.setdefault(name, []).append(token)
            times_learned.setdefault(name, []).append(int(mask[position]))
    return tokens_of, times_learned


def check_nothing_is_lost(rows: Rows, documents: Sequence[EncodedDocument]) -> None:
    tokens_of, times_learned = unpack(rows)
    assert tokens_of == {document.id.hex(): document.tokens.tolist() for document in documents}
    for document in documents:
        learned = times_learned[document.id.hex()]
        if document.mask is not None:
            assert learned == document.mask.astype(int).tolist()
        else:
            is_first = rows.source_id(0) == document.id.hex()
            assert learned == [0 if is_first else 1] + [1] * (len(document.tokens) - 1)
    learned_tokens = [
        token
        for name, tokens in tokens_of.items()
        for token, times in zip(tokens, times_learned[name], strict=True)
        if times
    ]
    info = rows.info
    assert info.num_documents == len(documents)
    assert info.num_tokens == sum(len(document.tokens) for document in documents)
    assert info.num_target_tokens == len(learned_tokens)
    assert info.num_bytes == TOKEN_BYTES[learned_tokens].sum()
    num_repeated = info.num_rows * (rows.seq_len + 1) - info.num_padding_tokens - info.num_tokens
    assert 0 <= num_repeated < info.num_rows


@settings(max_examples=80, deadline=None)
@given(lengths=lengths_of_documents, seq_len=st.integers(1, 30), batches=sizes_of_batches)
def test_text_comes_back_from_its_rows_and_every_token_but_the_first_is_learned_once(
    lengths: list[int], seq_len: int, batches: list[int]
) -> None:
    documents = make_documents(lengths, is_chats=False)
    with tempfile.TemporaryDirectory() as folder:
        rows = pack_documents(Path(folder) / "out", documents, seq_len, batches)
        check_nothing_is_lost(rows, documents)
        stream_tokens = sum(lengths)
        assert rows.num_rows == max(1, -(-(stream_tokens - 1) // seq_len))
        assert [rows.source_id(ordinal) for ordinal in range(len(documents))] == [
            document.id.hex() for document in documents
        ]


@settings(max_examples=80, deadline=None)
@given(
    lengths=lengths_of_documents,
    seq_len=st.integers(1, 50),
    batches=sizes_of_batches,
    max_open_rows=st.integers(1, 6),
)
def test_chats_come_back_from_their_rows_and_stay_whole_where_they_fit(
    lengths: list[int], seq_len: int, batches: list[int], max_open_rows: int
) -> None:
    documents = make_documents(lengths, is_chats=True)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "MAX_OPEN_ROWS", max_open_rows)
        rows = pack_documents(Path(folder) / "out", documents, seq_len, batches)
        check_nothing_is_lost(rows, documents)
        rows_of: dict[str, set[int]] = {}
        for index in range(rows.num_rows):
            tokens, _, ordinals = rows.read([index])
            for ordinal in set(ordinals[0][tokens[0] != PAD].tolist()):
                rows_of.setdefault(rows.source_id(ordinal), set()).add(index)
        for document in documents:
            num_rows = max(1, -(-(len(document.tokens) - 1) // seq_len))
            assert len(rows_of[document.id.hex()]) == num_rows
        assert rows.info.num_split_chats == sum(length > seq_len + 1 for length in lengths)


def test_one_long_document_of_whole_rows_gets_no_empty_row(tmp_path: Path) -> None:
    for is_chats in (False, True):
        documents = make_documents([4 * 8 + 1], is_chats=is_chats)
        rows = pack_documents(tmp_path / str(is_chats), documents, seq_len=8)
        assert (rows.num_rows, rows.info.num_padding_tokens) == (4, 0)


def test_chats_that_fill_a_row_to_the_last_position_share_it(tmp_path: Path) -> None:
    documents = make_documents([9, 5, 4], is_chats=True)
    rows = pack_documents(tmp_path / "out", documents, seq_len=8)
    assert (rows.num_rows, rows.info.num_padding_tokens) == (2, 0)


def test_chats_follow_a_long_one_in_its_last_row(tmp_path: Path) -> None:
    documents = make_documents([8 + 1 + 3, 5], is_chats=True)
    rows = pack_documents(tmp_path / "out", documents, seq_len=8)
    assert rows.num_rows == 2
    assert rows.read([1]).document_ids.tolist() == [[0] * 4 + [1] * 5]


def test_short_text_gives_one_padded_row(tmp_path: Path) -> None:
    rows = pack_documents(tmp_path / "out", make_documents([3], is_chats=False), seq_len=8)
    assert rows.read([0]).mask.tolist() == [[False, True, True] + [False] * 6]
    assert rows.info.num_padding_tokens == 6


def test_chats_of_sixty_tokens_use_97_of_100_positions(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).lognormal(4.0, 0.4, 20_000).astype(int) + 8
    documents = make_documents(lengths.tolist(), is_chats=True)
    rows = pack_documents(tmp_path / "out", documents, seq_len=256, batches=[4000])
    assert rows.info.num_padding_tokens < 0.03 * rows.num_rows * 257


def test_open_rows_are_bounded_in_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MAX_OPEN_TOKENS", 0)
    documents = make_documents([20] * 10, is_chats=True)
    rows = pack_documents(tmp_path / "out", documents, seq_len=30)
    check_nothing_is_lost(rows, documents)
    assert rows.num_rows == 10
