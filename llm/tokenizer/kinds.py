"""The table of tokenizer kinds that `train_tokenizer.kind` can name.

A new kind is a module with a `Tokenizer`, an entry here, and its settings in
`TrainTokenizerConfig`. This module imports no tokenizer until one is needed, because settings and
plans read the table too.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from llm.tokenizer.base import Tokenizer


class TokenizerCode(NamedTuple):
    """How a kind is made and loaded."""

    train: "Callable[..., Tokenizer]"
    """From texts, and the settings of `TokenizerKind.settings` as keyword arguments."""
    from_json: "Callable[[Mapping[str, Any]], Tokenizer]"
    """From the fields of `tokenizer.json`; raises ArtifactError."""
    published_url: str = ""
    published_files: Mapping[str, str] = {}
    """Name and sha256 of files under `published_url`, fetched unless the setting `path` is set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerKind:
    """What settings, plans and stages know of a kind without importing it."""

    code: Callable[[], TokenizerCode]
    """Imports it. A function with an import statement, so that code digests cover the module."""
    settings: tuple[str, ...] = ()
    """Settings of `train_tokenizer` that training takes."""
    learns_from_text: bool = True
    fixed_vocab_size: int = 0
    """Size to plan with where no setting says it; 0: `vocab_size`."""
    library: str = ""
    """Optional library that training imports, also the name of the extra that installs it."""
    variant: str = ""
    """The setting that tells two tokenizers of this kind apart in a comparison."""


def _bpe() -> TokenizerCode:
    from llm.tokenizer.bpe import ByteLevelBPE

    return TokenizerCode(ByteLevelBPE.train, ByteLevelBPE.from_json)


def _gpt2() -> TokenizerCode:
    from llm.tokenizer.bpe import ByteLevelBPE
    from llm.tokenizer.gpt2 import GPT2_FILES, GPT2_URL, load_gpt2

    def load(texts: Iterable[str], path: str) -> ByteLevelBPE:
        return load_gpt2(Path(path))

    return TokenizerCode(load, ByteLevelBPE.from_json, GPT2_URL, GPT2_FILES)


def _sentencepiece() -> TokenizerCode:
    from llm.tokenizer.sentencepiece import SentencePieceTokenizer

    return TokenizerCode(SentencePieceTokenizer.train, SentencePieceTokenizer.from_json)


def _characters() -> TokenizerCode:
    from llm.tokenizer.characters import CharacterTokenizer

    return TokenizerCode(CharacterTokenizer.train, CharacterTokenizer.from_json)


def _bytes() -> TokenizerCode:
    from llm.tokenizer.characters import ByteTokenizer

    return TokenizerCode(ByteTokenizer.train, ByteTokenizer.from_json)


TOKENIZER_KINDS: dict[str, TokenizerKind] = {
    "bpe": TokenizerKind(
        code=_bpe,
        settings=("vocab_size", "pre_tokenization", "max_digits"),
        variant="pre_tokenization",
    ),
    "gpt2": TokenizerKind(code=_gpt2, settings=("path",), learns_from_text=False),
    "sentencepiece": TokenizerKind(
        code=_sentencepiece,
        settings=("vocab_size", "algorithm"),
        library="sentencepiece",
        variant="algorithm",
    ),
    "characters": TokenizerKind(
        code=_characters, settings=("has_byte_fallback",), fixed_vocab_size=256
    ),
    "bytes": TokenizerKind(code=_bytes, learns_from_text=False, fixed_vocab_size=256),
}
