"""The stage `train_tokenizer`: learn a vocabulary from a sample of the training documents.

The sample is never held in memory: its documents are read again while they are learned from.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from llm.artifact import ArtifactWriter, Json
from llm.config import TrainTokenizerConfig, read_section
from llm.data.documents import DocumentReader
from llm.data.sources.http import fetch_file
from llm.errors import DataError
from llm.runtime.job import Job, run_job
from llm.seeds import derive_seed
from llm.tokenizer.base import Tokenizer
from llm.tokenizer.kinds import TOKENIZER_KINDS, TokenizerCode
from llm.tokenizer.pre_tokenization import split_text
from llm.tokenizer.report import REPORT_JSON, measure_tokenizer

VALIDATION_SAMPLE_BYTES = 1_000_000
# The library needs about 75 bytes of memory for each byte of a distinct word, so random
# letters, or a language without spaces, would take 4 GB from a sample of 50 MB.
MAX_WORD_BYTES = 12_000_000
_WORDS = re.compile(r"\w+|\W+")


def train_tokenizer(job: Job, writer: ArtifactWriter) -> dict[str, Json]:
    """Train a tokenizer on sampled training documents and measure it on validation documents.

    A vocabulary is smaller than `vocab_size` if the text repeats nothing more to merge; the summary
    has both numbers.

    Raises:
        DataError: there is no training text, or published files have another sha256.
        ConfigError: the vocabulary is too small for the text, or a library is missing.
        ConnectionError: the network failed; another try may succeed.
    """
    config = read_section(TrainTokenizerConfig, job.settings)
    kind = TOKENIZER_KINDS[config.kind]
    folder = Path(job.inputs["documents"])
    seed = derive_seed(job.seed, "tokenizer sample")
    sample = TextSample(())
    learns_words = "vocab_size" in kind.settings
    if kind.learns_from_text:
        documents = DocumentReader(folder, "train")
        texts = draw_sample(documents, seed, config.sample_bytes, job.report_progress)
        if learns_words:
            texts = limit_words(texts, MAX_WORD_BYTES)
        sample = TextSample(texts)
        if sample.is_empty:
            raise DataError(f"{documents.path}: no text to learn a tokenizer from; give more data")
    if not config.path and (code := kind.code()).published_files:
        config = dataclasses.replace(config, path=str(_fetch_published(job, config.kind, code)))
    tokenizer = make_tokenizer(config, sample)
    job.raise_if_stopping()
    for name, data in tokenizer.to_files().items():
        writer.write_bytes(name, data)
    validation = DocumentReader(folder, "validation")
    held_out = draw_sample(validation, seed, VALIDATION_SAMPLE_BYTES, job.report_progress)
    report, speed = measure_tokenizer(tokenizer, list(held_out))
    writer.write_json(REPORT_JSON, asdict(report))
    print(  # only logged: speed depends on the machine
        f"encodes {speed.encode_megabytes_per_second:.1f} and decodes"
        f" {speed.decode_megabytes_per_second:.1f} MB per second of processor time"
    )
    return {
        "kind": config.kind,
        "vocab_size": tokenizer.vocab_size,
        "asked_vocab_size": config.vocab_size if learns_words else None,
        "bytes_per_token": report.bytes_per_token if report.num_tokens else None,
        "tokens_per_word": report.tokens_per_word if report.num_words else None,
        "single_byte_share": report.single_byte_share if report.num_tokens else None,
        "round_trip_failures": report.num_round_trip_failures,
        "sampled_bytes": sample.num_bytes,
        "sampled_documents": sample.num_documents,
    }


def make_tokenizer(config: TrainTokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Train the tokenizer of `config` on `texts`, if its kind learns from text."""
    kind = TOKENIZER_KINDS[config.kind]
    settings = {name: getattr(config, name) for name in kind.settings}
    tokenizer = kind.code().train(texts, **settings)
    tokenizer.chat_format = config.chat_format
    return tokenizer


def _fetch_published(job: Job, kind: str, code: TokenizerCode) -> Path:
    for name, sha256 in code.published_files.items():
        setting, url = f"train_tokenizer.kind {kind}", code.published_url + name
        for done_bytes, total_bytes in fetch_file(url, sha256, job.work / name, setting):
            job.report_progress(done_bytes, total_bytes, f"bytes of {name}")
    return job.work


class TextSample:
    """Texts to learn from, counted as they are read."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.num_documents = self.num_bytes = 0
        self._texts = self._counted(texts)
        self._first = next(filter(None, self._texts), "")

    @property
    def is_empty(self) -> bool:
        """Whether all texts are empty."""
        return not self._first

    def __iter__(self) -> Iterator[str]:
        yield self._first
        yield from self._texts

    def _counted(self, texts: Iterable[str]) -> Iterator[str]:
        for text in texts:
            self.num_documents += 1
            self.num_bytes += len(text.encode())
            yield text


def draw_sample(
    documents: DocumentReader, seed: int, max_bytes: int, report: Callable[[int, int, str], None]
) -> Iterator[str]:
    """Yield the documents with the smallest hashes of (seed, id), `max_bytes` in all.

    The last one is cut to fit. The sample does not depend on the documents' order, and takes 16
    bytes of memory per document of the split.
    """
    hashes = np.zeros(len(documents), dtype=np.uint64)
    done_bytes = 0
    for ordinal, document in enumerate(documents.read(range(len(documents)))):
        hashes[ordinal] = _hash(seed, document.id)
        done_bytes += document.size_bytes
        report(done_bytes, documents.size_bytes, "bytes of documents hashed")
    total_bytes = min(max_bytes, documents.size_bytes)
    left_bytes = max_bytes
    for document in documents.read(hashes.argsort(kind="stable").tolist()):
        report(min(max_bytes - left_bytes, total_bytes), total_bytes, "bytes drawn")
        text = "\n".join(document.texts).encode()
        yield text[:left_bytes].decode(errors="ignore")
        left_bytes -= len(text)
        if left_bytes <= 0:
            break


def limit_words(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Yield the beginning of `texts` whose distinct words are at most `max_bytes` long in all.

    Training holds them in memory. Common text is far below: 50 MB of Python has 2.5 MB.
    """
    known: set[str] = set()
    for text in texts:
        chunks: list[str] = []
        for chunk in split_text(text):
            new = set(_WORDS.findall(chunk)) - known
            max_bytes -= sum(len(word.encode()) for word in new)
            if max_bytes < 0:
                if chunks:
                    yield "".join(chunks)
                return
            known |= new
            chunks.append(chunk)
        yield text


def _hash(seed: int, identifier: bytes) -> int:
    key = seed.to_bytes(8, "big")
    return int.from_bytes(hashlib.blake2b(identifier, key=key, digest_size=8).digest(), "big")


if __name__ == "__main__":
    run_job(train_tokenizer)
