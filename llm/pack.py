"""Pack documents into rows of tokens for training: text and chats through one packer."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from llm.artifact import ArtifactWriter, Json
from llm.config import PackConfig, read_section
from llm.data.chat import render_chats
from llm.data.document_file import SPLITS, Document, DocumentFile, read_content
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
    done_bytes, total_bytes = 0, sum(documents.size_bytes for documents in files.values())
    for split, documents in files.items():
        seed = derive_seed(job.seed, "document order", split)
        with RowWriter(writer, split, layout, tokenizer.token_bytes) as rows:
            for size_bytes, num_documents in _pack_documents(documents, seed, tokenizer, rows):
                done_bytes += size_bytes
                num_left_out[split] += num_documents
                job.report_progress(done_bytes, total_bytes, "bytes")
        infos[split] = rows.info()
        _refuse_too_little(infos[split], layout, documents.path)
    write_pack_json(writer, layout, infos)
    summary: dict[str, Json] = {"content": layout.content, "vocab_size": layout.vocab_size}
    for split, info in infos.items():
        counts = {name: n for name, n in asdict(info).items() if isinstance(n, int)}
        summary |= {f"{split}_{name.removeprefix('num_')}": n for name, n in counts.items()}
        if num_left_out[split]:  # by a vocabulary of characters without byte fallback alone
            summary[f"{split}_documents_with_unknown_characters"] = num_left_out[split]
    return summary


def _pack_documents(
    documents: DocumentFile, seed: int, tokenizer: Tokenizer, rows: RowWriter
) -> Iterator[tuple[int, int]]:
    """Pack all documents in a seeded order, but those that the vocabulary cannot say.

    Yield the bytes read and the documents left out, batch by batch.
    """
    packer = make_packer(rows)
    num_tokens = num_bytes = num_left_out = 0
    for read in _batches(documents, seed):
        batch = [d for d in read if all(map(tokenizer.can_encode, d.texts))]
        num_left_out += len(read) - len(batch)
        encoded = _encode(batch, tokenizer)
        packer.add(encoded)
        num_tokens += sum(len(document.tokens) for document in encoded)
        num_bytes += sum(map(_num_target_bytes, batch))
        yield sum(document.size_bytes for document in read), len(read) - len(batch)
    packer.finish()
    info = rows.info()
    found, expected = (info.num_tokens, info.num_bytes), (num_tokens, num_bytes)
    assert found == expected, f"wrote {found} tokens and target bytes of {expected}"
    assert info.num_documents == len(documents) - num_left_out


def _batches(documents: DocumentFile, seed: int) -> Iterator[list[Document]]:
    """Yield all documents in a seeded order, about BATCH_BYTES at a time."""
    batch: list[Document] = []
    size_bytes = 0
    for start in range(0, len(documents), ORDER_DOCUMENTS):
        places = np.arange(start, min(start + ORDER_DOCUMENTS, len(documents)))
        for document in documents.read(permute(places, len(documents), seed)):
            batch.append(document)
            size_bytes += document.size_bytes
            if size_bytes >= BATCH_BYTES:
                yield batch
                batch, size_bytes = [], 0
    if batch:
        yield batch


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
