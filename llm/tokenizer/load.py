"""Load a tokenizer of any kind from the folder that holds its files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from llm.errors import ArtifactError
from llm.tokenizer.base import CHAT_FORMAT_JSON, DEFAULT_CHAT_FORMAT, TOKENIZER_JSON, Tokenizer
from llm.tokenizer.imported import ImportedTokenizer
from llm.tokenizer.kinds import TOKENIZER_KINDS

KIND_WITHOUT_NAME = "bpe"  # its file is in the format of the library `tokenizers`


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer in an artifact or a model folder.

    Raises:
        ArtifactError: the file is missing, damaged or of no kind known here.
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
        tokenizer = _from_json(cast(dict[str, Any], fields))
    except (TypeError, ValueError, RecursionError, ArtifactError) as error:
        raise ArtifactError(
            f"{path}: no tokenizer of this project: {error}; run train_tokenizer"
        ) from error
    tokenizer.chat_format = _read_chat_format(folder / CHAT_FORMAT_JSON)
    return tokenizer


def _from_json(fields: Mapping[str, Any]) -> Tokenizer:
    kind = fields.get("kind", KIND_WITHOUT_NAME)
    if kind == ImportedTokenizer.kind:
        return ImportedTokenizer.from_json(fields)
    if kind not in TOKENIZER_KINDS:
        known = ", ".join([*TOKENIZER_KINDS, ImportedTokenizer.kind])
        raise ArtifactError(f"the kind {kind!r} is unknown, expected one of {known}")
    return TOKENIZER_KINDS[kind].code().from_json(fields)


def _read_chat_format(path: Path) -> str:
    try:
        return str(json.loads(path.read_bytes())["name"])
    except FileNotFoundError:
        return DEFAULT_CHAT_FORMAT
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ArtifactError(f"{path}: damaged ({error!r}); run train_tokenizer again") from error
