"""A byte-level BPE that others trained, with our control tokens: GPT-2's, Llama-3's, Qwen's.

The vocabulary keeps its ids. The token that began its documents becomes `<|bos|>`; control tokens
it lacks get the ids after its last. As with every tokenizer here, no text gives the id of a control
token, and the bytes of a text are those of its ids: so NFC, which would change a text, is left out.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
from tokenizers import AddedToken
from tokenizers import Tokenizer as LibraryTokenizer

from llm.errors import ArtifactError
from llm.tokenizer.base import (
    CONTROL_TOKENS,
    MARK,
    TOKENIZER_CONFIG_JSON,
    TOKENIZER_JSON,
    Ids,
    Tokenizer,
    refuse_lone_surrogates,
)
from llm.tokenizer.bpe import ByteLevelBPE, byte_characters

PIECE_CHARACTERS = 32_768  # the library needs over 100 bytes a token while it encodes
_LINE_START = re.compile(r"\n(?=\S)")


class ImportedBPE(Tokenizer):
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
    def from_json(cls, data: Mapping[str, Any]) -> "ImportedBPE":
        """Make a tokenizer from what `to_files` wrote.

        Raises:
            ArtifactError: it is none.
        """
        try:
            library = _load_library(data["library"])
            return cls(library, list(data["control_tokens"]), int(data["vocab_size"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"no imported tokenizer ({error!r})") from error

    def to_files(self) -> dict[str, bytes]:
        fields = {
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "control_tokens": self._names,
            "library": json.loads(self._library.to_str()),
        }
        return {TOKENIZER_JSON: json.dumps(fields, indent=2).encode() + b"\n"}

    def padded(self, vocab_size: int) -> "ImportedBPE":
        """Return the same tokenizer, its vocabulary as large as a model's."""
        return ImportedBPE(self._library, self._names, vocab_size)

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
        byte_of_character = {character: byte for byte, character in enumerate(byte_characters())}
        table = [b""] * self.vocab_size
        for token, index in self._library.get_vocab(with_added_tokens=False).items():
            if byte_of_character.keys() >= set(token):
                table[index] = bytes(byte_of_character[character] for character in token)
        for index, token in self._library.get_added_tokens_decoder().items():
            table[index] = b"" if token.special else token.content.encode()
        return table


def import_tokenizer(folder: Path) -> Tokenizer:
    """Read the tokenizer in a Hugging Face folder: one of ours as it was, another's as ImportedBPE.

    Raises:
        ArtifactError: `tokenizer.json` is missing, damaged, or no byte-level BPE that keeps every
        byte; the message names what hinders.
    """
    path = folder / TOKENIZER_JSON
    parts = _read(path)
    if parts is None:
        raise ArtifactError(
            f"{path}: not there; `save_pretrained` of a fast tokenizer of transformers writes it"
        )
    _unmark(parts)
    try:
        return ByteLevelBPE.from_json(json.dumps(parts).encode())
    except ArtifactError:  # it is not one of ours
        pass
    try:
        config = _read(folder / TOKENIZER_CONFIG_JSON) or {}
        return _with_control_tokens(_load_library(parts), _begin_token(config))
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error


def _read(path: Path) -> dict[str, Any] | None:
    try:
        parts = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: no readable JSON ({error})") from error
    if not isinstance(parts, dict):
        raise ArtifactError(f"{path}: found {type(parts).__name__}, expected a JSON object")
    return cast(dict[str, Any], parts)


def _unmark(parts: dict[str, Any]) -> None:
    """Give control tokens that this project marked on their way out their own names back."""
    added, model = parts.get("added_tokens"), parts.get("model")
    if not isinstance(added, list) or not isinstance(model, dict):
        return  # the library will say what is wrong
    vocabulary = cast(dict[str, Any], model).get("vocab")
    for token in cast(list[Any], added):
        if isinstance(token, dict) and str(token.get("content")).startswith(MARK):
            name = str(token["content"])
            token["content"] = name.removeprefix(MARK)
            if isinstance(vocabulary, dict) and name in vocabulary:
                vocabulary[name.removeprefix(MARK)] = vocabulary.pop(name)


def _begin_token(config: Mapping[str, Any]) -> str | None:
    token = config.get("bos_token")
    name = cast(dict[str, Any], token).get("content") if isinstance(token, dict) else token
    return name.removeprefix(MARK) if isinstance(name, str) else None


def _load_library(parts: dict[str, Any]) -> LibraryTokenizer:
    """Make the library's tokenizer without what changes a text or adds to it.

    Raises:
        ArtifactError: the library cannot read it, or it is no byte-level BPE that keeps every byte.
    """
    if cast(dict[str, Any], parts.get("normalizer") or {}).get("type") == "NFC":
        parts = parts | {"normalizer": None}
    parts = parts | {"post_processor": None, "truncation": None, "padding": None}
    try:
        library = LibraryTokenizer.from_str(json.dumps(parts))
    except Exception as error:  # the library raises the bare class
        raise ArtifactError(f"the library cannot read it ({error})") from error
    if problems := _problems(cast(dict[str, Any], json.loads(library.to_str()))):
        raise ArtifactError("no byte-level BPE that keeps every byte: " + "; ".join(problems))
    return library


def _problems(parts: dict[str, Any]) -> list[str]:
    model: dict[str, Any] = parts["model"]
    if model["type"] != "BPE":
        return [f"model.type: found {model['type']}, expected BPE"]
    problems = [
        f"model.{key}: found {model[key]!r}, expected none"
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
        if model.get(key)
    ]
    if parts["normalizer"] is not None:
        problems.append(f"normalizer: found {parts['normalizer']['type']}, expected none or NFC")
    if (parts["decoder"] or {}).get("type") != "ByteLevel":
        problems.append("decoder: expected ByteLevel")
    steps = parts["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
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
    if missing := sum(character not in model["vocab"] for character in byte_characters()):
        problems.append(f"model.vocab: {missing} of the 256 bytes are missing")
    return problems


def _with_control_tokens(library: LibraryTokenizer, begin: str | None) -> ImportedBPE:
    given = {token.content for token in library.get_added_tokens_decoder().values()}
    names: list[str] = [*CONTROL_TOKENS]
    if begin in given and begin not in CONTROL_TOKENS[1:]:
        names[0] = begin
    library.add_special_tokens([AddedToken(name, special=True) for name in names])
    return ImportedBPE(library, names)


def _pieces(text: str) -> list[str]:
    """Cut a long text where a line starts unindented, which no token crosses."""
    pieces: list[str] = []
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        place = _LINE_START.search(text, start + PIECE_CHARACTERS - 1, start + 2 * PIECE_CHARACTERS)
        end = place.end() if place else start + PIECE_CHARACTERS
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]
