"""What the validation text costs without a language model: byte frequencies, gzip and xz.

All are measured in bits per byte on the very bytes the models are scored on. A model that has
learned more than spelling lies clearly below the first two; xz -9e is a hard mark for a small one.
"""

import lzma
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

GZIP_WINDOW_BITS = 31  # zlib's way of saying: the largest window, in gzip's own framing


@dataclass(frozen=True, kw_only=True, slots=True)
class Baselines:
    """Bits per byte of the same `num_bytes` bytes, three ways."""

    num_bytes: int
    unigram_bits_per_byte: float
    """Entropy of the bytes' own frequencies: no order-0 byte model, however fitted, does better."""
    gzip_bits_per_byte: float
    """`gzip -9`: repetitions within 32 KiB."""
    xz_bits_per_byte: float
    """`xz -9e`: repetitions within 64 MiB, arithmetic coding."""


def measure_baselines(chunks: Iterable[bytes]) -> Baselines:
    """Measure the concatenation of `chunks`, none of which is kept: memory stays below 700 MiB.

    Raises:
        ValueError: there is not one byte.
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
    """Return the entropy, in bits, of what occurred `counts` times."""
    seen = counts[counts > 0] / counts.sum()
    return float(-(seen * np.log2(seen)).sum()) + 0.0  # no -0.0 for one byte value alone
