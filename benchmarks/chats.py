"""Packed chats with a document mask against one chat per sequence: equal losses, and tokens/s.

    OMP_NUM_THREADS=1 python -m benchmarks.chats [--data instruction-data.json]

The chats of the running Python's standard library, or a JSON list with `instruction`, `input` and
`output`, are rendered and packed as the stage `pack` does. A step is forward and backward of the
quickstart's model in fp32, without the optimizer, on the same number of positions, about; tokens
are those of chats, not padding. Chats of their own are padded to the context, and as others do to
the longest of their batch. All ways alternate in one process; rates are medians.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np
import torch

from llm.artifact import ArtifactWriter
from llm.config import ModelConfig
from llm.data.chat import RenderedChat, render_chats
from llm.data.content import Message
from llm.data.packed import (
    PADDING_ID,
    PackedArrays,
    PackedLayout,
    PackedSequences,
    shard_prefix,
    write_pack_json,
)
from llm.data.packed_writer import EncodedDocument, EncodedDocuments, write_packed_shard
from llm.data.packing import pack_best_fit
from llm.data.sources.stdlib_chats import chat_records
from llm.model.loss import ModelWithLoss
from llm.model.transformer import Transformer
from llm.tokenizer.base import Tokenizer
from llm.tokenizer.bpe import ByteLevelBPE
from llm.training.objectives import NextToken

SEQ_LEN, VOCAB_SIZE, NUM_CHATS = 256, 4096, 1100
QUICKSTART = ModelConfig(num_layers=4, d_model=256, num_heads=4, num_kv_heads=4, d_ff=704)
SEQUENCES_PER_STEP = 8
PACKED = "packed, document mask"
CONTEXT = "one chat each, padded to the context"
LONGEST = "one chat each, padded to the longest"
TARGET_RATIO, TARGET_DIFFERENCE = 1.5, 1e-5


def read_chats(path: Path | None) -> list[list[Message]]:
    """Read the chats to measure on."""
    if path is None:
        records = islice(chat_records(), NUM_CHATS)
        return [cast(list[Message], record["messages"]) for record in records]
    return [
        [
            Message(role="user", content=f"{record['instruction']}\n{record['input']}".strip()),
            Message(role="assistant", content=record["output"]),
        ]
        for record in json.loads(path.read_text(encoding="utf-8"))
    ]


def packed(chats: Sequence[RenderedChat], tokenizer: Tokenizer, folder: Path) -> PackedArrays:
    """Pack chats as the stage does and read the sequences."""
    layout = PackedLayout(
        seq_len=SEQ_LEN,
        vocab_size=tokenizer.vocab_size,
        content="chats",
        bos_id=tokenizer.bos_id,
        pad_id=tokenizer.pad_id,
    )
    documents = EncodedDocuments(layout.dtype)
    for ids, mask in chats:
        tokens = np.array(ids, dtype=np.uint32)
        documents.add([EncodedDocument(id=bytes(16), tokens=tokens, mask=np.array(mask))])
    writer, segments = ArtifactWriter(folder), pack_best_fit(documents.lengths, SEQ_LEN)
    prefix = shard_prefix("train", 0)
    info = write_packed_shard(writer, prefix, layout, documents, segments, tokenizer.token_bytes)
    write_pack_json(writer, layout, {"train": [info]})
    sequences = PackedSequences(folder, "train")
    return sequences.read(np.arange(sequences.num_sequences))


def apart(chats: Sequence[RenderedChat], tokenizer: Tokenizer, width: int) -> PackedArrays:
    """Put each chat into a sequence of its own, padded to `width`."""
    arrays = PackedArrays(
        tokens=np.full((len(chats), width), tokenizer.pad_id, dtype=np.int64),
        mask=np.zeros((len(chats), width), dtype=np.bool_),
        document_ids=np.full((len(chats), width), PADDING_ID, dtype=np.int64),
    )
    for row, (ids, mask) in enumerate(chats):
        arrays.tokens[row, : len(ids)], arrays.mask[row, : len(ids)] = ids, mask
        arrays.document_ids[row, : len(ids)] = row
    return arrays


def batches_of_ways(
    chats: Sequence[RenderedChat], tokenizer: Tokenizer, folder: Path
) -> dict[str, list[PackedArrays]]:
    """Return the batches of each way."""
    longest = [max(len(chat.ids) for chat in chats[n : n + 32]) for n in range(0, len(chats), 32)]
    size = round(SEQUENCES_PER_STEP * SEQ_LEN / statistics.mean(longest))
    groups = [chats[start : start + size] for start in range(0, len(chats), size)]
    batches = {
        way: [
            PackedArrays(*(each[start : start + SEQUENCES_PER_STEP] for each in arrays))
            for start in range(0, len(arrays.tokens), SEQUENCES_PER_STEP)
        ]
        for way, arrays in (
            (PACKED, packed(chats, tokenizer, folder)),
            (CONTEXT, apart(chats, tokenizer, SEQ_LEN + 1)),
        )
    }
    of_group = [apart(group, tokenizer, max(len(c.ids) for c in group)) for group in groups]
    return {**batches, LONGEST: of_group}


def measure(chats: Sequence[RenderedChat], tokenizer: Tokenizer, num_turns: int) -> None:
    """Print loss and speed of each way."""
    model = Transformer(QUICKSTART, tokenizer.vocab_size, SEQ_LEN)
    model.initialize(torch.Generator().manual_seed(1))
    with_loss = ModelWithLoss(model)
    with tempfile.TemporaryDirectory() as folder:
        ways = batches_of_ways(chats, tokenizer, Path(folder))
    objectives = {way: NextToken(document_mask=way == PACKED) for way in ways}
    losses: dict[str, float] = {}
    for way, batches in ways.items():
        total = count = 0.0
        for arrays in batches:
            batch = objectives[way].make_batch(arrays, np.arange(len(arrays.tokens)))
            with torch.no_grad():
                total += float(objectives[way].loss(with_loss, batch))
            count += int(objectives[way].count_targets(batch).sum())
        losses[way] = total / count
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(num_turns + 1):  # the first is not counted
        for way, batches in ways.items():
            arrays = batches[turn % len(batches)]
            started_at = time.perf_counter()
            batch = objectives[way].make_batch(arrays, np.arange(len(arrays.tokens)))
            objectives[way].loss(with_loss, batch).backward()
            seconds = time.perf_counter() - started_at
            model.zero_grad()
            if turn:
                rates[way].append(float((arrays.document_ids != PADDING_ID).sum()) / seconds)
    medians = {way: statistics.median(found) for way, found in rates.items()}
    mean = statistics.mean(len(chat.ids) for chat in chats)
    print(f"{len(chats)} chats of {mean:.0f} tokens, context {SEQ_LEN}, "
          f"{torch.get_num_threads()} thread(s)")  # fmt: skip
    print(f"{'':40} {'loss':>10} {'difference':>11} {'tokens/s':>9} {'packed':>8}")
    for way in ways:
        print(
            f"{way:40} {losses[way]:10.6f} {losses[way] - losses[PACKED]:11.1e}"
            f" {medians[way]:9,.0f} {medians[PACKED] / medians[way]:7.2f}x"
        )
    print(f"Targets: difference <= {TARGET_DIFFERENCE:.0e}, packed >= {TARGET_RATIO}x.")


def main() -> None:
    """Measure on the chats asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, help="JSON list of Alpaca records")
    parser.add_argument("--chat-format", default="turns")
    parser.add_argument("--turns", type=int, default=9, help="steps of each way")
    options = parser.parse_args()
    chats = read_chats(options.data)
    tokenizer = ByteLevelBPE.train([m["content"] for chat in chats for m in chat], VOCAB_SIZE)
    tokenizer.chat_format = options.chat_format
    rendered = [c for c in render_chats(chats, tokenizer) if len(c.ids) <= SEQ_LEN]
    measure(rendered, tokenizer, options.turns)


if __name__ == "__main__":
    main()
