"""The tokenizer interface: text to ids and back without loss, and seven control tokens.

An id stands for the same bytes wherever it appears, so the bytes of a text are those of its ids
concatenated. Control tokens stand for no bytes and only the pipeline writes them: the same
characters in a user's text are encoded as ordinary text.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from llm.data.content import LONE_SURROGATE
from llm.errors import ConfigError, DataError

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG_JSON = "tokenizer_config.json"  # of transformers
CHAT_FORMAT_JSON = "chat_format.json"  # only with another format than DEFAULT_CHAT_FORMAT
DEFAULT_CHAT_FORMAT = "turns"
CONTROL_TOKENS = (
    "<|bos|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|pad|>", "<|mask|>",
)  # fmt: skip
# Prefix of control-token names in exported tokenizers, so that nobody can type them: a Unicode
# noncharacter (section 23.7), reserved for use inside a program.
MARK = "\ufdd0"
NUM_BYTE_VALUES = 256

Ids = npt.NDArray[np.uint32]


class Tokenizer(ABC):
    """Encode and decode with one vocabulary."""

    kind: ClassVar[str]
    """Its key in TOKENIZER_KINDS."""

    def __init__(
        self, vocab_size: int, control_ids: Sequence[int] = range(len(CONTROL_TOKENS))
    ) -> None:
        assert len(control_ids) == len(CONTROL_TOKENS)
        self.vocab_size = vocab_size
        self.chat_format = DEFAULT_CHAT_FORMAT
        """Its key in CHAT_FORMATS."""
        self.control_ids = tuple(control_ids)
        """The ids of CONTROL_TOKENS, in their order."""
        (
            self.bos_id, self.user_id, self.assistant_id, self.system_id,
            self.end_id, self.pad_id, self.mask_id,
        ) = self.control_ids  # fmt: skip

    @abstractmethod
    def encode_arrays(self, texts: Sequence[str]) -> list[Ids]:
        """Encode every text to an array of ids, none of them a control id.

        Raises:
            DataError: a text holds a lone surrogate or, without byte fallback, a character outside
            the vocabulary.
        """

    @abstractmethod
    def to_json(self) -> bytes:
        """Return `tokenizer.json`, which `load_tokenizer` reads; equal tokenizers, equal bytes."""

    @cached_property
    @abstractmethod
    def bytes_of_token(self) -> Sequence[bytes]:
        """The bytes of each id, V of them; none for control tokens."""

    def library_json(self) -> dict[str, Any]:
        """Return the tokenizer in the format of the library `tokenizers`, which exports need.

        Raises:
            ConfigError: this kind cannot be expressed in it.
        """
        raise ConfigError(
            f"train_tokenizer.kind: found {self.kind}, which cannot be exported; expected a kind"
            " that the library `tokenizers` can run"
        )

    def control_id(self, name: str) -> int:
        """Return the id of one of CONTROL_TOKENS."""
        return self.control_ids[CONTROL_TOKENS.index(name)]

    def can_encode(self, text: str) -> bool:
        """Tell whether `encode_arrays` accepts `text`."""
        return text.isascii() or not LONE_SURROGATE.search(text)

    def to_files(self) -> dict[str, bytes]:
        """Return the files that `load_tokenizer` reads, by name."""
        files = {TOKENIZER_JSON: self.to_json()}
        if self.chat_format != DEFAULT_CHAT_FORMAT:
            files[CHAT_FORMAT_JSON] = json_bytes({"name": self.chat_format})
        return files

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode every text to a list of ids; raises as `encode_arrays` does."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, without control tokens; invalid UTF-8 gives U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return exactly the bytes of `ids`."""
        table = self.bytes_of_token
        if len(ids) and not 0 <= min(ids) <= max(ids) < len(table):
            raise ValueError(f"ids from {min(ids)} to {max(ids)}, expected 0 to {len(table) - 1}")
        return b"".join([table[index] for index in ids])

    @cached_property
    def token_bytes(self) -> npt.NDArray[np.int64]:
        """Number of bytes of each id, (V,); 0 for control tokens."""
        return np.array([len(token) for token in self.bytes_of_token], dtype=np.int64)


def refuse_lone_surrogates(texts: Sequence[str]) -> None:
    """Raise if a text holds half a surrogate pair, which UTF-8 cannot encode.

    Raises:
        DataError: with the text's number and the character's position.
    """
    for index, text in enumerate(texts):
        if found := LONE_SURROGATE.search(text):
            raise DataError(
                f"text {index}: character {found.start()} is the lone surrogate"
                f" U+{ord(found[0]):04X}, which is not valid Unicode; replace it, for example by"
                " U+FFFD"
            )


def json_bytes(fields: Mapping[str, object]) -> bytes:
    """Return `fields` as the bytes of a JSON file."""
    return json.dumps(fields, indent=2).encode() + b"\n"
