"""Chats read back from packed sequences."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from llm.data.chat import RenderedChat
from llm.data.packed import PADDING_ID, PackedArrays, PackedSequences

if TYPE_CHECKING:
    from llm.tokenizer.base import Tokenizer

SEQUENCES_PER_READ = 64


def read_chats(sequences: PackedSequences) -> Iterator[tuple[int, RenderedChat]]:
    """Yield the ordinal and the tokens of every packed chat, bos first."""
    for start in range(0, sequences.num_sequences, SEQUENCES_PER_READ):
        stop = min(start + SEQUENCES_PER_READ, sequences.num_sequences)
        yield from chats_in(sequences.read(np.arange(start, stop)))


def chats_in(arrays: PackedArrays) -> Iterator[tuple[int, RenderedChat]]:
    """Yield the ordinal and the tokens of every chat in packed sequences (B, T+1)."""
    for tokens, mask, owners in zip(*arrays, strict=True):  # (T+1,) each
        is_begin = np.diff(owners, prepend=PADDING_ID) != 0
        ends = [*np.flatnonzero(is_begin)[1:].tolist(), len(owners)]
        for begin, end in pairwise([0, *ends]):
            if owners[begin] != PADDING_ID:
                chat = RenderedChat(tokens[begin:end].tolist(), mask[begin:end].tolist())
                yield int(owners[begin]), chat


def prompt_text(prompt: Sequence[int], tokenizer: "Tokenizer") -> str:
    """Return the text of a prompt, with blank lines where a message ends."""
    messages: list[list[int]] = [[]]
    for token in prompt:
        if token == tokenizer.end_id:
            messages.append([])
        messages[-1].append(token)
    return "\n\n".join(filter(None, map(tokenizer.decode, messages)))
