"""Tokenizers trained elsewhere (GPT-2's, Llama's, Qwen's, Gemma's), with our control tokens added.

The library `tokenizers` runs them: byte-level BPE, or SentencePiece with byte fallback. As with
every tokenizer here, no text gives a control id, and the bytes of a text are those of its ids;
`llm.exchange.import_tokenizer` leaves out steps that would change a text.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar, Self, cast

import numpy as np
from tokenizers import Tokenizer as LibraryTokenizer

from llm.errors import ArtifactError
from llm.tokenizer.base import Ids, Tokenizer, json_bytes, refuse_lone_surrogates
from llm.tokenizer.bpe import byte_characters
from llm.tokenizer.pieces import BYTE_PIECES, bytes_of_piece
from llm.tokenizer.pre_tokenization import split_text
from llm.tokenizer.word_cache import encode_in_chunks


class ImportedTokenizer(Tokenizer):
    """Encode and decode with a vocabulary trained elsewhere."""

    kind: ClassVar[str] = "imported"
    cuts: ClassVar[str] = "imported"
    """Where `split_text` may cut a text."""

    def __init__(
        self, library: LibraryTokenizer, names: Sequence[str], vocab_size: int = 0
    ) -> None:
        """Take the names of CONTROL_TOKENS in `library`; unused ids fill up to `vocab_size`."""
        library.encode_special_tokens = True  # the library neither defaults to it nor saves it
        assert library.encode_special_tokens
        self._library, self._names = library, tuple(names)
        ids = library.get_vocab(with_added_tokens=True)
        super().__init__(max(vocab_size, 1 + max(ids.values())), [ids[name] for name in names])

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Make a tokenizer from the fields that `to_json` wrote, or raise ArtifactError."""
        try:
            library = load_library(fields["library"])
            return cls(library, list(fields["control_tokens"]), int(fields["vocab_size"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"no {cls.kind} tokenizer ({error!r})") from error

    def to_json(self) -> bytes:
        return json_bytes(
            {
                "kind": self.kind,
                "vocab_size": self.vocab_size,
                "control_tokens": self._names,
                "library": self.library_json(),
            }
        )

    def library_json(self) -> dict[str, Any]:
        return cast(dict[str, Any], json.loads(self._library.to_str()))

    def padded(self, vocab_size: int) -> Self:
        """Return the same tokenizer with unused ids up to a model's `vocab_size`."""
        padded = type(self)(self._library, self._names, vocab_size)
        padded.chat_format = self.chat_format
        return padded

    def encode_arrays(self, texts: Sequence[str]) -> list[Ids]:
        refuse_lone_surrogates(texts)
        split = partial(split_text, pre_tokenization=self.cuts)
        return encode_in_chunks(texts, split, self._encode_chunks)

    def _encode_chunks(self, chunks: Sequence[str]) -> list[Ids]:
        encodings = self._library.encode_batch_fast(chunks, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    @cached_property
    def bytes_of_token(self) -> list[bytes]:
        has_byte_level_tokens = is_byte_level(self.library_json())
        byte_of = {ord(character): byte for byte, character in enumerate(byte_characters())}
        table = [b""] * self.vocab_size
        for token, index in self._library.get_vocab(with_added_tokens=False).items():
            if not has_byte_level_tokens:
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
    refuse(vocabulary_problems(found) + _step_problems(found))
    return library


def refuse(problems: Sequence[str]) -> None:
    """Raise if a tokenizer has problems.

    Raises:
        ArtifactError: with all of them.
    """
    if problems:
        raise ArtifactError(
            "neither a byte-level BPE nor pieces with byte fallback that keep every byte: "
            + "; ".join(problems)
        )


def is_byte_level(parts: Mapping[str, Any]) -> bool:
    """Tell whether each character of a token stands for a byte, rather than for itself."""
    steps = pre_tokenization_steps(parts)
    return any(step.get("type") == "ByteLevel" for step in [*steps, parts["decoder"] or {}])


def pre_tokenization_steps(parts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the steps of the pre-tokenizer."""
    step: dict[str, Any] = parts["pre_tokenizer"] or {}
    steps = step["pretokenizers"] if step.get("type") == "Sequence" else [step]
    return [step for step in steps if step]


def vocabulary_problems(parts: Mapping[str, Any]) -> list[str]:
    """Return why the model and its vocabulary do not keep every byte of a text."""
    model, has_byte_level_tokens = parts["model"], is_byte_level(parts)
    types = ("BPE",) if has_byte_level_tokens else ("BPE", "Unigram")
    if model["type"] not in types:
        return [f"model.type: found {model['type']}, expected {' or '.join(types)}"]
    not_allowed = ["dropout", "continuing_subword_prefix", "end_of_word_suffix"]
    not_allowed.append("byte_fallback" if has_byte_level_tokens else "ignore_merges")
    problems = [
        f"model.{key}: found {model[key]!r}, expected none" for key in not_allowed if model.get(key)
    ]
    if not has_byte_level_tokens and not model["byte_fallback"]:
        problems.append(
            "model.byte_fallback: found False, expected True, or characters outside the vocabulary"
            " would be lost"
        )
    known = set(dict(model["vocab"]))
    if missing := len(set(byte_characters() if has_byte_level_tokens else BYTE_PIECES) - known):
        problems.append(f"model.vocab: {missing} of the 256 bytes are missing")
    return problems


def _step_problems(parts: Mapping[str, Any]) -> list[str]:
    """Return why the steps around the model do not keep every byte of a text."""
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
