"""The stage `pack`: encode texts, chats or preference pairs and pack them into sequences of tokens.

The documents of a split, in a seeded order, are divided into parts of about `shard_bytes`. Each
part is encoded and packed alone, as a shard.
"""

import functools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from llm.artifact import ArtifactWriter, Json, canonical
from llm.config import PackConfig, ShareConfig, read_section
from llm.data.documents import SPLITS, Document, DocumentReader, read_content
from llm.data.encoding import DocumentEncoder
from llm.data.mixture import DocumentSize, SourceTally, add_tallies, mix_sources
from llm.data.packed import (
    PackedCounts,
    PackedLayout,
    PackedShard,
    add_counts,
    shard_prefix,
    write_pack_json,
)
from llm.data.packed_writer import EncodedDocument, EncodedDocuments, write_packed_shard
from llm.data.packing import pack_best_fit, pack_concatenated
from llm.data.permutation import permute
from llm.errors import DataError
from llm.runtime.job import Job, run_job
from llm.runtime.shards import FinishedShard, Shard, do_shards
from llm.seeds import derive_seed
from llm.tokenizer.base import Tokenizer
from llm.tokenizer.load import load_tokenizer

ENCODE_BATCH_BYTES = 1 << 20
MIN_DOCUMENTS = 8  # of mean length, in a part's share of a cap: its first may be longer than that

