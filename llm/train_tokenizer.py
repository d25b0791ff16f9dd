"""Learn the vocabulary from a sample of the training documents."""

import dataclasses
import hashlib
import heapq
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from llm.artifact import ArtifactWriter, Json
from llm.config import TrainTokenizerConfig, read_section
from llm.data.document_file import DocumentFile
from llm.data.fetch import fetch
from llm.errors import DataError
from llm.job import Job, run_job
from llm.seeds import derive_seed
from llm.tokenizer.base import Tokenizer
from llm.tokenizer.bpe import ByteLevelBPE
from llm.tokenizer.characters import ByteTokenizer, CharacterTokenizer
from llm.tokenizer.gpt2 import GPT2_FILES, GPT2_URL, load_gpt2
from llm.tokenizer.report import REPORT_JSON, measure_tokenizer
from llm.tokenizer.sentencepiece import SentencePieceTokenizer
from llm.tokenizer.splitting import split_text

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
    sample: list[bytes] = []
    if config.kind not in ("gpt2", "bytes"):
        documents = DocumentFile(folder, "train")
        sample = draw_sample(documents, seed, config.sample_bytes, job.report_progress)
        if config.kind in ("bpe", "sentencepiece"):
            sample = limit_words(sample, MAX_WORD_BYTES)
        if not any(sample):
            raise DataError(f"{documents.path}: no text to learn a tokenizer from; give more data")
    job.report_progress(0, 0, config.kind)  # one library call, during which nothing can be asked
    if config.kind == "gpt2" and not config.path:
        config = dataclasses.replace(config, path=str(_fetch_gpt2(job)))
    tokenizer = make_tokenizer(config, (text.decode() for text in sample))
    job.raise_if_stopping()
    for name, data in tokenizer.to_files().items():
        writer.write_bytes(name, data)
    validation = DocumentFile(folder, "validation")
    held_out = draw_sample(validation, seed, VALIDATION_SAMPLE_BYTES, job.report_progress)
    report, speed = measure_tokenizer(tokenizer, [text.decode() for text in held_out])
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
        "sampled_bytes": sum(map(len, sample)),
        "sampled_documents": len(sample),
    }


def make_tokenizer(config: TrainTokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Learn from `texts` what `config` asks for."""
    match config.kind:
        case "bpe":
            return ByteLevelBPE.train(texts, config.vocab_size, config.splitting, config.max_digits)
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
        for done_bytes, total_bytes in fetch(GPT2_URL + name, sha256, job.work / name, setting):
            job.report_progress(done_bytes, total_bytes, f"bytes of {name}")
    return job.work


def draw_sample(
    documents: DocumentFile, seed: int, max_bytes: int, report: Callable[[int, int, str], None]
) -> list[bytes]:
    """Return the documents with the smallest hashes of (seed, id), `max_bytes` in all.

    The last one is cut to fit. Which are drawn does not depend on their order, and memory only on
    `max_bytes` and the longest document.
    """
    drawn: list[tuple[int, bytes]] = []  # a heap, the largest hash first
    num_bytes = done_bytes = 0
    for document in documents.read(range(len(documents))):
        text = "\n".join(document.texts).encode()
        heapq.heappush(drawn, (-_hash(seed, document.id), text))
        num_bytes += len(text)
        while num_bytes - len(drawn[0][1]) >= max_bytes:
            num_bytes -= len(heapq.heappop(drawn)[1])
        done_bytes += document.size_bytes
        report(done_bytes, documents.size_bytes, f"bytes of {documents.path.name}")
    texts = [text for _, text in sorted(drawn, reverse=True)]
    if num_bytes > max_bytes:
        kept = len(texts[-1]) - (num_bytes - max_bytes)
        texts[-1] = texts[-1][:kept].decode(errors="ignore").encode()
    return texts


def limit_words(texts: Sequence[bytes], max_bytes: int) -> list[bytes]:
    """Return the beginning of `texts` whose distinct words are at most `max_bytes` long in all.

    They are what the training holds in memory. Common text is far below: 50 MB of Python 2.5 MB.
    """
    known: set[str] = set()
    kept: list[bytes] = []
    for text in texts:
        pieces: list[str] = []
        for piece in split_text(text.decode()):
            new = set(_WORDS.findall(piece)) - known
            max_bytes -= sum(len(word.encode()) for word in new)
            if max_bytes < 0:
                return [*kept, "".join(pieces).encode()] if pieces else kept
            known |= new
            pieces.append(piece)
        kept.append(text)
    return kept


def _hash(seed: int, identifier: bytes) -> int:
    key = seed.to_bytes(8, "big")
    return int.from_bytes(hashlib.blake2b(identifier, key=key, digest_size=8).digest(), "big")


if __name__ == "__main__":
    run_job(train_tokenizer)
