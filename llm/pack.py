"""Pack documents into rows of tokens for training: text and chats through one packer."""

import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llm.artifact import ArtifactWriter, Json
from llm.config import PackConfig, ShareConfig, read_section
from llm.data.chat import render_chats
from llm.data.document_file import SPLITS, Document, DocumentFile, read_content
from llm.data.mixture import Size, SourceTally, mix
from llm.data.packing import EncodedDocument, make_packer
from llm.data.permutation import permute
from llm.data.rows import RowLayout, RowWriter, SplitInfo, write_pack_json
from llm.errors import DataError
from llm.job import Job, run_job
from llm.seeds import derive_seed
from llm.tokenizer.base import Tokenizer
from llm.tokenizer.load import load_tokenizer

BATCH_BYTES = 1 << 20
ORDER_DOCUMENTS = 1 << 16


def pack(job: Job, writer: ArtifactWriter) -> dict[str, Json]:
    """Encode the documents of both splits and lay them into rows.

    Raises:
        DataError: a split is empty or has nothing to learn, or the training text is shorter than
        one row.
    """
    config = read_section(PackConfig, job.settings)
    folder = Path(job.inputs["documents"])
    tokenizer = load_tokenizer(Path(job.inputs["tokenizer"]))
    layout = RowLayout(
        seq_len=config.seq_len,
        vocab_size=tokenizer.vocab_size,
        content=read_content(folder),
        bos_id=tokenizer.bos_id,
        pad_id=tokenizer.pad_id,
    )
    files = {split: DocumentFile(folder, split) for split in SPLITS}
    _refuse_empty(files.values())
    infos: dict[str, SplitInfo] = {}
    num_left_out: Counter[str] = Counter()
    mixture = Mixture(config.shares, files["train"]) if config.shares else None
    done_bytes, total_bytes = 0, sum(documents.size_bytes for documents in files.values())
    for split, documents in files.items():
        seed = derive_seed(job.seed, "document order", split)
        batches = (
            _batches(documents, np.arange(len(documents)), seed, tokenizer)
            if mixture is None or split != "train"  # validation is each document once
            else _mixed_batches(documents, mixture, seed, tokenizer)
        )
        with RowWriter(writer, split, layout, tokenizer.token_bytes) as rows:
            for batch in _pack_batches(batches, rows):
                done_bytes = min(done_bytes + batch.size_bytes, total_bytes)
                num_left_out[split] += batch.num_left_out
                job.report_progress(done_bytes, total_bytes, "bytes")
        infos[split] = rows.info()
        _refuse_too_little(infos[split], layout, documents.path)
    sources = mixture.report() if mixture else []
    write_pack_json(writer, layout, infos, sources)
    summary: dict[str, Json] = {"content": layout.content, "vocab_size": layout.vocab_size}
    for split, info in infos.items():
        counts = {name: n for name, n in asdict(info).items() if isinstance(n, int)}
        summary |= {f"{split}_{name.removeprefix('num_')}": n for name, n in counts.items()}
        if num_left_out[split]:  # by a vocabulary of characters without byte fallback alone
            summary[f"{split}_documents_with_unknown_characters"] = num_left_out[split]
    for number, source in enumerate(sources):
        summary |= {f"source_{number}_{name}": figure for name, figure in source.items()}
    return summary


@dataclass(kw_only=True, slots=True)
class Batch:
    """Documents that are encoded and laid into rows together."""

    documents: list[Document] = field(default_factory=list[Document])
    encoded: list[EncodedDocument] = field(default_factory=list[EncodedDocument])
    size_bytes: int = 0
    """Of their lines, those left out included."""
    num_left_out: int = 0
    """Documents that the vocabulary cannot say."""


class Mixture:
    """The shares of several sources, which documents are whose, and what became of them."""

    def __init__(self, shares: Sequence[ShareConfig], documents: DocumentFile) -> None:
        self.shares = shares
        self.tallies = [SourceTally() for _ in shares]
        self._numbers = documents.source_numbers()  # (num_documents,)

    def ordinals(self, number: int) -> npt.NDArray[np.int64]:
        """Return the documents of one source."""
        return np.flatnonzero(self._numbers == number)

    def report(self) -> list[dict[str, Json]]:
        """Say what each source gave. Unused is what its caps or the vocabulary did not allow."""
        num_tokens = sum(tally.num_tokens for tally in self.tallies)
        weight = sum(share.weight for share in self.shares)
        return [
            {
                "asked_share": round(share.weight / weight, 6),
                "share": round(tally.num_tokens / num_tokens, 6),
                "tokens": tally.num_tokens,
                "documents": tally.num_documents,
                "distinct_documents": tally.num_distinct_documents,
                "unused_documents": len(self.ordinals(number)) - tally.num_distinct_documents,
                "epochs": tally.num_epochs,
            }
            for number, (share, tally) in enumerate(zip(self.shares, self.tallies, strict=True))
        ]


