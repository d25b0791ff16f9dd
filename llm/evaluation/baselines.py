"""Baselines without a language model: byte unigram entropy, gzip and xz.

All in bits per byte, on the bytes the models are scored on. A model that has learned more than
spelling is clearly below the first two; xz -9e is hard to beat for a small model.
"""

import lzma
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

GZIP_WINDOW_BITS = 31  # zlib's code for the largest window with a gzip header


@dataclass(frozen=True, kw_only=True, slots=True)
class Baselines:
    """Bits per byte of the same `num_bytes` bytes by three methods."""

    num_bytes: int
    unigram_bits_per_byte: float
    """Entropy of the byte frequencies, a lower bound for any order-0 model of bytes."""
    gzip_bits_per_byte: float
    """`gzip -9`: repetitions within 32 KiB."""
    xz_bits_per_byte: float
    """`xz -9e`: repetitions within 64 MiB, arithmetic coding."""


def measure_baselines(chunks: Iterable[bytes]) -> Baselines:
    """Measure the concatenation of `chunks` in a stream, with less than 700 MiB of memory.

    Raises:
        ValueError: no bytes.
    """
    counts = np.zeros(256, dtype=np.int64)
    gzip = zlib.compressobj(level=9, wbits=GZIP_WINDOW_BITS)
    xz = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
    gzip_bytes = xz_bytes = 0
    for chunk in chunks:
        counts += np.bincount(np.frombuffer(chunk, dtype=np.uint8), minlength=256)
        gzip_bytes += len(gzip.compress(chunk))
        xz_bytes += len(xz.compress(chunk))
    gzip_bytes += len(gzip.flush())
    xz_bytes += len(xz.flush())
    num_bytes = int(counts.sum())
    if not num_bytes:
        raise ValueError("no bytes to measure")
    return Baselines(
        num_bytes=num_bytes,
        unigram_bits_per_byte=entropy_bits(counts),
        gzip_bits_per_byte=8 * gzip_bytes / num_bytes,
        xz_bits_per_byte=8 * xz_bytes / num_bytes,
    )


def entropy_bits(counts: np.ndarray) -> float:
    """Return the entropy in bits of a distribution given by counts."""
    seen = counts[counts > 0] / counts.sum()
    return (
        float(-(seen * np.log2(seen)).sum()) + 0.0
    )  # turns the -0.0 of a single byte value into 0.0
