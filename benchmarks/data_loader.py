"""Measure the data loader on packed sequences in the page cache."""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from data_stages import Figure

from llm.artifact import ArtifactWriter
from llm.config import OptimizationConfig
from llm.data.packed import PackedLayout, PackedSequences, shard_prefix, write_pack_json
from llm.data.packed_writer import EncodedDocument, EncodedDocuments, write_packed_shard
from llm.data.packing import pack_best_fit
from llm.training.batches import batches_of_steps
from llm.training.objectives import NextToken

SEQ_LEN, VOCAB_SIZE = 2048, 50_257
MEAN_DOCUMENT_TOKENS = 700
SEQUENCES_PER_STEP = 64
TOKENS_MEASURED = 100_000_000


def measure_loader(options: argparse.Namespace, folder: Path) -> Iterator[Figure]:
    """Tokens per second of `batches_of_steps`, shuffled, with one torch thread."""
    torch.set_num_threads(1)
    num_tokens = options.megabytes * 1_000_000 // 2  # uint16
    for num_shards in (12, 256):
        sequences = _write_sequences(folder / str(num_shards), num_tokens // num_shards, num_shards)
        sequences.read(
            np.arange(sequences.num_sequences)
        )  # opens every shard and fills the page cache
        for document_mask in (False, True):
            rates = [_rate(sequences, document_mask) for _ in range(options.repeats)]
            documents = " with document ids" if document_mask else ""
            yield Figure(
                measure=f"loader, T={SEQ_LEN}, {num_shards} shards{documents}",
                value=f"{np.median(rates):.1f} M tokens/s",
                target=">= 12",
            )


def _rate(sequences: PackedSequences, document_mask: bool) -> float:
    num_steps = TOKENS_MEASURED // (SEQUENCES_PER_STEP * SEQ_LEN)
    steps = batches_of_steps(
        sequences,
        NextToken(document_mask=document_mask),
        OptimizationConfig(num_steps=num_steps, global_batch_size=SEQUENCES_PER_STEP),
        seed=1,
        first_step=0,
        process=0,
        num_processes=1,
        micro_batch_size=8,
        device=torch.device("cpu"),
    )
    started_at = time.perf_counter()
    num_tokens = sum(batch.inputs.numel() for step in steps for batch in step.micro_batches)
    return num_tokens / (time.perf_counter() - started_at) / 1e6


def _write_sequences(folder: Path, shard_tokens: int, num_shards: int) -> PackedSequences:
    layout = PackedLayout(
        seq_len=SEQ_LEN, vocab_size=VOCAB_SIZE, content="text", bos_id=0, pad_id=VOCAB_SIZE - 1
    )
    rng = np.random.default_rng(1)
    writer, infos = ArtifactWriter(folder), []
    for number in range(num_shards):
        lengths = rng.exponential(MEAN_DOCUMENT_TOKENS, shard_tokens // MEAN_DOCUMENT_TOKENS)
        documents = EncodedDocuments(layout.dtype)
        for length in lengths.astype(np.int64) + 2:
            tokens = rng.integers(1, VOCAB_SIZE - 1, length, dtype=np.uint32)
            tokens[0] = layout.bos_id
            documents.add([EncodedDocument(id=bytes(16), tokens=tokens)])
        segments = pack_best_fit(documents.lengths, SEQ_LEN)
        prefix = shard_prefix("train", number)
        token_bytes = np.ones(VOCAB_SIZE, dtype=np.int64)
        infos.append(write_packed_shard(writer, prefix, layout, documents, segments, token_bytes))
    write_pack_json(writer, layout, {"train": infos})
    return PackedSequences(folder, "train")
