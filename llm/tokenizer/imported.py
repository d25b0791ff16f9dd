"""A vocabulary that others trained, with our control tokens: GPT-2's, Llama's, Qwen's, Gemma's.

The library `tokenizers` runs it: byte-level BPE, or pieces with byte fallback. As with every
tokenizer here, no text gives the id of a control token, and the bytes of a text are those of its
ids; `llm.exchange.import_tokenizer` leaves out what would change a text.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Self, cast

import numpy as np
from tokenizers import Tokenizer as LibraryTokenizer

from llm.errors import ArtifactError
from llm.tokenizer.base import TOKENIZER_JSON, Ids, Tokenizer, refuse_lone_surrogates
from llm.tokenizer.bpe import byte_characters
from llm.tokenizer.pieces import BYTE_PIECES, bytes_of_piece

PIECE_CHARACTERS = 32_768  # the library needs over 100 bytes a token while it encodes
_CUTS = (re.compile(r"\n(?=\S)"), re.compile(r"\S(?= )"))


class ImportedTokenizer(Tokenizer):
    """Encode and decode with a vocabulary that others trained."""

    kind: ClassVar[str] = "imported"

    def __init__(
        self, library: LibraryTokenizer, names: Sequence[str], vocab_size: int = 0
    ) -> None:
        """Take the control tokens by their names in `library`, in the order of CONTROL_TOKENS; ids
        up to `vocab_size` stand for nothing.
        """
        library.encode_special_tokens = True  # the library neither defaults to it nor saves it
        assert library.encode_special_tokens
        self._library, self._names = library, tuple(names)
        ids = library.get_vocab(with_added_tokens=True)
        super().__init__(max(vocab_size, 1 + max(ids.values())), [ids[name] for name in names])

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Make a tokenizer from what `to_files` wrote.

        Raises:
            ArtifactError: it is none.
        """
        try:
            library = load_library(data["library"])
            return cls(library, list(data["control_tokens"]), int(data["vocab_size"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"no {cls.kind} tokenizer ({error!r})") from error

    def to_files(self) -> dict[str, bytes]:
        fields = {
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "control_tokens": self._names,
            "library": json.loads(self._library.to_str()),
        }
        return {TOKENIZER_JSON: json.dumps(fields, indent=2).encode() + b"\n"}

    def padded(self, vocab_size: int) -> Self:
        """Return the same tokenizer, its vocabulary as large as a model's."""
        return type(self)(self._library, self._names, vocab_size)

    def encode_arrays(self, texts: Sequence[str]) -> list[Ids]:
        refuse_lone_surrogates(texts)
        pieces = [_pieces(text) for text in texts]
        flat = [piece for text in pieces for piece in text]
        encodings = iter(self._library.encode_batch_fast(flat, add_special_tokens=False))
        return [
            np.concatenate([np.array(next(encodings).ids, dtype=np.uint32) for _ in text])
            for text in pieces
        ]

    @cached_property
    def bytes_of_token(self) -> list[bytes]:
        parts: dict[str, Any] = json.loads(self._library.to_str())
        byte_of = {ord(character): byte for byte, character in enumerate(byte_characters())}
        table = [b""] * self.vocab_size
        for token, index in self._library.get_vocab(with_added_tokens=False).items():
            if not is_byte_level(parts):
                table[index] = bytes_of_piece(token)
            elif byte_of.keys() >= set(map(ord, token)):
                table[index] = token.translate(byte_of).encode("latin-1")
        for index, token in self._library.get_added_tokens_decoder().items():
            table[index] = b"" if token.special else token.content.encode()
        return table


def load_library(parts: Mapping[str, Any]) -> LibraryTokenizer:
    """Make the library's tokenizer.

    Raises:
        ArtifactError: the library cannot read it, or it does not keep every byte of a text.
    """
    try:
        library = LibraryTokenizer.from_str(json.dumps(parts))
    except Exception as error:  # the library raises the bare class
        raise ArtifactError(f"the library cannot read it ({error})") from error
    found = cast(dict[str, Any], json.loads(library.to_str()))
    refuse(model_problems(found) + _other_problems(found))
    return library


def refuse(problems: Sequence[str]) -> None:
    """Raise when a tokenizer has any.

    Raises:
        ArtifactError: it has.
    """
    if problems:
        raise ArtifactError(
            "neither a byte-level BPE nor pieces with byte fallback that keep every byte: "
            + "; ".join(problems)
        )


def is_byte_level(parts: Mapping[str, Any]) -> bool:
    """Tell whether characters stand for bytes; else pieces stand for their own characters."""
    steps = pre_tokenization_steps(parts)
    return any(step.get("type") == "ByteLevel" for step in [*steps, parts["decoder"] or {}])


def pre_tokenization_steps(parts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what pre-tokenizes a text, step by step."""
    step: dict[str, Any] = parts["pre_tokenizer"] or {}
    steps = step["pretokenizers"] if step.get("type") == "Sequence" else [step]
    return [step for step in steps if step]


def model_problems(parts: Mapping[str, Any]) -> list[str]:
    """Return why the model and its vocabulary lose something of a text."""
    model, is_of_bytes = parts["model"], is_byte_level(parts)
    kinds = ("BPE",) if is_of_bytes else ("BPE", "Unigram")
    if model["type"] not in kinds:
        return [f"model.type: found {model['type']}, expected {' or '.join(kinds)}"]
    not_allowed = ["dropout", "continuing_subword_prefix", "end_of_word_suffix"]
    not_allowed.append("byte_fallback" if is_of_bytes else "ignore_merges")
    problems = [
        f"model.{key}: found {model[key]!r}, expected none" for key in not_allowed if model.get(key)
    ]
    if not is_of_bytes and not model["byte_fallback"]:
        problems.append(
            "model.byte_fallback: found False, expected True, or characters that the vocabulary"
            " lacks would be lost"
        )
    known = set(dict(model["vocab"]))
    if missing := len(set(byte_characters() if is_of_bytes else BYTE_PIECES) - known):
        problems.append(f"model.vocab: {missing} of the 256 bytes are missing")
    return problems


def _other_problems(parts: Mapping[str, Any]) -> list[str]:
    steps, problems = pre_tokenization_steps(parts), list[str]()
    if parts["normalizer"] is not None:
        found = parts["normalizer"]["type"]
        problems.append(f"normalizer: found {found}, which changes texts; expected none or NFC")
    if is_byte_level(parts):
        if (parts["decoder"] or {}).get("type") != "ByteLevel":
            problems.append("decoder: expected ByteLevel")
        if [step.get("type") for step in steps].count("ByteLevel") != 1:
            problems.append("pre_tokenizer: expected ByteLevel once")
    problems += [
        f"pre_tokenizer: found {step}, which loses or adds characters"
        for step in steps
        if step.get("type") not in ("Split", "ByteLevel", "Digits")
        or step.get("behavior") == "Removed"
        or step.get("add_prefix_space")
    ]
    problems += [
        f"added_tokens: {token['content']!r} takes the space beside it"
        for token in parts["added_tokens"]
        if not token["special"] and (token["lstrip"] or token["rstrip"])
    ]
    return problems


def _pieces(text: str) -> list[str]:
    """Cut a long text where a line starts unindented, or else a word, which tokens do not cross."""
    pieces: list[str] = []
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        first, last = start + PIECE_CHARACTERS - 1, start + 2 * PIECE_CHARACTERS
        found = (cut.search(text, first, last) for cut in _CUTS)
        place = next(filter(None, found), None)
        end = place.end() if place else start + PIECE_CHARACTERS
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]
