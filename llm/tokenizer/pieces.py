"""Vocabularies of pieces with byte fallback (SentencePiece's) in the format of `tokenizers`.

SentencePiece writes a blank as U+2581, after which nobody can tell the two apart. Here a piece
holds the blank itself and no normalizer runs, so that U+2581 in a text is written by its bytes and
any text comes back. What stands for something else than its own characters must never be matched in
a text: merges that end in such a token are left out, and control tokens begin with MARK.

Sources: Kudo and Richardson 2018, arXiv:1808.06226; unigram: Kudo 2018, arXiv:1804.10959.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llm.tokenizer.base import MARK, NUM_BYTE_VALUES

BLANK = "\u2581"
BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(NUM_BYTE_VALUES))
_BYTE_OF_PIECE = {piece: byte for byte, piece in enumerate(BYTE_PIECES)}
# Unigram matches any name in its vocabulary, also `<0x41>`: text is cut inside what looks so.
RESERVED = rf"<(?=0x[0-9A-F]{{2}}>)|{MARK}"
# Of vocabularies learned here: words with the blanks before them. The library reads \x00, not \0.
WORDS = r" *[^ \x00\t\r\n]+| +|[\x00\t\r\n]"

Piece = tuple[str, float]
"""Its characters and its score, a logarithm of its probability."""


def pieces_library(
    model: dict[str, Any], added: Sequence[dict[str, Any]], steps: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return a tokenizer in the format of `tokenizers` that pre-tokenizes by `steps`."""
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


def unigram_model(pieces: Sequence[Piece]) -> dict[str, Any]:
    """Return the model of these pieces, by id, of which the most probable sequence is taken."""
    # any id that no text gives: of an unknown character the bytes are written
    unknown = next(index for index, (piece, _) in enumerate(pieces) if is_reserved(piece))
    vocabulary = [[piece, score] for piece, score in pieces]
    return {"type": "Unigram", "unk_id": unknown, "vocab": vocabulary, "byte_fallback": True}


def bpe_model(ids: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return the model of these pieces, merged pair by pair."""
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
    """Return the pairs that make each piece, best pieces first, as transformers writes them.

    SentencePiece merges whichever pair makes the best piece; `tokenizers` wants the pairs.
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
    """Tell whether a piece stands for something else than its own characters."""
    return piece in _BYTE_OF_PIECE or piece.startswith(MARK)


def bytes_of_piece(piece: str) -> bytes:
    """Return the bytes a piece stands for."""
    if piece in _BYTE_OF_PIECE:
        return bytes([_BYTE_OF_PIECE[piece]])
    return b"" if piece.startswith(MARK) else piece.encode()


def find_words(text: str) -> list[str]:
    """Cut a text as RESERVED and WORDS do in the library."""
    parts = _RESERVED.split(text) if MARK in text or "<0x" in text else [text]
    return [word for part in parts for word in _WORDS.findall(part)]


def split_step(pattern: str) -> dict[str, Any]:
    """Return the step of `tokenizers` that cuts before and behind each match."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def added_token(index: int, name: str, *, is_special: bool) -> dict[str, Any]:
    """Return the entry of a token that is looked for before anything else."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": name, **flags, "special": is_special}


_RESERVED = re.compile(f"({RESERVED})")
_WORDS = re.compile(WORDS)
