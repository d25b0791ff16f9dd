"""SentencePiece, unigram or BPE, made exact: no normalization, and bytes for what it did not learn.

Pieces write a blank as U+2581, so that this character itself, in a text, is written by its bytes.
Line ends, tabs and NUL are never part of a piece. The library is imported where it is needed.

Sources: Kudo and Richardson 2018, arXiv:1808.06226; unigram: Kudo 2018, arXiv:1804.10959.
"""

import hashlib
import importlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from llm.errors import ArtifactError, ConfigError, DataError
from llm.tokenizer.base import (
    CONTROL_TOKENS,
    NUM_BYTE_VALUES,
    TOKENIZER_JSON,
    Ids,
    Tokenizer,
    refuse_lone_surrogates,
)
from llm.tokenizer.splitting import split_text
from llm.tokenizer.words import WordCache, encode_in_pieces

MODEL_FILE = "tokenizer.model"
BLANK = "\u2581"
# The library's first id, <unk>, never occurs; its others follow the control tokens.
SHIFT = len(CONTROL_TOKENS) - 1
TRAINING_THREADS = 16  # sums are made by thread: the number decides bits, the cores do not
MAX_SENTENCE_CHARACTERS = 1000  # 4,000 bytes; the library drops sentences over 4,192
_NEVER_IN_PIECES = re.compile("[\0\t\r\n\u2581]+")
_WORDS = re.compile(r" *[^ \0\t\r\n]+| +|[\0\t\r\n]")


class SentencePieceTokenizer(Tokenizer):
    """Encode by the library's processor, word by word; decode by a table of bytes."""

    kind: ClassVar[str] = "sentencepiece"

    def __init__(self, model: bytes) -> None:
        """Load the library's protobuf.

        Raises:
            ArtifactError: it is none, or not one made by `train`.
        """
        self._model = model
        try:
            self._processor = _library().SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ArtifactError(f"{MODEL_FILE}: no model of SentencePiece ({error})") from error
        super().__init__(self._processor.vocab_size() + SHIFT)
        if problem := self._difference():
            raise ArtifactError(f"{MODEL_FILE}: {problem}")
        self._words = WordCache(self._encode_words)

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, algorithm: str
    ) -> "SentencePieceTokenizer":
        """Learn at most `vocab_size` tokens by `unigram` or `bpe`; the same bytes on any machine.

        Raises:
            ConfigError: the vocabulary has no room for the characters of the texts.
            DataError: the texts hold no words.
        """
        model = io.BytesIO()
        sentences = _sentences(texts)
        first = next(sentences, None)
        if first is None:
            raise DataError("only blanks in the training documents; give more data")
        try:
            _library().SentencePieceTrainer.train(
                sentence_iterator=_chain(first, sentences),
                model_writer=model,
                model_type=algorithm,
                vocab_size=vocab_size - SHIFT,
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
        return cls(model.getvalue())

    @classmethod
    def load(cls, folder: Path, data: Mapping[str, Any]) -> "SentencePieceTokenizer":
        """Load what `to_files` wrote; `data` is `tokenizer.json`.

        Raises:
            ArtifactError: the model is missing, damaged or another than `data` names.
        """
        path = folder / MODEL_FILE
        if not path.is_file():
            raise ArtifactError(f"{path}: not there")
        model = path.read_bytes()
        if (found := hashlib.sha256(model).hexdigest()) != data.get("sha256"):
            raise ArtifactError(f"{path}: sha256 {found}, expected {data.get('sha256')}")
        return cls(model)

    def to_files(self) -> dict[str, bytes]:
        fields = {"kind": self.kind, "sha256": hashlib.sha256(self._model).hexdigest()}
        return {
            TOKENIZER_JSON: json.dumps(fields, indent=2).encode() + b"\n",
            MODEL_FILE: self._model,
        }

    def encode_arrays(self, texts: Sequence[str]) -> list[Ids]:
        refuse_lone_surrogates(texts)
        split = partial(split_text, splitting="gpt2")  # before blanks, where no piece crosses
        return encode_in_pieces(texts, split, self._encode_pieces)

    def _encode_pieces(self, pieces: Sequence[str]) -> list[Ids]:
        return self._words.encode([_WORDS.findall(piece) for piece in pieces])

    def _encode_words(self, words: Sequence[str]) -> tuple[Ids, npt.NDArray[np.int64]]:
        """Return the ids of the words, one after another, and how many each has."""
        parts = [(index, part) for index, word in enumerate(words) for part in word.split(BLANK)]
        encoded = self._processor.encode([part for _, part in parts])
        ids: list[int] = []
        lengths = np.zeros(len(words), dtype=np.int64)
        previous = -1
        for (index, _), part in zip(parts, encoded, strict=True):
            if index == previous:
                part = [1 + byte for byte in BLANK.encode()] + part
            ids += part
            lengths[index] += len(part)
            previous = index
        return np.array(ids, dtype=np.uint32) + np.uint32(SHIFT), lengths

    @cached_property
    def bytes_of_token(self) -> list[bytes]:
        size = self._processor.vocab_size()
        pieces: list[str] = [self._processor.id_to_piece(index) for index in range(size)]
        learned = [piece.replace(BLANK, " ").encode() for piece in pieces[1 + NUM_BYTE_VALUES :]]
        single = [bytes([byte]) for byte in range(NUM_BYTE_VALUES)]
        return [b""] * len(CONTROL_TOKENS) + single + learned

    def _difference(self) -> str | None:
        """Say in what a loaded model is not one that `train` makes, or return None."""
        processor = self._processor
        size: int = processor.vocab_size()
        if size <= NUM_BYTE_VALUES or not processor.is_unknown(0):
            return "it has no ids for bytes"
        for index in range(1, size):
            if processor.is_byte(index) != (index <= NUM_BYTE_VALUES):
                return f"its id {index} is {processor.id_to_piece(index)!r}"
            if processor.is_control(index) or processor.is_unused(index):
                return f"its id {index} is a control token"
        probe = "  A  \uff21 \n"
        if self.decode_bytes(self._encode_words([probe])[0].tolist()) != probe.encode():
            return "it normalizes text"
        return None


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in filter(None, _NEVER_IN_PIECES.split(text)):
            for start in range(0, len(line), MAX_SENTENCE_CHARACTERS):
                yield line[start : start + MAX_SENTENCE_CHARACTERS]


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _library() -> Any:
    try:
        return importlib.import_module("sentencepiece")
    except ImportError as error:
        raise ConfigError(
            "train_tokenizer.kind: sentencepiece needs the library of that name; install it with"
            " `pip install 'fromscratch[sentencepiece]'`"
        ) from error
