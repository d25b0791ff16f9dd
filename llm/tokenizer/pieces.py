"""SentencePiece vocabularies with byte fallback, in the format of the library `tokenizers`.

SentencePiece writes a space as U+2581, after which the two cannot be told apart. Here a piece
contains the space itself and no normalizer runs, so that U+2581 in a text is encoded by its bytes
and the round trip is exact. Reserved pieces do not stand for their own characters and must never
match a text: merges that produce one are left out, and control tokens begin with MARK.

Sources: Kudo and Richardson 2018, arXiv:1808.06226; unigram: Kudo 2018, arXiv:1804.10959.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llm.tokenizer.base import MARK, NUM_BYTE_VALUES

BLANK = "\u2581"
BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(NUM_BYTE_VALUES))
_BYTE_OF_PIECE = {piece: byte for byte, piece in enumerate(BYTE_PIECES)}
# Unigram matches every name in its vocabulary, even `<0x41>`: a text is cut inside such a name.
RESERVED = rf"<(?=0x[0-9A-F]{{2}}>)|{MARK}"
# Words with the spaces before them, for vocabularies learned here. The library reads \x00, not \0.
WORDS = r" *[^ \x00\t\r\n]+| +|[\x00\t\r\n]"

ScoredPiece = tuple[str, float]
"""A piece and its score, the logarithm of its probability."""


def pieces_library(
    model: dict[str, Any], added: Sequence[dict[str, Any]], steps: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return a tokenizer, in the format of `tokenizers`, with these pre-tokenization steps."""
    if model["type"] == "Unigram" and split_step(RESERVED) not in steps:
        steps = [split_step(RESERVED), *steps]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)} if steps else None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": model,
    }


def unigram_model(pieces: Sequence[ScoredPiece]) -> dict[str, Any]:
    """Return a unigram model of these pieces in the order of their ids."""
    # any reserved id will do: unknown characters fall back to bytes
    unknown = next(index for index, (piece, _) in enumerate(pieces) if is_reserved(piece))
    vocabulary = [[piece, score] for piece, score in pieces]
    return {"type": "Unigram", "unk_id": unknown, "vocab": vocabulary, "byte_fallback": True}


def bpe_model(ids: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return a BPE model of these pieces and merges."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": dict(ids),
        "merges": [list(pair) for pair in merges],
    }


def make_merges(ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return the pairs that merge to each piece, best pieces first, as transformers writes them.

    SentencePiece merges whichever pair gives the best piece; `tokenizers` needs a list of pairs.
    """
    found = [
        (index, cut, piece[:cut], piece[cut:])
        for piece, index in ids.items()
        if not is_reserved(piece)
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    pairs = [(left, right) for _, _, left, right in sorted(found)]
    return [pair for pair in pairs if not any(map(is_reserved, pair))]


def is_reserved(piece: str) -> bool:
    """Tell whether a piece does not stand for its own characters."""
    return piece in _BYTE_OF_PIECE or piece.startswith(MARK)


def bytes_of_piece(piece: str) -> bytes:
    """Return the bytes of a piece; none for a control token."""
    if piece in _BYTE_OF_PIECE:
        return bytes([_BYTE_OF_PIECE[piece]])
    return b"" if piece.startswith(MARK) else piece.encode()


def find_words(text: str) -> list[str]:
    """Split a text as RESERVED and WORDS do in the library."""
    parts = _RESERVED.split(text) if MARK in text or "<0x" in text else [text]
    return [word for part in parts for word in _WORDS.findall(part)]


def split_step(pattern: str) -> dict[str, Any]:
    """Return the step of `tokenizers` that isolates each match."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def added_token(index: int, name: str, *, is_special: bool) -> dict[str, Any]:
    """Return the entry of a token that is matched before pre-tokenization."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": name, **flags, "special": is_special}


_RESERVED = re.compile(f"({RESERVED})")
_WORDS = re.compile(WORDS)
