"""Load a tokenizer of any kind from the folder that holds its files."""

import json
from pathlib import Path
from typing import Any, cast

from llm.errors import ArtifactError
from llm.tokenizer.base import TOKENIZER_JSON, Tokenizer
from llm.tokenizer.bpe import ByteLevelBPE
from llm.tokenizer.characters import ByteTokenizer, CharacterTokenizer
from llm.tokenizer.imported import ImportedTokenizer
from llm.tokenizer.sentencepiece import SentencePieceTokenizer

KINDS = {
    kind.kind: kind
    for kind in (ByteTokenizer, CharacterTokenizer, ImportedTokenizer, SentencePieceTokenizer)
}
"""The kinds that `tokenizer.json` names; one without a name is ByteLevelBPE."""


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer in an artifact or a model folder, whatever its kind.

    `tokenizer.json` says the kind; without one it is the format of the library `tokenizers`.

    Raises:
        ArtifactError: it is missing, damaged or not one of this project.
    """
    path = folder / TOKENIZER_JSON
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: not there; run train_tokenizer") from error
    try:
        fields = json.loads(data)
        if not isinstance(fields, dict):
            raise ValueError("no JSON object")
        return _from_json(data, cast(dict[str, Any], fields))
    except (ValueError, RecursionError, ArtifactError) as error:
        raise ArtifactError(
            f"{path}: no tokenizer of this project: {error}; run train_tokenizer"
        ) from error


def _from_json(data: bytes, fields: dict[str, Any]) -> Tokenizer:
    kind = fields.get("kind")
    if kind is None:
        return ByteLevelBPE.from_json(data)
    if kind not in KINDS:
        raise ArtifactError(f"the kind {kind!r} is unknown, expected one of {', '.join(KINDS)}")
    return KINDS[kind].from_json(fields)
