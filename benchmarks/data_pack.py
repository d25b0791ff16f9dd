"""Measure packing: write a million encoded documents as packed sequences, in one thread."""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from data_stages import Figure

from llm.artifact import ArtifactWriter
from llm.data.packed import PackedLayout, PackedSequences, shard_prefix, write_pack_json
from llm.data.packed_writer import EncodedDocument, EncodedDocuments, write_packed_shard
from llm.data.packing import pack_best_fit

NUM_DOCUMENTS, DOCUMENTS_AT_ONCE = 1_000_000, 1000
SEQ_LEN, VOCAB_SIZE, BOS, PAD = 2048, 32_768, 0, 5


def measure_pack(options: argparse.Namespace, folder: Path) -> Iterator[Figure]:
    """Time of best-fit packing and of writing, padding, and lost tokens."""
    rng = np.random.default_rng(1)
    lengths = np.minimum(rng.lognormal(5, 1, NUM_DOCUMENTS).astype(np.int64) + 1, 100_000)
    stream = rng.integers(10, VOCAB_SIZE, lengths.sum(), dtype=np.uint16).astype(np.uint32)
    stream[np.cumsum(lengths) - lengths] = BOS
    layout = PackedLayout(
        seq_len=SEQ_LEN, vocab_size=VOCAB_SIZE, content="text", bos_id=BOS, pad_id=PAD
    )
    token_bytes = np.full(VOCAB_SIZE, 4)
    token_bytes[:10] = 0
    encoded = [
        EncodedDocument(id=bytes(16), tokens=tokens)
        for tokens in np.split(stream, np.cumsum(lengths)[:-1])
    ]
    started_at = time.perf_counter()
    documents = EncodedDocuments(layout.dtype)
    for start in range(0, NUM_DOCUMENTS, DOCUMENTS_AT_ONCE):
        documents.add(encoded[start : start + DOCUMENTS_AT_ONCE])
    held_at = time.perf_counter()
    segments = pack_best_fit(documents.lengths, SEQ_LEN)
    placed_at = time.perf_counter()
    writer = ArtifactWriter(folder / "packed")
    info = write_packed_shard(
        writer, shard_prefix("train", 0), layout, documents, segments, token_bytes
    )
    write_pack_json(writer, layout, {"train": [info]})
    ended_at = time.perf_counter()
    parts = f"{held_at - started_at:.1f} held, {placed_at - held_at:.1f} placed"
    yield Figure(
        measure=f"pack 1,000,000 documents, {lengths.sum() / 1e6:.0f} M tokens, context {SEQ_LEN}",
        value=f"{ended_at - started_at:.1f} s ({parts}, {ended_at - placed_at:.1f} written)",
        target="<= 10 s",
    )
    rows = PackedSequences(folder / "rows", "train")
    num_positions = rows.num_sequences * (SEQ_LEN + 1)
    yield Figure(
        measure="  positions used, without those that repeat a token",
        value=f"{100 * (1 - rows.info.num_padding_tokens / num_positions):.3f} %,"
        f" {100 * rows.info.num_tokens / num_positions:.3f} %",
        target=">= 99.5 %",
    )
    histogram = np.zeros(VOCAB_SIZE, dtype=np.int64)
    for start in range(0, rows.num_sequences, DOCUMENTS_AT_ONCE):
        some = rows.read(np.arange(start, min(start + DOCUMENTS_AT_ONCE, rows.num_sequences)))
        histogram += np.bincount(some.tokens[some.mask], minlength=VOCAB_SIZE)
    histogram[BOS] = NUM_DOCUMENTS  # the first of a sequence is not a target
    lost = np.abs(histogram - np.bincount(stream, minlength=VOCAB_SIZE)).sum()
    yield Figure(
        measure=f"  tokens lost or doubled; {rows.info.num_cut_documents:,} documents cut",
        value=f"{lost}",
        target="0",
    )
