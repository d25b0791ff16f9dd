"""SentencePiece (unigram or BPE), exact on any text: no normalization, and byte fallback.

The library of that name is imported for training only; `tokenizers` encodes word by word, here as
in transformers. Line ends, tabs and NUL are never part of a piece.
"""

import importlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from llm.errors import ConfigError, DataError
from llm.tokenizer.base import CONTROL_TOKENS, MARK, Ids
from llm.tokenizer.imported import ImportedTokenizer, load_library
from llm.tokenizer.pieces import (
    BLANK,
    BYTE_PIECES,
    RESERVED,
    WORDS,
    ScoredPiece,
    added_token,
    bpe_model,
    find_words,
    make_merges,
    pieces_library,
    split_step,
    unigram_model,
)
from llm.tokenizer.word_cache import WordCache

TRAINING_THREADS = 16  # the library sums per thread: this number decides bits, the cores do not
MAX_SENTENCE_CHARACTERS = 1000  # 4,000 bytes; the library drops sentences over 4,192
_NEVER_IN_PIECES = re.compile(f"[\0\t\r\n{BLANK}{MARK}]+")


class SentencePieceTokenizer(ImportedTokenizer):
    """Encode and decode with pieces learned by SentencePiece."""

    kind: ClassVar[str] = "sentencepiece"
    cuts: ClassVar[str] = "gpt2"  # before whitespace, which no piece crosses

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, algorithm: str) -> Self:
        """Learn at most `vocab_size` tokens by `unigram` or `bpe`; the same ids on any machine.

        Raises:
            ConfigError: the vocabulary has no room for the characters of the texts.
            DataError: the texts hold no words.
        """
        sentences = _sentences(texts)
        first = next(sentences, None)
        if first is None:
            raise DataError("only blanks in the training documents; give more data")
        library, model = _import_library(), io.BytesIO()
        try:
            library.SentencePieceTrainer.train(
                sentence_iterator=chain([first], sentences),
                model_writer=model,
                model_type=algorithm,
                vocab_size=vocab_size - len(CONTROL_TOKENS) + 1,  # its <unk> is left out
                hard_vocab_limit=False,
                byte_fallback=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                split_digits=True,
                num_threads=TRAINING_THREADS,
                unk_id=0, bos_id=-1, eos_id=-1, pad_id=-1,
                minloglevel=2,
            )  # fmt: skip
        except RuntimeError as error:
            raise ConfigError(
                f"train_tokenizer.vocab_size: found {vocab_size}, with which SentencePiece learns"
                f" nothing: {error}"
            ) from error
        learned = learned_pieces(library.SentencePieceProcessor(model_proto=model.getvalue()))
        return cls._from_pieces(learned, algorithm)

    @classmethod
    def _from_pieces(cls, learned: Sequence[ScoredPiece], algorithm: str) -> Self:
        """Put the control tokens and the bytes before the pieces."""
        names = [MARK + name for name in CONTROL_TOKENS]
        pieces = [*((name, 0.0) for name in (*names, *BYTE_PIECES)), *learned]
        if algorithm == "unigram":
            model = unigram_model(pieces)
        else:
            ids = {piece: index for index, (piece, _) in enumerate(pieces)}
            model = bpe_model(ids, make_merges(ids))
        added = [added_token(index, name, is_special=True) for index, name in enumerate(names)]
        steps = [split_step(RESERVED), split_step(WORDS)]
        return cls(load_library(pieces_library(model, added, steps)), names)

    def _encode_chunks(self, chunks: Sequence[str]) -> list[Ids]:
        return self._words.encode([find_words(chunk) for chunk in chunks])

    @cached_property
    def _words(self) -> WordCache:
        return WordCache(self._encode_words)

    def _encode_words(self, words: Sequence[str]) -> tuple[Ids, npt.NDArray[np.int64]]:
        """Return the concatenated ids of the words and the number of ids of each."""
        encodings = self._library.encode_batch_fast(words, add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        lengths = np.array(list(map(len, ids)), dtype=np.int64)
        return np.array(list(chain.from_iterable(ids)), dtype=np.uint32), lengths


def learned_pieces(processor: Any) -> list[ScoredPiece]:
    """Return the learned pieces of a `SentencePieceProcessor`: all but <unk> and the bytes."""
    return [
        (processor.id_to_piece(index).replace(BLANK, " "), processor.get_score(index))
        for index in range(processor.vocab_size())
        if not processor.is_unknown(index) and not processor.is_byte(index)
    ]


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in filter(None, _NEVER_IN_PIECES.split(text)):
            for start in range(0, len(line), MAX_SENTENCE_CHARACTERS):
                yield line[start : start + MAX_SENTENCE_CHARACTERS]


def _import_library() -> Any:
    try:
        return importlib.import_module("sentencepiece")
    except ImportError as error:
        raise ConfigError(
            "train_tokenizer.kind: sentencepiece needs the library of that name; install it with"
            " `pip install 'fromscratch[sentencepiece]'`"
        ) from error
