"""Measure a tokenizer on texts: counts, which depend on the two alone, and speed."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llm.tokenizer.base import Tokenizer

REPORT_JSON = "report.json"
MAX_SHOWN_DOCUMENTS = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerReport:
    """Counts of one tokenizer on one set of documents."""

    vocab_size: int
    num_documents: int
    """Documents encoded."""
    num_refused_documents: int
    """Documents with characters outside the vocabulary."""
    num_bytes: int
    num_characters: int
    num_words: int
    """Separated by whitespace."""
    num_tokens: int
    num_single_byte_tokens: int
    num_round_trip_failures: int
    """Documents that decode to other bytes; above 0 is an error in the tokenizer."""
    lengths: list[list[int]]
    """Characters and tokens of the first MAX_SHOWN_DOCUMENTS documents."""

    @property
    def tokens_per_word(self) -> float:
        """Also called fertility."""
        return self.num_tokens / max(1, self.num_words)

    @property
    def bytes_per_token(self) -> float:
        """Compression; more means that more text fits a context."""
        return self.num_bytes / max(1, self.num_tokens)

    @property
    def tokens_per_character(self) -> float:
        """Length in tokens divided by length in characters."""
        return self.num_tokens / max(1, self.num_characters)

    @property
    def single_byte_share(self) -> float:
        """Share of the tokens of one byte."""
        return self.num_single_byte_tokens / max(1, self.num_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerSpeed:
    """Megabytes of text per second of processor time, summed over this process's threads."""

    encode_megabytes_per_second: float
    decode_megabytes_per_second: float


def measure_tokenizer(
    tokenizer: Tokenizer, texts: Sequence[str]
) -> tuple[TokenizerReport, TokenizerSpeed]:
    """Encode and decode every text within the vocabulary, and count."""
    known = [text for text in texts if tokenizer.can_encode(text)]
    data = [text.encode() for text in known]
    started = time.process_time()
    encoded = tokenizer.encode_arrays(known)
    encoded_at = time.process_time()
    decoded = [tokenizer.decode_bytes(ids.tolist()) for ids in encoded]
    decoded_at = time.process_time()
    num_bytes = sum(map(len, data))
    num_single = sum(int((tokenizer.token_bytes[ids] == 1).sum()) for ids in encoded)
    shown = zip(known[:MAX_SHOWN_DOCUMENTS], encoded, strict=False)
    report = TokenizerReport(
        vocab_size=tokenizer.vocab_size,
        num_documents=len(known),
        num_refused_documents=len(texts) - len(known),
        num_bytes=num_bytes,
        num_characters=sum(map(len, known)),
        num_words=sum(len(text.split()) for text in known),
        num_tokens=sum(map(len, encoded)),
        num_single_byte_tokens=num_single,
        num_round_trip_failures=int(np.sum([a != b for a, b in zip(data, decoded, strict=True)])),
        lengths=[[len(text), len(ids)] for text, ids in shown],
    )
    speed = TokenizerSpeed(
        encode_megabytes_per_second=num_bytes / 1e6 / max(1e-9, encoded_at - started),
        decode_megabytes_per_second=num_bytes / 1e6 / max(1e-9, decoded_at - encoded_at),
    )
    return report, speed
