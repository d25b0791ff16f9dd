"""What every tokenizer is: text to ids and back without loss, and control tokens no text can write.

An id stands for the same bytes wherever it appears, so the bytes of a text are those of its ids,
one after another. Control tokens stand for no bytes and are written by the pipeline alone: the same
characters in a user's text are encoded as ordinary text.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from llm.errors import DataError

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG_JSON = "tokenizer_config.json"  # of transformers
CONTROL_TOKENS = (
    "<|bos|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|pad|>", "<|mask|>",
)  # fmt: skip
# Begins the names of control tokens in exported tokenizers, where nobody can type it: a Unicode
# noncharacter (section 23.7), kept for use inside a program.
MARK = "\ufdd0"
NUM_BYTE_VALUES = 256
LONE_SURROGATE = re.compile("[\ud800-\udfff]")

Ids = npt.NDArray[np.uint32]


class Tokenizer(ABC):
    """Encode and decode with one vocabulary."""

    kind: ClassVar[str]
    """What `train_tokenizer.kind` calls it."""

    def __init__(
        self, vocab_size: int, control_ids: Sequence[int] = range(len(CONTROL_TOKENS))
    ) -> None:
        assert len(control_ids) == len(CONTROL_TOKENS)
        self.vocab_size = vocab_size
        self.control_ids = tuple(control_ids)
        """The ids of CONTROL_TOKENS, in their order."""
        (
            self.bos_id, self.user_id, self.assistant_id, self.system_id,
            self.end_id, self.pad_id, self.mask_id,
        ) = self.control_ids  # fmt: skip

    @abstractmethod
    def encode_arrays(self, texts: Sequence[str]) -> list[Ids]:
        """Encode every text to an array of ids without any control id.

        Raises:
            DataError: a text holds what the vocabulary cannot say: a lone surrogate, or without
            byte fallback an unknown character.
        """

    @abstractmethod
    def to_files(self) -> dict[str, bytes]:
        """Return the files `load_tokenizer` reads, by name; equal tokenizers give equal bytes."""

    @cached_property
    @abstractmethod
    def bytes_of_token(self) -> Sequence[bytes]:
        """The bytes each id stands for, V of them; none for control tokens."""

    def can_encode(self, text: str) -> bool:
        """Tell whether the vocabulary can say `text`."""
        return text.isascii() or not LONE_SURROGATE.search(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode every text to a list of ids without any control id.

        Raises:
            DataError: as for `encode_arrays`.
        """
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` without control tokens; bytes that are no UTF-8 give U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return exactly the bytes of `ids`; control tokens stand for none."""
        table = self.bytes_of_token
        if len(ids) and not 0 <= min(ids) <= max(ids) < len(table):
            raise ValueError(f"ids from {min(ids)} to {max(ids)}, expected 0 to {len(table) - 1}")
        return b"".join([table[index] for index in ids])

    @cached_property
    def token_bytes(self) -> npt.NDArray[np.int64]:
        """How many bytes each id stands for, (V,); 0 for control tokens."""
        return np.array([len(token) for token in self.bytes_of_token], dtype=np.int64)


def refuse_lone_surrogates(texts: Sequence[str]) -> None:
    """Say where a text holds half a surrogate pair, which no UTF-8 can say.

    Raises:
        DataError: one does.
    """
    for index, text in enumerate(texts):
        if found := LONE_SURROGATE.search(text):
            raise DataError(
                f"text {index}: character {found.start()} is the lone surrogate"
                f" U+{ord(found[0]):04X}, which is no Unicode text; replace it, by U+FFFD say"
            )