Ordinals = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitPart:
    """One of the equal parts of a split, in the seeded order of its documents."""

    split: str
    number: int
    num_parts: int

    def of(self, total: int) -> range:
        """Return the indices of this part of `total` items."""
        return range(*(total * n // self.num_parts for n in (self.number, self.number + 1)))


@dataclass(kw_only=True, slots=True)
class EncodedBatch:
    """Documents encoded together."""

    documents: list[Document] = field(default_factory=list[Document])
    encoded: list[EncodedDocument] = field(default_factory=list[EncodedDocument])
    size_bytes: int = 0
    """Of all lines read."""


def pack(job: Job, writer: ArtifactWriter) -> dict[str, Json]:
    """Encode and pack the documents of both splits, shard by shard.

    Raises:
        DataError: a split or a source is empty or has no targets, or the training text is shorter
        than one sequence.
    """
    config = read_section(PackConfig, job.settings)
    files = {split: DocumentReader(Path(job.inputs["documents"]), split) for split in SPLITS}
    _refuse_empty(files.values())
    layout, _ = _read_layout(job, config)
    num_of_source = _count_by_source(files["train"], config)
    parts = [
        SplitPart(split=split, number=number, num_parts=num_parts)
        for split, file in files.items()
        for num_parts in [_num_parts(file, config, num_of_source if split == "train" else [])]
        for number in range(num_parts)
    ]
    shards = [
        Shard(
            name=f"{part.split}-{part.number:05}",
            settings=asdict(part),
            size=len(part.of(files[part.split].size_bytes)),
        )
        for part in parts
    ]
    if len(shards) == len(SPLITS):  # validation takes less time than starting a process
        job = replace(job, runtime=replace(job.runtime, shard_workers=1))
    finished = list(zip(parts, do_shards(job, pack_shard, shards, "bytes"), strict=True))
    splits: dict[str, list[PackedShard]] = {}
    summary: dict[str, Json] = {"content": layout.content, "vocab_size": layout.vocab_size}
    for split, file in files.items():
        made = [shard for part, shard in finished if part.split == split]
        splits[split] = _adopt(writer, split, made)
        counts = add_counts(splits[split])
        losses = _add_losses(made)
        _refuse_too_little(counts, losses, layout, split, file.path)
        summary |= {f"{split}_{name.removeprefix('num_')}": n for name, n in asdict(counts).items()}
        summary |= {f"{split}_{name}": n for name, n in losses.items()}
    sources = _report_sources(config.shares, [shard for _, shard in finished], num_of_source)
    for number, source in enumerate(sources):
        summary |= {f"source_{number}_{name}": value for name, value in source.items()}
    write_pack_json(writer, layout, splits, sources)
    return summary


def pack_shard(job: Job, writer: ArtifactWriter) -> dict[str, Json]:
    """Encode and pack the documents of one part, all held in memory as tokens."""
    config = read_section(PackConfig, job.settings)
    part = SplitPart(**cast(dict[str, Any], job.shard))
    layout, tokenizer = _read_layout(job, config)
    encoder = DocumentEncoder(
        tokenizer=tokenizer,
        content=layout.content,
        max_tokens=layout.seq_len + 1,
        long_chats=config.long_chats,
    )
    file = DocumentReader(Path(job.inputs["documents"]), part.split)
    seed = derive_seed(job.seed, "document order", part.split)
    is_mixed = bool(config.shares) and part.split == "train"  # validation has each document once
    tallies = [SourceTally() for _ in config.shares] if is_mixed else []
    batches = (
        _mixed_batches(file, config.shares, part, seed, encoder, tallies)
        if is_mixed
        else _batches(file, _take_part(np.arange(len(file)), part, seed), encoder)
    )
    documents = EncodedDocuments(layout.dtype)
    done_bytes = num_bytes = 0
    total_bytes = len(part.of(file.size_bytes))
    for batch in batches:
        documents.add(batch.encoded)
        pairs = zip(batch.documents, batch.encoded, strict=True)
        num_bytes += sum(_num_target_bytes(*pair, tokenizer.token_bytes) for pair in pairs)
        done_bytes = min(done_bytes + batch.size_bytes, total_bytes)
        job.report_progress(done_bytes, total_bytes, "bytes")
    is_concatenated = config.packing == "concatenate" and layout.content == "text"
    pack_documents = pack_concatenated if is_concatenated else pack_best_fit
    segments = pack_documents(documents.lengths, layout.seq_len)
    info = write_packed_shard(writer, "", layout, documents, segments, tokenizer.token_bytes)
    found = info.counts.num_tokens, info.counts.num_bytes
    expected = int(documents.lengths.sum()), num_bytes
    assert found == expected, f"wrote {found} tokens and target bytes of {expected}"
    return {
        "info": canonical(info),
        "losses": {**encoder.losses.counts()},
        "tallies": [canonical(tally) for tally in tallies],
    }


def _read_layout(job: Job, config: PackConfig) -> tuple[PackedLayout, Tokenizer]:
    tokenizer = load_tokenizer(Path(job.inputs["tokenizer"]))
    layout = PackedLayout(
        seq_len=config.seq_len,
        vocab_size=tokenizer.vocab_size,
        content=read_content(Path(job.inputs["documents"])),
        bos_id=tokenizer.bos_id,
        pad_id=tokenizer.pad_id,
    )
    return layout, tokenizer


def _count_by_source(file: DocumentReader, config: PackConfig) -> list[int]:
    """Return the number of documents of each source of a mixture."""
    if not config.shares:
        return []
    return np.bincount(file.source_numbers(), minlength=len(config.shares)).tolist()


def _num_parts(file: DocumentReader, config: PackConfig, num_of_source: Sequence[int]) -> int:
    """Return the number of parts of a split, so that each has documents of every source."""
    size_bytes, most = float(file.size_bytes), len(file)
    if num_of_source:
        weights = [share.weight for share in config.shares]
        caps = [cap for s in config.shares for cap in (s.max_tokens, s.max_bytes) if cap]
        mean_bytes = file.size_bytes / len(file)  # a document has fewer tokens than bytes
        num_by_caps = [int(cap / mean_bytes / MIN_DOCUMENTS) for cap in caps]
        most = min(*num_of_source, *num_by_caps)
        # small sources are read again until the largest for its weight has been read once, so a
        # mixture is longer than its sources
        repeats = max(n / weight for n, weight in zip(num_of_source, weights, strict=True))
        size_bytes *= repeats * sum(weights) / len(file)
    return max(1, min(most, math.ceil(size_bytes / config.shard_bytes)))


def _take_part(ordinals: Ordinals, part: SplitPart, seed: int) -> Ordinals:
    """Return the documents of a part, in a seeded order."""
    indices = np.array(part.of(len(ordinals)), dtype=np.int64)
    return ordinals[permute(indices, len(ordinals), seed)]


def _batches(
    file: DocumentReader, ordinals: Ordinals, encoder: DocumentEncoder
) -> Iterator[EncodedBatch]:
    """Yield these documents encoded, about ENCODE_BATCH_BYTES at a time."""
    read: list[Document] = []
    size_bytes = 0
    for document in file.read(ordinals):
        read.append(document)
        size_bytes += document.size_bytes
        if size_bytes >= ENCODE_BATCH_BYTES:
            yield _encoded(read, size_bytes, encoder)
            read, size_bytes = [], 0
    if read:
        yield _encoded(read, size_bytes, encoder)


def _encoded(read: Sequence[Document], size_bytes: int, encoder: DocumentEncoder) -> EncodedBatch:
    pairs = encoder.encode(read)
    return EncodedBatch(
        documents=[document for document, _ in pairs],
        encoded=[encoded for _, encoded in pairs],
        size_bytes=size_bytes,
    )


def _mixed_batches(
    file: DocumentReader,
    shares: Sequence[ShareConfig],
    part: SplitPart,
    seed: int,
    encoder: DocumentEncoder,
    tallies: Sequence[SourceTally],
) -> Iterator[EncodedBatch]:
    """Yield this part's documents of several sources, mixed."""
    numbers = file.source_numbers()  # (num_documents,)

    def read(number: int) -> Iterator[tuple[Document, EncodedDocument]]:
        ordinals = _take_part(np.flatnonzero(numbers == number), part, seed + number)
        for some in _batches(file, ordinals, encoder):
            yield from zip(some.documents, some.encoded, strict=True)

    batch = EncodedBatch()
    sources = [functools.partial(read, number) for number in range(len(shares))]
    parts = [_part_of_share(share, part) for share in shares]
    for document, encoded in mix_sources(parts, sources, _size_of, tallies):
        batch.documents.append(document)
        batch.encoded.append(encoded)
        batch.size_bytes += document.size_bytes
        if batch.size_bytes >= ENCODE_BATCH_BYTES:
            yield batch
            batch = EncodedBatch()
    if batch.documents:
        yield batch


def _part_of_share(share: ShareConfig, part: SplitPart) -> ShareConfig:
    def cap(total: int) -> int:
        return max(1, len(part.of(total))) if total else 0  # 0: no cap

    return replace(share, max_tokens=cap(share.max_tokens), max_bytes=cap(share.max_bytes))


def _size_of(item: tuple[Document, EncodedDocument]) -> DocumentSize:
    document, encoded = item
    num_bytes = sum(len(text.encode()) for text in document.texts)
    return DocumentSize(num_tokens=len(encoded.tokens), num_bytes=num_bytes)


def _num_target_bytes(
    document: Document, encoded: EncodedDocument, token_bytes: npt.NDArray[np.int64]
) -> int:
    """Return the bytes of the targets: all of a text, or those of the tokens of the mask."""
    if encoded.mask is None:
        return len(document.text.encode())
    return int(token_bytes[encoded.tokens[encoded.mask]].sum())


def _adopt(writer: ArtifactWriter, split: str, made: Sequence[FinishedShard]) -> list[PackedShard]:
    """Move the files of shards into the artifact, but for shards without sequences."""
    infos: list[PackedShard] = []
    for shard in made:
        info = PackedShard.from_json(cast(dict[str, Any], shard.summary["info"]))
        if info.counts.num_rows:
            prefix = shard_prefix(split, len(infos))
            shard.adopt(writer, {record.path: prefix + record.path for record in shard.files})
            infos.append(info)
    return infos


def _report_sources(
    shares: Sequence[ShareConfig], made: Sequence[FinishedShard], num_of_source: Sequence[int]
) -> list[dict[str, Json]]:
    """Report what each source gave; caps and the vocabulary decide which documents are unused.

    Raises:
        DataError: a source gave nothing.
    """
    found = [cast(list[dict[str, int]], shard.summary["tallies"]) for shard in made]
    mixed = [[SourceTally(**tally) for tally in tallies] for tallies in found if tallies]
    total = [add_tallies(of_source) for of_source in zip(*mixed, strict=True)]
    num_tokens = sum(tally.num_tokens for tally in total)
    weight = sum(share.weight for share in shares)
    sources: list[dict[str, Json]] = []
    for number, (share, tally) in enumerate(zip(shares, total, strict=True)):
        if not tally.num_documents:
            raise DataError(
                f"sources.{number}: none of its documents is left for training; expected at least"
                " one. Give more data, raise its max_tokens and max_bytes, or leave it out"
            )
        sources.append(
            {
                "asked_share": round(share.weight / weight, 6),
                "share": round(tally.num_tokens / num_tokens, 6),
                "tokens": tally.num_tokens,
                "documents": tally.num_documents,
                "distinct_documents": tally.num_distinct_documents,
                "unused_documents": num_of_source[number] - tally.num_distinct_documents,
                "epochs": tally.num_epochs,
            }
        )
    return sources


def _refuse_empty(files: Iterable[DocumentReader]) -> None:
    if empty := [str(documents.path) for documents in files if not len(documents)]:
        raise DataError(
            f"{', '.join(empty)}: no documents, expected at least one; give more data or change"
            " clean.validation_fraction"
        )


def _add_losses(made: Sequence[FinishedShard]) -> dict[str, int]:
    """Return how many documents all shards of a split left out or truncated, by kind of loss."""
    total: Counter[str] = Counter()
    for shard in made:
        total.update(cast(dict[str, int], shard.summary["losses"]))
    return dict(total)


def _refuse_too_little(
    counts: PackedCounts, losses: Mapping[str, int], layout: PackedLayout, split: str, path: Path
) -> None:
    longest = f"pack.seq_len + 1 = {layout.seq_len + 1}"
    if counts.num_target_tokens == 0:
        lost = "".join(f"; {name.replace('_', ' ')}: {count}" for name, count in losses.items())
        raise DataError(
            f"{path}: no targets to learn in {counts.num_documents} documents{lost}; expected text,"
            f" or chats or pairs with answers of the assistant. They are whole up to {longest}"
            " tokens: raise pack.seq_len, change pack.long_chats, or give more data"
        )
    if layout.content == "text" and split == "train" and counts.num_tokens <= layout.seq_len:
        raise DataError(
            f"{path}: {counts.num_tokens} tokens, less than one sequence of {longest}; lower"
            " pack.seq_len or give more text"
        )


if __name__ == "__main__":
    run_job(pack, pack_shard)
