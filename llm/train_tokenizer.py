"""Learn the vocabulary from a sample of the training documents.

The sample is never in memory: its documents are read again as they are learned from.
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
from llm.tokenizer.bpe import ByteLevelBPE
from llm.tokenizer.characters import ByteTokenizer, CharacterTokenizer
from llm.tokenizer.gpt2 import GPT2_FILES, GPT2_URL, load_gpt2
from llm.tokenizer.pre_tokenization import split_text
from llm.tokenizer.report import REPORT_JSON, measure_tokenizer
from llm.tokenizer.sentencepiece import SentencePieceTokenizer

VALIDATION_SAMPLE_BYTES = 1_000_000
# The library needs about 75 bytes of memory for each byte of a distinct word, so random
# letters, or a language without spaces, would take 4 GB from a sample of 50 MB.
MAX_WORD_BYTES = 12_000_000
_WORDS = re.compile(r"\w+|\W+")


def train_tokenizer(job: Job, writer: ArtifactWriter) -> dict[str, Json]:
    """Train a tokenizer on sampled training documents and measure it on validation documents.

    A vocabulary is smaller than asked for where the text repeats nothing more to merge; the summary
    says so.

    Raises:
        DataError: there is no training text, or files of a published vocabulary are others.
        ConfigError: the vocabulary is too small for the text, or a library is missing.
        ConnectionError: the network failed; another try may succeed.
    """
    config = read_section(TrainTokenizerConfig, job.settings)
    folder = Path(job.inputs["documents"])
    seed = derive_seed(job.seed, "tokenizer sample")
    sample = Sample(())
    if config.kind not in ("gpt2", "bytes"):
        documents = DocumentReader(folder, "train")
        texts = draw_sample(documents, seed, config.sample_bytes, job.report_progress)
        if config.kind in ("bpe", "sentencepiece"):
            texts = limit_words(texts, MAX_WORD_BYTES)
        sample = Sample(texts)
        if sample.is_empty:
            raise DataError(f"{documents.path}: no text to learn a tokenizer from; give more data")
    if config.kind == "gpt2" and not config.path:
        config = dataclasses.replace(config, path=str(_fetch_gpt2(job)))
    tokenizer = make_tokenizer(config, sample)
    job.raise_if_stopping()
    for name, data in tokenizer.to_files().items():
        writer.write_bytes(name, data)
    validation = DocumentReader(folder, "validation")
    held_out = draw_sample(validation, seed, VALIDATION_SAMPLE_BYTES, job.report_progress)
    report, speed = measure_tokenizer(tokenizer, list(held_out))
    writer.write_json(REPORT_JSON, asdict(report))
    print(  # to the stage's log: of this machine, not of the tokenizer
        f"encodes {speed.encode_megabytes_per_second:.1f} and decodes"
        f" {speed.decode_megabytes_per_second:.1f} MB a second of processor time"
    )
    return {
        "kind": config.kind,
        "vocab_size": tokenizer.vocab_size,
        "asked_vocab_size": config.vocab_size if config.kind in ("bpe", "sentencepiece") else None,
        "bytes_per_token": report.bytes_per_token if report.num_tokens else None,
        "tokens_per_word": report.tokens_per_word if report.num_words else None,
        "single_byte_share": report.single_byte_share if report.num_tokens else None,
        "round_trip_failures": report.num_round_trip_failures,
        "sampled_bytes": sample.num_bytes,
        "sampled_documents": sample.num_documents,
    }


def make_tokenizer(config: TrainTokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Learn from `texts` what `config` asks for."""
    match config.kind:
        case "bpe":
            return ByteLevelBPE.train(
                texts, config.vocab_size, config.pre_tokenization, config.max_digits
            )
        case "gpt2":
            return load_gpt2(Path(config.path))
        case "sentencepiece":
            return SentencePieceTokenizer.train(texts, config.vocab_size, config.algorithm)
        case "characters":
            return CharacterTokenizer.train(texts, config.has_byte_fallback)
        case "bytes":
            return ByteTokenizer()


def _fetch_gpt2(job: Job) -> Path:
    for name, sha256 in GPT2_FILES.items():
        setting = "train_tokenizer.kind gpt2"
        for done_bytes, total_bytes in fetch_file(
            GPT2_URL + name, sha256, job.work / name, setting
        ):
            job.report_progress(done_bytes, total_bytes, f"bytes of {name}")
    return job.work


class Sample:
    """Texts to learn from, counted as they are taken."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.num_documents = self.num_bytes = 0
        self._texts = self._counted(texts)
        self._first = next(filter(None, self._texts), "")

    @property
    def is_empty(self) -> bool:
        """Whether there is no text in any of them."""
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

    The last one is cut to fit. Which are drawn does not depend on their order; in memory are 16
    bytes for each document there is.
    """
    hashes = np.zeros(len(documents), dtype=np.uint64)
    done_bytes = 0
    for ordinal, document in enumerate(documents.read(range(len(documents)))):
        hashes[ordinal] = _hash(seed, document.id)
        done_bytes += document.size_bytes
        report(done_bytes, documents.size_bytes, "bytes of documents to draw from")
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

    They are what the training holds in memory. Common text is far below: 50 MB of Python 2.5 MB.
    """
    known: set[str] = set()
    for text in texts:
        pieces: list[str] = []
        for piece in split_text(text):
            new = set(_WORDS.findall(piece)) - known
            max_bytes -= sum(len(word.encode()) for word in new)
            if max_bytes < 0:
                if pieces:
                    yield "".join(pieces)
                return
            known |= new
            pieces.append(piece)
        yield text


def _hash(seed: int, identifier: bytes) -> int:
    key = seed.to_bytes(8, "big")
    return int.from_bytes(hashlib.blake2b(identifier, key=key, digest_size=8).digest(), "big")


if __name__ == "__main__":
    run_job(train_tokenizer)
