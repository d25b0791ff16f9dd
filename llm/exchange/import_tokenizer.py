"""Import a tokenizer trained elsewhere, made exact: any text is restored from its ids.

Steps that would change a text are left out: NFC, and the space that Llama 2 puts before a text.
Pieces contain spaces themselves (llm/tokenizer/pieces.py). So ids equal those of transformers on
texts in NFC without U+2581, with `add_prefix_space=False` for tokenizers that put a space first.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken
from tokenizers import Tokenizer as LibraryTokenizer

from llm.errors import ArtifactError
from llm.exchange.hf_tokenizer import find_chat_format
from llm.exchange.sentencepiece_model import MODEL_FILE, library_parts, read_piece_model
from llm.tokenizer.base import (
    CONTROL_TOKENS,
    MARK,
    TOKENIZER_CONFIG_JSON,
    TOKENIZER_JSON,
    Tokenizer,
)
from llm.tokenizer.bpe import ByteLevelBPE
from llm.tokenizer.imported import (
    ImportedTokenizer,
    is_byte_level,
    load_library,
    pre_tokenization_steps,
    refuse,
    vocabulary_problems,
)
from llm.tokenizer.pieces import (
    BLANK,
    added_token,
    bpe_model,
    is_reserved,
    pieces_library,
    unigram_model,
)

_BLANK_STEP = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithNext",
               "invert": False}  # fmt: skip


def import_tokenizer(folder: Path) -> Tokenizer:
    """Read `tokenizer.json` or else `tokenizer.model`; an exported one comes back as it was.

    Raises:
        ArtifactError: both are missing, or the file is damaged or cannot be made exact.
    """
    path = folder / TOKENIZER_JSON
    try:
        config = _read(folder / TOKENIZER_CONFIG_JSON) or {}
        begin = _begin_token(config)
        parts = _read(path)
        if parts is None and (folder / MODEL_FILE).is_file():
            path = folder / MODEL_FILE
            model = read_piece_model(path.read_bytes())
            parts, begin = library_parts(model), begin or model.begin
        if parts is None:
            raise ArtifactError(
                f"not there, nor {MODEL_FILE}; `save_pretrained` of a tokenizer of transformers"
                " writes it"
            )
        tokenizer = _make(parts, begin)
        tokenizer.chat_format = find_chat_format(tokenizer, config.get("chat_template"))
        return tokenizer
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error


def _make(parts: dict[str, Any], begin: str | None) -> Tokenizer:
    _unmark(parts)
    try:
        return ByteLevelBPE.from_json(parts)
    except ArtifactError:  # not exported from here
        pass
    parts |= {"post_processor": None, "truncation": None, "padding": None}
    try:
        library = LibraryTokenizer.from_str(json.dumps(parts))
    except Exception as error:  # the library raises the bare class
        raise ArtifactError(f"the library cannot read it ({error})") from error
    parts = _exact(cast(dict[str, Any], json.loads(library.to_str())))
    return _with_control_tokens(load_library(parts), begin)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        parts = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path.name}: no readable JSON ({error})") from error
    if not isinstance(parts, dict):
        raise ArtifactError(f"{path.name}: found {type(parts).__name__}, expected a JSON object")
    return cast(dict[str, Any], parts)


def _begin_token(config: Mapping[str, Any]) -> str | None:
    token = config.get("bos_token")
    name = cast(dict[str, Any], token).get("content") if isinstance(token, dict) else token
    return name.removeprefix(MARK) if isinstance(name, str) else None


def _unmark(parts: dict[str, Any]) -> None:
    """Remove MARK from the names of exported control tokens."""
    added, model = parts.get("added_tokens"), parts.get("model")
    if not isinstance(added, list) or not isinstance(model, dict):
        return  # the library reports what is wrong
    model = cast(dict[str, Any], model)
    names: dict[str, str] = {}
    for token in cast(list[Any], added):
        if isinstance(token, dict) and str(token.get("content")).startswith(MARK):
            name = str(token["content"])
            token["content"] = names[name] = name.removeprefix(MARK)
    match model.get("vocab"):
        case dict() as by_name:
            for name in names.keys() & cast(dict[str, Any], by_name).keys():
                by_name[names[name]] = by_name.pop(name)
        case list() as by_id:
            for entry in cast(list[Any], by_id):
                if isinstance(entry, list) and entry and entry[0] in names:
                    entry[0] = names[entry[0]]
        case _:
            pass


def _exact(parts: dict[str, Any]) -> dict[str, Any]:
    """Return the parts without steps that change a text, so that no text gives a special token."""
    special = {token["content"] for token in parts["added_tokens"] if token["special"]}
    refuse(vocabulary_problems(parts))
    if is_byte_level(parts):
        if (parts["normalizer"] or {}).get("type") == "NFC":
            parts["normalizer"] = None
        merges = parts["model"]["merges"]
        parts["model"]["merges"] = [pair for pair in merges if "".join(pair) not in special]
        return parts
    normalizers = _normalizers(parts)
    is_replaced = any(step["type"] == "Replace" for step in normalizers)
    steps, are_spaces_replaced = _steps(parts, is_replaced)
    added = _added_tokens(parts, normalizers)
    model = _exact_model(parts["model"], special, added, keeps_spaces=not are_spaces_replaced)
    return pieces_library(model, added, steps)


def _normalizers(parts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the normalizers: U+2581 for spaces, a space put first, or NFC.

    Raises:
        ArtifactError: there is another one.
    """
    normalizer: dict[str, Any] = parts["normalizer"] or {"type": "Sequence", "normalizers": []}
    is_sequence = normalizer["type"] == "Sequence"
    steps: list[dict[str, Any]] = normalizer["normalizers"] if is_sequence else [normalizer]
    for step in steps:
        is_blank = step.get("pattern") == {"String": " "} and step.get("content") == BLANK
        if not is_blank and step != {"type": "Prepend", "prepend": BLANK} and step["type"] != "NFC":
            raise ArtifactError(
                f"normalizer: found {step['type']}, which changes texts; expected NFC, or"
                " U+2581 for spaces. Train another tokenizer without it, or one here with"
                " train_tokenizer.kind=sentencepiece"
            )
    return steps


