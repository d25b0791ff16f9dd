"""Independent random seeds, derived from the seed of a run and a purpose."""

import hashlib


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for one purpose: `derive_seed(config.seed, "shuffle", epoch)`."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
