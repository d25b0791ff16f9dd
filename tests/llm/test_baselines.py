"""Baselines: against the formula, the modules and the programs of the same names."""

import gzip
import lzma
import math
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from llm.evaluation.baselines import entropy_bits, measure_baselines


@pytest.fixture(scope="module")
def text(corpus: list[str]) -> bytes:
    return "".join(corpus).encode()


def in_pieces(data: bytes) -> Iterator[bytes]:
    """Yield `data` in pieces of unequal length, some of them empty."""
    rng = random.Random(1)
    start = 0
    while start < len(data):
        size = rng.choice([0, 1, 10, 5000])
        yield data[start : start + size]
        start += size


def test_unigram_is_the_entropy_of_the_bytes_own_frequencies(text: bytes) -> None:
    shares = [count / len(text) for count in Counter(text).values()]
    expected = -sum(share * math.log2(share) for share in shares)
    found = measure_baselines([text]).unigram_bits_per_byte
    assert found == pytest.approx(expected, rel=1e-12)


def test_no_other_byte_frequencies_are_below_the_unigram_entropy(text: bytes) -> None:
    counts = Counter(text)
    other = Counter(text[: len(text) // 2])  # frequencies of the first half, with add-one smoothing
    total = sum(other.values()) + 256
    cost = sum(n * -math.log2((other[byte] + 1) / total) for byte, n in counts.items())
    assert measure_baselines([text]).unigram_bits_per_byte < cost / len(text)


def test_gzip_and_xz_are_what_the_modules_give_for_the_whole(text: bytes) -> None:
    found = measure_baselines(in_pieces(text))
    assert found.num_bytes == len(text)
    assert found.gzip_bits_per_byte == 8 * len(gzip.compress(text, 9)) / len(text)
    xz = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
    assert found.xz_bits_per_byte == 8 * len(xz) / len(text)


@pytest.mark.parametrize(("program", "flag"), [("gzip", "-9"), ("xz", "-9e")])
def test_gzip_and_xz_are_what_the_programs_give(text: bytes, program: str, flag: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    size = len(subprocess.run([program, flag, "-c"], input=text, capture_output=True).stdout)
    found = measure_baselines([text])
    measured = found.gzip_bits_per_byte if program == "gzip" else found.xz_bits_per_byte
    # zlib and GNU gzip search for matches a little differently
    assert measured == pytest.approx(8 * size / len(text), rel=0.01)


def test_entropy_of_certainty_is_zero_and_of_all_bytes_alike_eight() -> None:
    assert entropy_bits(np.array([0, 7, 0])) == 0.0
    assert math.copysign(1, entropy_bits(np.array([5]))) == 1.0
    assert entropy_bits(np.full(256, 3)) == 8.0


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(ValueError, match="no bytes"):
        measure_baselines([b"", b""])