def _steps(parts: Mapping[str, Any], is_replaced: bool) -> tuple[list[dict[str, Any]], bool]:
    """Return the pre-tokenization steps for texts that keep their spaces, and whether the original
    tokenizer replaces them.

    Raises:
        ArtifactError: a step has no counterpart.
    """
    steps = pre_tokenization_steps(parts)
    is_metaspace = any(step["type"] == "Metaspace" for step in steps)
    kept: list[dict[str, Any]] = []
    for step in steps:
        if step["type"] == "Metaspace" and step["replacement"] == BLANK:
            kept += [_BLANK_STEP] if step["split"] else []
        elif is_replaced and step.get("pattern") == {"String": " "}:
            pass  # it matches nothing
        elif (is_replaced or is_metaspace) and step["type"] != "Digits":
            raise ArtifactError(f"pre_tokenizer: found {step}, expected Metaspace, Digits or none")
        else:
            kept.append(step)
    return kept, is_replaced or is_metaspace


def _added_tokens(
    parts: Mapping[str, Any], normalizers: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return the tokens that are matched before pre-tokenization, special ones with MARK."""
    is_prefixed = any(step["type"] == "Prepend" for step in normalizers)
    is_replaced = any(step["type"] == "Replace" for step in normalizers)
    kept: list[dict[str, Any]] = []
    for token in parts["added_tokens"]:
        content = token["content"]
        if token["special"]:
            kept.append(added_token(token["id"], MARK + content, is_special=True))
        elif token["normalized"] and is_prefixed:
            raise ArtifactError(
                f"added_tokens: {content!r} is normalized after a space is put first; expected"
                " normalized false"
            )
        elif token["normalized"] and is_replaced:
            kept.append(token | {"content": content.replace(BLANK, " "), "normalized": False})
        elif BLANK not in content:  # else it would match U+2581 itself, which is not a space
            kept.append(token | {"normalized": False})
    return kept


def _exact_model(
    model: Mapping[str, Any],
    special: Collection[str],
    added: Sequence[Mapping[str, Any]],
    *,
    keeps_spaces: bool,
) -> dict[str, Any]:
    """Return the model with spaces for U+2581, and MARK before names that no text may give."""
    is_unigram = model["type"] == "Unigram"
    scores: dict[str, float] = dict(model["vocab"])  # ids, if BPE
    unknown = model["unk_id"] if is_unigram else model["unk_token"]
    if is_unigram and unknown is not None:
        unknown = model["vocab"][unknown][0]
    matched_first = {token["content"] for token in added}
    names: dict[str, str] = {}
    for piece in scores:
        # if spaces are replaced, no text gives a piece that contains one
        is_never = not keeps_spaces and " " in piece and piece not in matched_first
        plain = piece if keeps_spaces else piece.replace(BLANK, " ")
        is_marked = is_never or piece == unknown or piece in special
        names[piece] = MARK + piece if is_marked else plain
    num_entries = len(model["vocab"])
    if len(set(names.values())) < num_entries or any(MARK in piece for piece in scores):
        raise ArtifactError(
            "model.vocab: found pieces that contain U+FDD0, or that are equal once U+2581 is a"
            " space; expected neither"
        )
    if is_unigram:
        return unigram_model([(names[piece], score) for piece, score in scores.items()])
    merges = [
        (names[left], names[right])
        for left, right in model["merges"]
        if not any(is_reserved(names[piece]) for piece in (left, right, left + right))
    ]
    return bpe_model({names[piece]: index for piece, index in model["vocab"].items()}, merges)


def _with_control_tokens(library: LibraryTokenizer, begin: str | None) -> ImportedTokenizer:
    mark = "" if is_byte_level(json.loads(library.to_str())) else MARK
    given = {token.content for token in library.get_added_tokens_decoder().values()}
    names = [mark + name for name in CONTROL_TOKENS]
    if begin is not None and mark + begin in given and begin not in CONTROL_TOKENS[1:]:
        names[0] = mark + begin
    library.add_special_tokens([AddedToken(name, special=True) for name in names])
    ids = library.get_vocab(with_added_tokens=True)
    if len(set(ids.values())) < len(ids):
        raise ArtifactError(
            "model.vocab: its ids have gaps, which new control tokens would fill; expected none"
        )
    return ImportedTokenizer(library, names)
