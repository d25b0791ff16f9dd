"""Every kind of tokenizer: exact on any text, no control ids from texts, deterministic files."""

import hashlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.errors import ArtifactError, ConfigError, DataError
from llm.tokenizer.base import TOKENIZER_JSON, Tokenizer
from llm.tokenizer.characters import CharacterTokenizer
from llm.tokenizer.gpt2 import GPT2_FILES, load_gpt2
from llm.tokenizer.load import load_tokenizer
from llm.tokenizer.pieces import ScoredPiece
from llm.tokenizer.sentencepiece import SentencePieceTokenizer, learned_pieces
from tests.llm.tokenizer_makers import FRAGMENTS, MAKERS, save_and_load

DATA = Path(__file__).parents[2] / "../shared/data"
ROOT = Path(__file__).parents[2]
nasty_text = st.text() | st.lists(st.sampled_from(FRAGMENTS)).map("".join)
fast = settings(max_examples=300, deadline=None)


@pytest.fixture(scope="module", params=list(MAKERS))
def made(request: pytest.FixtureRequest, corpus: list[str]) -> Tokenizer:
    if request.param in ("unigram", "sentencepiece bpe"):
        pytest.importorskip("sentencepiece")
    return MAKERS[request.param](corpus)


@pytest.fixture(scope="module")
def loaded(made: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return save_and_load(made, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    if not (DATA / "gpt2").is_dir():
        pytest.skip(f"{DATA / 'gpt2'} is not there")
    return load_gpt2(DATA / "gpt2")


def examples(count: int) -> Iterator[str]:
    generator = random.Random(0)
    for _ in range(count):
        yield "".join(generator.choices(FRAGMENTS, k=5))


def test_round_trip_is_exact_on_any_text_before_and_after_save_and_load(
    made: Tokenizer, loaded: Tokenizer
) -> None:
    @fast
    @given(text=nasty_text)
    def check(text: str) -> None:
        (ids,) = made.encode_batch([text])
        assert loaded.encode_batch([text]) == [ids]
        assert loaded.decode_bytes(ids) == text.encode()
        assert loaded.decode(ids) == text
        assert int(loaded.token_bytes[ids].sum()) == len(text.encode())

    check()
    assert loaded.to_files() == made.to_files()


def test_control_tokens_typed_by_a_user_never_become_control_ids(loaded: Tokenizer) -> None:
    texts = [*FRAGMENTS, *examples(20_000)]
    for text, ids in zip(texts, loaded.encode_batch(texts), strict=True):
        assert not set(ids) & set(loaded.control_ids)
        assert loaded.decode(ids) == text


def test_control_tokens_have_the_first_ids_and_stand_for_no_bytes(loaded: Tokenizer) -> None:
    assert loaded.control_ids == tuple(range(7))
    assert (loaded.bos_id, loaded.end_id, loaded.pad_id, loaded.mask_id) == (0, 4, 5, 6)
    assert loaded.decode_bytes(loaded.control_ids) == b""
    assert set(loaded.token_bytes[7:]) > {0} or min(loaded.token_bytes[7:]) >= 1


def test_every_id_has_the_bytes_that_decoding_gives(loaded: Tokenizer) -> None:
    every = range(loaded.vocab_size)
    pieces = [loaded.decode_bytes([index]) for index in every]
    assert b"".join(pieces) == loaded.decode_bytes(every)
    assert [len(piece) for piece in pieces] == loaded.token_bytes.tolist()
    with pytest.raises(ValueError, match="expected 0 to"):
        loaded.decode_bytes([loaded.vocab_size])


def test_lone_surrogates_are_refused_with_their_position(loaded: Tokenizer) -> None:
    assert not loaded.can_encode("ab\udc80") and loaded.can_encode("ab\ufffd")
    with pytest.raises(DataError, match=r"text 1: character 2 is the lone surrogate U\+DC80"):
        loaded.encode_batch(["fine", "ab\udc80"])


def test_texts_keep_their_order_and_arrays_are_the_lists(
    loaded: Tokenizer, corpus: list[str]
) -> None:
    one_by_one = [loaded.encode_batch([text])[0] for text in corpus]
    assert loaded.encode_batch(corpus) == one_by_one
    arrays = loaded.encode_arrays([*corpus, ""])
    assert [ids.tolist() for ids in arrays] == [*one_by_one, []]
    assert {ids.dtype for ids in arrays} == {np.dtype(np.uint32)}
    assert loaded.encode_batch([]) == []


def test_characters_are_those_of_the_training_text_in_order() -> None:
    tokenizer = CharacterTokenizer.train(["cab", "é\n"], has_byte_fallback=False)
    assert tokenizer.vocab_size == 7 + 5
    assert tokenizer.encode_batch(["\nabcé"]) == [[7, 8, 9, 10, 11]]


def test_an_unknown_character_is_written_by_its_bytes_or_refused() -> None:
    tokenizer = CharacterTokenizer.train(["ab"])
    assert tokenizer.vocab_size == 7 + 2 + 256
    assert tokenizer.encode_batch(["aéb"]) == [[7, 9 + 0xC3, 9 + 0xA9, 8]]
    narrow = CharacterTokenizer.train(["ab"], has_byte_fallback=False)
    assert narrow.can_encode("ba") and not narrow.can_encode("bé")
    with pytest.raises(DataError, match=r"text 1: character 1, 'é', is not among the 2 characters"):
        narrow.encode_batch(["ab", "aéb"])


def test_no_piece_of_sentencepiece_ends_a_line_or_crosses_a_blank(corpus: list[str]) -> None:
    pytest.importorskip("sentencepiece")
    tokenizer = SentencePieceTokenizer.train(corpus, 800, "unigram")
    pieces = [tokenizer.decode([index]) for index in range(7 + 256, tokenizer.vocab_size)]
    assert all(piece.strip(" ") == "" or " " not in piece[1:] for piece in pieces)
    assert not any(set(piece) & set("\0\t\r\n\u2581") for piece in pieces)
    assert max(map(len, pieces)) > 5, "words are learned"
    (ids,) = tokenizer.encode_batch(["\n    return self._parser"])
    assert len(ids) < 12


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
def test_ids_of_sentencepiece_are_those_of_its_own_processor(
    algorithm: str, corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Except for the order of spaces in a run, whose unigram scores are equal to the last bit."""
    pytest.importorskip("sentencepiece")
    processors = list[Any]()

    def learned(processor: Any) -> list[ScoredPiece]:
        processors.append(processor)
        return learned_pieces(processor)

    monkeypatch.setattr("llm.tokenizer.sentencepiece.learned_pieces", learned)
    tokenizer = SentencePieceTokenizer.train(corpus, 800, algorithm)
    (processor,) = processors
    for text, ids in zip(corpus, tokenizer.encode_batch(corpus), strict=True):
        expected = [6 + index for index in processor.encode(text)]  # <unk> is left out
        if algorithm == "bpe":
            assert ids == expected
        blanks = {index for index in ids if not tokenizer.decode([index]).strip(" ")}
        assert [i for i in ids if i not in blanks] == [i for i in expected if i not in blanks]
        assert sorted(ids) == sorted(expected)


def test_sentencepiece_is_loaded_and_run_without_its_library(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sentencepiece")
    made = SentencePieceTokenizer.train(corpus, 600, "unigram")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert save_and_load(made, tmp_path).encode_batch(corpus) == made.encode_batch(corpus)
    with pytest.raises(ConfigError, match=r"pip install 'fromscratch\[sentencepiece\]'"):
        SentencePieceTokenizer.train(corpus, 600, "unigram")


def test_sentencepiece_says_why_it_learns_nothing() -> None:
    pytest.importorskip("sentencepiece")
    with pytest.raises(
        ConfigError, match=r"train_tokenizer\.vocab_size: found 264, .* smaller than"
    ):
        SentencePieceTokenizer.train(["".join(map(chr, range(32, 127)))] * 3, 264, "unigram")
    with pytest.raises(DataError, match="only blanks"):
        SentencePieceTokenizer.train(["\n\n"], 300, "unigram")


def test_gpt2_has_the_published_ids(gpt2: Tokenizer) -> None:
    """Ids and counts from the published encoder, as many have printed them."""
    assert gpt2.encode_batch(["Hello, I am building an LLM."]) == [
        [15496, 11, 314, 716, 2615, 281, 27140, 44, 13]
    ]
    text = (DATA / "tinyshakespeare.txt").read_text(encoding="utf-8")
    end = int(len(text) * 0.9)
    assert list(map(len, gpt2.encode_arrays([text[:end], text[end:]]))) == [301_966, 36_059]
    assert gpt2.bos_id == 50_256 and gpt2.control_ids[1:] == tuple(range(50_257, 50_263))
    assert gpt2.vocab_size == 50_263


def test_the_published_ids_are_those_of_an_excerpt_of_the_published_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The excerpt holds every merge that these texts can meet; other ids have names of no text."""
    excerpt = json.loads((Path(__file__).parent / "gpt2_excerpt.json").read_text())
    names = {index: name for name, index in excerpt["ids"].items()}
    vocabulary = {names.get(index, f"no-text-{index}"): index for index in range(50_256)}
    merges = "\n".join(["#version: 0.2", *excerpt["merges"], ""])
    encoder = json.dumps(vocabulary | {"<|endoftext|>": 50_256})
    files = {"encoder.json": encoder.encode(), "vocab.bpe": merges.encode()}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        monkeypatch.setitem(GPT2_FILES, name, hashlib.sha256(data).hexdigest())
    tokenizer = load_gpt2(tmp_path)
    for text, ids in excerpt["texts"]:
        assert tokenizer.encode_batch([text]) == [ids], text
        assert tokenizer.decode(ids) == text
    assert tokenizer.bos_id == 50_256 and tokenizer.vocab_size == 50_263


def test_the_excerpt_of_gpt2_gives_the_ids_of_the_whole_vocabulary(gpt2: Tokenizer) -> None:
    excerpt = json.loads((Path(__file__).parent / "gpt2_excerpt.json").read_text())
    for text, ids in excerpt["texts"]:
        assert gpt2.encode_batch([text]) == [ids], text


def test_gpt2_gives_the_ids_of_transformers(
    gpt2: Tokenizer, corpus: list[str], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    for ours, theirs in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        (tmp_path / theirs).write_bytes((DATA / "gpt2" / ours).read_bytes())
    oracle = transformers.GPT2Tokenizer.from_pretrained(str(tmp_path))
    # without control tokens, which the oracle takes out of texts
    texts = [text for text in [*corpus, *examples(2000)] if "<|endoftext|>" not in text]
    assert gpt2.encode_batch(texts) == oracle(texts)["input_ids"]


def test_gpt2_is_exact_after_saving_and_loading(gpt2: Tokenizer, tmp_path: Path) -> None:
    loaded = save_and_load(gpt2, tmp_path)
    assert loaded.control_ids == gpt2.control_ids and loaded.to_files() == gpt2.to_files()
    texts = [*FRAGMENTS, *examples(5000)]
    encoded = loaded.encode_batch(texts)
    assert encoded == gpt2.encode_batch(texts)
    for text, ids in zip(texts, encoded, strict=True):
        assert max(ids) < 50_256 and loaded.decode(ids) == text


def test_other_files_than_gpt2s_are_refused(tmp_path: Path) -> None:
    (tmp_path / "encoder.json").write_text("{}")
    with pytest.raises(DataError, match="sha256") as caught:
        load_gpt2(tmp_path)
    assert "encoder.json" in str(caught.value) and "vocab.bpe: no file" in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "other"}, "the kind 'other' is unknown"),
        ({"kind": "bytes", "more": 1}, "found the fields"),
        ({"kind": "characters", "characters": "ba", "has_byte_fallback": True}, "not in order"),
        ({"kind": "characters", "characters": "\ud800", "has_byte_fallback": True}, "surrogate"),
        ({"kind": "characters", "characters": "ab"}, "found the fields"),
        ({"kind": "characters", "characters": 3, "has_byte_fallback": True}, "found the fields"),
        ({"kind": "sentencepiece", "library": {}}, "the library cannot read it"),
        ([], "no JSON object"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(fields: object, message: str, tmp_path: Path) -> None:
    (tmp_path / TOKENIZER_JSON).write_text(json.dumps(fields))
    with pytest.raises(ArtifactError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path / TOKENIZER_JSON) in str(caught.value)