def _pack_batches(batches: Iterable[Batch], rows: RowWriter) -> Iterator[Batch]:
    """Lay batch after batch into rows, and yield each when it is done."""
    packer = make_packer(rows)
    num_documents = num_tokens = num_bytes = 0
    for batch in batches:
        packer.add(batch.encoded)
        num_documents += len(batch.encoded)
        num_tokens += sum(len(document.tokens) for document in batch.encoded)
        num_bytes += sum(map(_num_target_bytes, batch.documents))
        yield batch
    packer.finish()
    info = rows.info()
    found, expected = (info.num_tokens, info.num_bytes), (num_tokens, num_bytes)
    assert found == expected, f"wrote {found} tokens and target bytes of {expected}"
    assert info.num_documents == num_documents


def _batches(
    documents: DocumentFile, ordinals: npt.NDArray[np.int64], seed: int, tokenizer: Tokenizer
) -> Iterator[Batch]:
    """Yield these documents in a seeded order, about BATCH_BYTES at a time, and encoded."""
    read: list[Document] = []
    size_bytes = 0
    for start in range(0, len(ordinals), ORDER_DOCUMENTS):
        places = np.arange(start, min(start + ORDER_DOCUMENTS, len(ordinals)))
        for document in documents.read(ordinals[permute(places, len(ordinals), seed)]):
            read.append(document)
            size_bytes += document.size_bytes
            if size_bytes >= BATCH_BYTES:
                yield _encoded(read, size_bytes, tokenizer)
                read, size_bytes = [], 0
    if read:
        yield _encoded(read, size_bytes, tokenizer)


def _encoded(read: Sequence[Document], size_bytes: int, tokenizer: Tokenizer) -> Batch:
    known = [document for document in read if all(map(tokenizer.can_encode, document.texts))]
    return Batch(
        documents=known,
        encoded=_encode(known, tokenizer),
        size_bytes=size_bytes,
        num_left_out=len(read) - len(known),
    )


def _mixed_batches(
    documents: DocumentFile, mixture: Mixture, seed: int, tokenizer: Tokenizer
) -> Iterator[Batch]:
    """Yield the documents of several sources as they are mixed, each source in a seeded order."""

    def read(number: int) -> Iterator[tuple[Document, EncodedDocument]]:
        for part in _batches(documents, mixture.ordinals(number), seed + number, tokenizer):
            yield from zip(part.documents, part.encoded, strict=True)

    batch = Batch()
    sources = [functools.partial(read, number) for number in range(len(mixture.shares))]
    for document, encoded in mix(mixture.shares, sources, _size_of, mixture.tallies):
        batch.documents.append(document)
        batch.encoded.append(encoded)
        batch.size_bytes += document.size_bytes
        if batch.size_bytes >= BATCH_BYTES:
            yield batch
            batch = Batch()
    if batch.documents:
        yield batch


def _size_of(item: tuple[Document, EncodedDocument]) -> Size:
    document, encoded = item
    num_bytes = sum(len(text.encode()) for text in document.texts)
    return Size(num_tokens=len(encoded.tokens), num_bytes=num_bytes)


def _encode(batch: Sequence[Document], tokenizer: Tokenizer) -> list[EncodedDocument]:
    if batch and batch[0].messages:
        rendered = render_chats([document.messages for document in batch], tokenizer)
        return [
            EncodedDocument(
                id=document.id,
                tokens=np.array(chat.ids, dtype=np.uint32),
                mask=np.array(chat.mask, dtype=np.bool_),
                kind=document.kind,
            )
            for document, chat in zip(batch, rendered, strict=True)
        ]
    encoded = tokenizer.encode_arrays([document.text for document in batch])
    bos = np.array([tokenizer.bos_id], dtype=np.uint32)
    return [
        EncodedDocument(id=document.id, tokens=np.concatenate([bos, ids]))
        for document, ids in zip(batch, encoded, strict=True)
    ]


def _num_target_bytes(document: Document) -> int:
    """Return the UTF-8 bytes to learn: all of a text, the assistant's words of a chat."""
    if not document.messages:
        return len(document.text.encode())
    answers = (m["content"] for m in document.messages if m["role"] == "assistant")
    return sum(len(answer.encode()) for answer in answers)


def _refuse_empty(files: Iterable[DocumentFile]) -> None:
    if empty := [str(documents.path) for documents in files if not len(documents)]:
        raise DataError(
            f"{', '.join(empty)}: no documents, expected at least one; give more data or change"
            " clean.validation_fraction"
        )


def _refuse_too_little(info: SplitInfo, layout: RowLayout, path: Path) -> None:
    if info.num_target_tokens == 0:
        raise DataError(
            f"{path}: nothing in it is a target to learn; expected text, or chats with answers of"
            " the assistant"
        )
    if layout.content == "text" and path.stem == "train" and info.num_tokens <= layout.seq_len:
        raise DataError(
            f"{path}: {info.num_tokens} tokens, less than one row of pack.seq_len + 1 ="
            f" {layout.seq_len + 1}; lower pack.seq_len or give more text"
        )


if __name__ == "__main__":
    run_job(pack)
