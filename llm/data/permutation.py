"""A seeded permutation as a function of the index, so that shuffling takes no memory."""

import numpy as np
import numpy.typing as npt

NUM_ROUNDS = 6
MIN_HALF_BITS = 3  # halves of one or two bits have too few values to mix


def permute(indices: npt.ArrayLike, size: int, seed: int) -> npt.NDArray[np.int64]:
    """Return the image of each index under a seeded permutation of 0 .. size - 1, same shape.

    A Feistel network permutes the numbers of 2h bits, the smallest such range that holds `size`. A
    result outside 0 .. size - 1 is permuted again until it falls inside (cycle walking).

    Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002.
    """
    given = np.asarray(indices, dtype=np.int64)
    if given.size and not 0 <= int(given.min()) <= int(given.max()) < size:
        raise ValueError(f"indices {given.min()} to {given.max()}, expected 0 to {size - 1}")
    half_bits = max(MIN_HALF_BITS, ((size - 1).bit_length() + 1) // 2)
    keys = splitmix64(np.arange(1, NUM_ROUNDS + 1, dtype=np.uint64) * np.uint64(seed * 2 + 1))
    values = _feistel(given.ravel().astype(np.uint64), keys, half_bits)
    outside = np.flatnonzero(values >= size)
    while outside.size:
        values[outside] = _feistel(values[outside], keys, half_bits)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64).reshape(given.shape)


def splitmix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Hash 64-bit integers, so that consecutive ones look random.

    Source: the finalizer of SplitMix64, Steele et al., OOPSLA 2014.
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _feistel(
    values: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint64], half_bits: int
) -> npt.NDArray[np.uint64]:
    shift, low = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & low
    for key in keys:
        left, right = right, left ^ (splitmix64(right ^ key) & low)
    return (left << shift) | right
