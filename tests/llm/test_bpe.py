"""The tokenizer: exact on any text, and no text a user can write becomes a control token."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.errors import ArtifactError, DataError
from llm.tokenizer import bpe, pre_tokenization
from llm.tokenizer import word_cache as words
from llm.tokenizer.base import CONTROL_TOKENS, TOKENIZER_JSON, Tokenizer
from llm.tokenizer.bpe import ByteLevelBPE
from llm.tokenizer.load import load_tokenizer
from llm.tokenizer.pre_tokenization import CHUNK_CHARACTERS, split_text

FRAGMENTS = (
    *CONTROL_TOKENS, "<|", "|>", "<", "|", "bos", "end", " ", "\n", "  \n ", "\t", "a", "é", "漢",
    "🎉", "\0", "7", "'S",
)  # fmt: skip
nasty_text = st.text() | st.lists(st.sampled_from(FRAGMENTS)).map("".join)
fast = settings(max_examples=300, deadline=None)


@pytest.fixture(scope="module")
def loaded(tokenizer: ByteLevelBPE, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / TOKENIZER_JSON).write_bytes(tokenizer.to_files()[TOKENIZER_JSON])
    return load_tokenizer(folder)


@fast
@given(text=nasty_text)
def test_round_trip_is_exact_on_any_text_before_and_after_save_and_load(
    tokenizer: ByteLevelBPE, loaded: Tokenizer, text: str
) -> None:
    (ids,) = tokenizer.encode_batch([text])
    assert loaded.encode_batch([text]) == [ids]
    assert loaded.decode_bytes(ids) == text.encode()
    assert loaded.decode(ids) == text
    assert int(loaded.token_bytes[ids].sum()) == len(text.encode())


def test_control_tokens_typed_by_a_user_never_become_control_ids(
    tokenizer: ByteLevelBPE, loaded: Tokenizer
) -> None:
    generator = random.Random(0)
    texts = ["".join(generator.choices(FRAGMENTS, k=6)) for _ in range(20_000)]
    for one in (tokenizer, loaded):
        ids = one.encode_batch([*CONTROL_TOKENS, *texts])
        assert min(map(min, ids)) >= len(CONTROL_TOKENS)
        assert [one.decode(each) for each in ids] == [*CONTROL_TOKENS, *texts]


def test_control_tokens_hold_the_first_ids(loaded: Tokenizer) -> None:
    ids = [
        loaded.bos_id, loaded.user_id, loaded.assistant_id,
        loaded.system_id, loaded.end_id, loaded.pad_id, loaded.mask_id,
    ]  # fmt: skip
    vocabulary = json.loads(loaded.to_files()[TOKENIZER_JSON])["model"]["vocab"]
    assert ids == [vocabulary[token] for token in CONTROL_TOKENS] == list(range(7))


@fast
@given(data=st.data())
def test_decoding_any_ids_gives_their_bytes_one_after_another(
    tokenizer: ByteLevelBPE, data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    expected = b"".join(tokenizer.decode_bytes([index]) for index in ids)
    assert tokenizer.decode_bytes(ids) == expected
    assert tokenizer.decode(ids) == expected.decode(errors="replace")
    assert [len(tokenizer.decode_bytes([index])) for index in ids] == list(
        tokenizer.token_bytes[ids]
    )


def test_every_byte_is_a_token_and_control_tokens_stand_for_none(tokenizer: ByteLevelBPE) -> None:
    tokens = [tokenizer.decode_bytes([index]) for index in range(tokenizer.vocab_size)]
    assert tokens[:7] == [b""] * 7
    assert {bytes([byte]) for byte in range(256)} <= set(tokens)
    assert len(set(tokens[7:])) == len(tokens) - 7


def test_bytes_are_written_as_gpt2_writes_them() -> None:
    gpt2 = pytest.importorskip("transformers.convert_slow_tokenizer")
    assert dict(enumerate(bpe.byte_characters())) == gpt2.bytes_to_unicode()


def test_numbers_fall_into_groups_of_three_and_an_indentation_into_one_token(
    tokenizer: ByteLevelBPE,
) -> None:
    (ids,) = tokenizer.encode_batch(["        return 1234567"])
    tokens = [tokenizer.decode([index]) for index in ids]
    assert tokens[0] == "       "
    assert max(len(token) for token in tokens if token.isdigit()) <= 3


@pytest.mark.parametrize("ids", [[600], [-1], [2**40]])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: ByteLevelBPE, ids: list[int]) -> None:
    with pytest.raises(ValueError, match="expected 0 to 599"):
        tokenizer.decode_bytes(ids)


def test_a_lone_surrogate_is_refused_with_its_position(tokenizer: ByteLevelBPE) -> None:
    with pytest.raises(DataError, match=r"text 1: character 2 is the lone surrogate U\+DC80"):
        tokenizer.encode_batch(["fine", "ab\udc80"])


def test_no_texts_and_empty_texts_encode_to_nothing(tokenizer: ByteLevelBPE) -> None:
    assert tokenizer.encode_batch([]) == []
    assert tokenizer.encode_batch(["", "a", ""])[::2] == [[], []]
    assert tokenizer.decode([]) == ""


def test_blank_lines_at_a_cut_keep_their_tokens(
    corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "a\n \n  b\n\n\nc\n" * 50
    tokenizer = ByteLevelBPE.train([*corpus, text], 1000)
    (whole,) = tokenizer.encode_batch([text])
    monkeypatch.setattr(pre_tokenization, "CHUNK_CHARACTERS", 16)
    assert len(list(split_text(text))) > 20
    assert tokenizer.encode_batch([text]) == [whole]


def test_a_text_without_lines_is_cut_to_bounded_chunks(tokenizer: ByteLevelBPE) -> None:
    text = "é" * (3 * CHUNK_CHARACTERS + 5)
    assert max(map(len, split_text(text))) == CHUNK_CHARACTERS
    assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text


def test_many_texts_keep_their_order_and_their_ids(
    tokenizer: ByteLevelBPE, corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one_by_one = [tokenizer.encode_batch([text])[0] for text in corpus]
    monkeypatch.setattr(words, "CALL_CHARACTERS", 1000)
    assert tokenizer.encode_batch(corpus) == one_by_one
    assert [list(ids) for ids in tokenizer.encode_arrays(corpus)] == one_by_one
    assert tokenizer.encode_arrays(corpus)[0].dtype == np.uint32


def test_saving_gives_the_same_bytes_again(loaded: Tokenizer, tokenizer: ByteLevelBPE) -> None:
    assert loaded.to_files() == tokenizer.to_files()


def change(tokenizer: ByteLevelBPE, *path: str | int, value: object) -> bytes:
    data = json.loads(tokenizer.to_files()[TOKENIZER_JSON])
    node = data
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return json.dumps(data).encode()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("normalizer",), {"type": "Lowercase"}, "normalizer"),
        (("pre_tokenizer",), None, "pre_tokenizer"),
        (("decoder",), None, "decoder"),
        (("model", "dropout"), 0.5, "settings"),
        (("model", "byte_fallback"), True, "settings"),
        (("added_tokens", 0, "special"), False, "control tokens"),
        (("added_tokens", 0, "content"), "<|other|>", "control tokens"),
        (("added_tokens",), [], "control tokens"),
        (("model", "vocab", "漢"), 600, "stand for no byte"),
        (("model", "vocab", "<|bos|><|bos|>"), 700, "gaps"),
    ],
)  # fmt: skip
def test_a_tokenizer_of_another_kind_is_refused(
    tokenizer: ByteLevelBPE,
    tmp_path: Path,
    path: tuple[str | int, ...],
    value: object,
    message: str,
) -> None:
    (tmp_path / TOKENIZER_JSON).write_bytes(change(tokenizer, *path, value=value))
    with pytest.raises(ArtifactError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path / TOKENIZER_JSON) in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", b'{"version": "1.0"}', b"[" * 10_000])
def test_a_damaged_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / TOKENIZER_JSON).write_bytes(data)
    with pytest.raises(ArtifactError, match="no tokenizer of this project"):
        load_tokenizer(tmp_path)


def test_a_cut_file_is_refused_wherever_it_is_cut(tokenizer: ByteLevelBPE, tmp_path: Path) -> None:
    data = tokenizer.to_files()[TOKENIZER_JSON]
    for length in np.linspace(1, len(data) - 3, 20, dtype=int):
        (tmp_path / TOKENIZER_JSON).write_bytes(data[:length])
        with pytest.raises(ArtifactError):
            load_tokenizer(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: not there; run train_tokenizer"):
        load_tokenizer(tmp_path)


def test_a_text_with_little_to_merge_gives_a_smaller_vocabulary() -> None:
    tokenizer = ByteLevelBPE.train(["ab ab ab"], 4096)
    assert 263 < tokenizer.vocab_size < 270
    assert tokenizer.decode(tokenizer.encode_batch(["ab ab zz"])[0]) == "ab ab zz"
