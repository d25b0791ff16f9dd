"""Vectorized hashes of the words of a text and of their n-grams.

A word is a run of letters and digits in lower case; punctuation and whitespace separate. In Chinese
and Japanese, and in Korean too, every character is a word. Hashes are the same on every machine.

W words, N n-grams, S bytes in a block.
"""

import re
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from llm.data.permutation import splitmix64

Hashes = npt.NDArray[np.uint64]

TEXT_BLOCK_BYTES = 1 << 18
"""Texts are hashed in blocks: each byte takes 40 bytes of memory meanwhile."""
SEPARATORS = re.compile(rb"[^0-9A-Za-z\x80-\xff]")
FIRST_CODE, PUNCTUATION_CODE, LAST_CODE = 0xE3, 0xE2, 0xED
"""First bytes in UTF-8: U+3000 to U+DFFF are one word each, U+2000 to U+2FFF punctuation."""
BASE = np.uint64(0x9E3779B97F4A7C15)
INVERSE = np.uint64(pow(int(BASE), -1, 1 << 64))


def hash_words(text: str) -> Hashes:
    """Return a hash of each word of `text`, in order, (W,)."""
    blocks = [_hash_block(block) for block in _blocks(text.lower().encode())]
    return np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.uint64)


def hash_ngrams(words: npt.NDArray[np.unsignedinteger], num_words: int) -> Hashes:
    """Return a hash of each n-gram of `num_words` words, (W,) -> (N,), N = W - num_words + 1."""
    num_ngrams = len(words) - num_words + 1
    if num_ngrams <= 0:
        return np.zeros(0, dtype=np.uint64)
    hashes = np.zeros(num_ngrams, dtype=np.uint64)
    for offset in range(num_words):
        hashes += words[offset : offset + num_ngrams]
        hashes *= BASE
    return splitmix64(hashes)


def hash_distinct_ngrams(text: str, num_words: int) -> Hashes:
    """Return the distinct n-grams of a text, sorted; of a shorter text one shorter n-gram."""
    words = hash_words(text)
    ngrams = hash_ngrams(words, min(num_words, max(len(words), 1)))
    ngrams.sort()
    is_first = np.ones(len(ngrams), dtype=np.bool_)
    np.not_equal(ngrams[1:], ngrams[:-1], out=is_first[1:])
    return ngrams[is_first]


def _hash_block(block: bytes) -> Hashes:
    """Hash the words of a block: differences of prefix sums, scaled to a common exponent."""
    codes = np.frombuffer(block, dtype=np.uint8)  # (S,)
    starts, ends = _find_words(codes, is_ascii=block.isascii())
    sums = np.zeros(len(codes) + 1, dtype=np.uint64)
    np.multiply(BYTE_VALUES[codes], POWERS[: len(codes)], out=sums[1:])
    np.cumsum(sums[1:], out=sums[1:])
    hashes = sums[ends]
    hashes -= sums[starts]
    hashes *= INVERSE_POWERS[starts]
    return splitmix64(hashes)


def _find_words(
    codes: npt.NDArray[np.uint8], *, is_ascii: bool
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Return the starts and ends of words, (S,) -> (W,), (W,)."""
    is_inside = np.zeros(len(codes) + 2, dtype=np.bool_)  # padded on both sides
    is_inside[1:-1] = IS_WORD[codes]
    if not is_ascii:
        signs = np.flatnonzero(codes == PUNCTUATION_CODE)
        for offset in range(3):
            is_inside[np.minimum(signs + offset, len(codes) - 1) + 1] = False
    is_edge = is_inside[1:] != is_inside[:-1]  # (S + 1,)
    if is_ascii:
        edges = np.flatnonzero(is_edge)
        return edges[::2], edges[1::2]
    is_start, is_end = is_edge & is_inside[1:], is_edge & is_inside[:-1]
    singles = np.flatnonzero((codes >= FIRST_CODE) & (codes <= LAST_CODE))
    after = np.minimum(singles + 3, len(codes))
    is_start[singles] = is_end[after] = True
    is_end[singles] |= is_inside[singles]
    is_start[after] |= is_inside[after + 1]
    return np.flatnonzero(is_start), np.flatnonzero(is_end)


def _blocks(data: bytes) -> Iterator[bytes]:
    """Cut at the last space or line feed that fits, else between any two characters."""
    start = 0
    while len(data) - start > TEXT_BLOCK_BYTES:
        half, limit = start + TEXT_BLOCK_BYTES // 2, start + TEXT_BLOCK_BYTES
        end = 1 + max(data.rfind(blank, half, limit) for blank in (b" ", b"\n"))
        if not end:
            end = limit
            while data[end] & 0xC0 == 0x80:
                end -= 1
        yield data[start:end]
        start = end
    yield data[start:]


def _powers(base: np.uint64) -> Hashes:
    return np.cumprod(
        np.concatenate([np.ones(1, np.uint64), np.full(TEXT_BLOCK_BYTES, base, np.uint64)])
    )


POWERS, INVERSE_POWERS = _powers(BASE), _powers(INVERSE)  # (S + 1,): 2 MB each
BYTE_VALUES = splitmix64(np.arange(1, 257, dtype=np.uint64))
IS_WORD = np.array([SEPARATORS.match(bytes([code])) is None for code in range(256)])
