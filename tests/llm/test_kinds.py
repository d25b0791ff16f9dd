"""The table of tokenizer kinds: one added to it is trained, loaded, packed and chosen."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from llm.artifact import Json
from llm.config import TrainTokenizerConfig
from llm.data.packed import PackedSequences
from llm.errors import ConfigError
from llm.exchange.hf_tokenizer import exported_files
from llm.pack import pack
from llm.recipes import load_config
from llm.runtime.code import code_digests
from llm.tokenizer.base import CONTROL_TOKENS, Ids, Tokenizer, json_bytes
from llm.tokenizer.kinds import TOKENIZER_KINDS, TokenizerCode, TokenizerKind
from llm.tokenizer.load import load_tokenizer
from llm.train_tokenizer import train_tokenizer
from tasks.plan import key_parts
from tasks.stages import TRAIN_TOKENIZER, PipelineStep
from tasks.store import ArtifactStore

MakeDocuments = Callable[..., Path]
RunStage = Callable[..., tuple[Path, Mapping[str, Json]]]
FIRST_BYTE = len(CONTROL_TOKENS)
FIRST_WORD = FIRST_BYTE + 256


class WordTokenizer(Tokenizer):
    """An id for each of the most frequent words; other text by its bytes."""

    kind: ClassVar[str] = "words"

    def __init__(self, words: Sequence[str]) -> None:
        self.words = {word: FIRST_WORD + number for number, word in enumerate(words)}
        super().__init__(FIRST_WORD + len(words))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "WordTokenizer":
        counts = Counter(word for text in texts for word in re.findall(r"\w+", text))
        return cls(sorted(word for word, _ in counts.most_common(vocab_size - FIRST_WORD)))

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "WordTokenizer":
        return cls(fields["words"])

    def to_json(self) -> bytes:
        return json_bytes({"kind": self.kind, "words": list(self.words)})

    def encode_arrays(self, texts: Sequence[str]) -> list[Ids]:
        return [np.array(self._encode(text), dtype=np.uint32) for text in texts]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for word in re.findall(r"\w+|\W", text):
            known = self.words.get(word)
            ids += [FIRST_BYTE + byte for byte in word.encode()] if known is None else [known]
        return ids

    @cached_property
    def bytes_of_token(self) -> list[bytes]:
        tokens = [b""] * FIRST_BYTE + [bytes([byte]) for byte in range(256)]
        return tokens + [word.encode() for word in self.words]


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> str:
    """Add the kind to the table, and nothing else."""
    kind = TokenizerKind(
        code=lambda: TokenizerCode(WordTokenizer.train, WordTokenizer.from_json),
        settings=("vocab_size",),
        library="yaml",
    )
    monkeypatch.setitem(TOKENIZER_KINDS, "words", kind)
    return "words"


def test_a_kind_added_to_the_table_is_trained_loaded_and_packed(
    words: str, make_documents: MakeDocuments, run_stage: RunStage, corpus: list[str]
) -> None:
    documents = make_documents(corpus[:-5], corpus[-5:])
    settings = {"kind": words, "vocab_size": 400}
    folder, summary = run_stage(train_tokenizer, settings, out="tokenizer", documents=documents)
    assert summary["vocab_size"] == summary["asked_vocab_size"] == 400
    assert summary["round_trip_failures"] == 0
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, WordTokenizer)
    encoded = tokenizer.encode_batch(corpus)
    assert [tokenizer.decode(ids) for ids in encoded] == corpus
    assert min(map(len, encoded)) > 0 and max(map(max, encoded)) == 399
    out, packed = run_stage(pack, {"seq_len": 32}, documents=documents, tokenizer=folder)
    assert packed["train_tokens"] == sum(len(ids) + 1 for ids in encoded[:-5]), "and a bos for each"
    first = PackedSequences(out, "validation").read([0]).tokens[0]
    assert first[0] == tokenizer.bos_id and tokenizer.decode(first.tolist()) in "".join(corpus)


def test_a_kind_added_to_the_table_can_be_set_and_its_library_is_in_the_key(
    words: str, tmp_path: Path
) -> None:
    config = load_config("quickstart", [f"train_tokenizer.kind={words}"])
    step = PipelineStep(stage=TRAIN_TOKENIZER)
    libraries = key_parts(step, config, {}, ArtifactStore(tmp_path)).libraries
    assert {"tokenizers", "yaml"} <= libraries.keys()


def test_a_kind_that_is_not_in_the_table_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"kind: found 'words', allowed: bpe, gpt2, sentencep"):
        load_config("quickstart", ["train_tokenizer.kind=words"])
    with pytest.raises(ConfigError, match="did you mean bytes"):
        load_config("quickstart", ["train_tokenizer.kind=byte"])


def test_a_kind_that_the_library_cannot_run_is_not_exported() -> None:
    with pytest.raises(ConfigError, match="found words, which cannot be exported"):
        exported_files(WordTokenizer(["one"]), 64)


def test_every_setting_in_the_table_is_one_of_train_tokenizer() -> None:
    known = {field.name for field in fields(TrainTokenizerConfig)}
    for kind in TOKENIZER_KINDS.values():
        assert {*kind.settings, kind.variant or "kind"} <= known


@pytest.mark.parametrize("stage", ["train_tokenizer", "pack", "pretrain", "finetune", "evaluate"])
def test_no_stage_depends_on_the_formats_of_other_projects(stage: str) -> None:
    assert not [module for module in code_digests(stage) if module.startswith("llm.exchange")]
