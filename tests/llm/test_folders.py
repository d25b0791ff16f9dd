"""Folders that go out to transformers and come back: AutoTokenizer and generate are the oracles."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.artifact import ArtifactWriter
from llm.config import ModelConfig
from llm.data.chat import CHAT_FORMATS, make_format, render_chat, render_prompt
from llm.data.content import Message
from llm.data.packed import PackedSequences
from llm.errors import ArtifactError, ConfigError, DataError
from llm.exchange.folders import export_model, import_model, load_both
from llm.exchange.hf_tokenizer import exported_files
from llm.inference.generate import generate
from llm.inference.options import GenerationOptions
from llm.model.transformer import Transformer
from llm.model.weights import load_model, save_model
from llm.pack import pack
from llm.tokenizer.base import CONTROL_TOKENS, MARK, Tokenizer
from llm.tokenizer.bpe import ByteLevelBPE
from llm.tokenizer.characters import ByteTokenizer, CharacterTokenizer
from llm.tokenizer.load import load_tokenizer
from llm.tokenizer.sentencepiece import SentencePieceTokenizer
from llm.train_tokenizer import train_tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
pytest.importorskip("sentencepiece", reason="one of the kinds is learned by it")

CONTROL_PIECES = [
    *CONTROL_TOKENS, "<|", "|>", "end", " \n", "é", "\U0001f600", "_a 12", "\ufffd", "<0x41>",
    "<0x", "\u2581", "\u2581\u2581the", "<unk>", "<s>", "\0", "\0 \t\r\n", "  ", "      ",
    " parser", "parse",
]  # fmt: skip
UNMARKED = st.characters(exclude_characters=MARK, exclude_categories=["Cs"])
TEXTS = st.lists(st.sampled_from(CONTROL_PIECES) | st.text(UNMARKED, max_size=8), max_size=6).map(
    "".join
)
LLAMA = ModelConfig(num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, d_ff=64)


def make_model(folder: Path, tokenizer: Tokenizer, config: ModelConfig = LLAMA) -> Path:
    """Save a drawn model with `tokenizer`."""
    model = Transformer(config, tokenizer.vocab_size, 64)
    model.initialize(torch.Generator().manual_seed(1))
    save_model(ArtifactWriter(folder), model, tokenizer.to_files())
    return folder


@pytest.fixture(scope="module")
def kinds(tokenizer: ByteLevelBPE, corpus: list[str]) -> dict[str, Tokenizer]:
    """A tokenizer of each kind."""
    return {
        "bpe": tokenizer,
        "bytes": ByteTokenizer(),
        "characters": CharacterTokenizer.train(corpus),
        "unigram": SentencePieceTokenizer.train(corpus, 600, "unigram"),
        "pieces": SentencePieceTokenizer.train(corpus, 600, "bpe"),
    }


@pytest.fixture(scope="module")
def theirs(kinds: dict[str, Tokenizer], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same tokenizers as AutoTokenizer loads them, after one more save and load there."""
    loaded: dict[str, Any] = {}
    for kind, tokenizer in kinds.items():
        folder = tmp_path_factory.mktemp(kind)
        for name, data in exported_files(tokenizer, 64).items():
            (folder / name).write_bytes(data)
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder / "again")
        loaded[kind] = transformers.AutoTokenizer.from_pretrained(folder / "again")
    return loaded


KINDS = pytest.mark.parametrize("kind", ["bpe", "bytes", "characters", "unigram", "pieces"])


@KINDS
@settings(max_examples=250)
@given(texts=st.lists(TEXTS, min_size=4, max_size=4))
def test_ids_of_any_text_are_ours_and_come_back(
    kinds: dict[str, Tokenizer], theirs: dict[str, Any], kind: str, texts: list[str]
) -> None:
    encoded = theirs[kind](texts)["input_ids"]
    assert encoded == kinds[kind].encode_batch(texts)
    assert not set().union(*encoded) & set(kinds[kind].control_ids)
    assert theirs[kind].batch_decode(encoded) == texts


MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXTS}
    ),
    min_size=1,
    max_size=3,
)


@KINDS
@settings(max_examples=60, deadline=None)
@given(messages=MESSAGES)
def test_the_chat_template_gives_our_ids_whatever_a_user_types(
    kinds: dict[str, Tokenizer], theirs: dict[str, Any], kind: str, messages: list[Message]
) -> None:
    ours, template = kinds[kind], theirs[kind].apply_chat_template
    assert template(messages, return_dict=False) == render_chat(messages, ours).ids
    prompt = template(messages, add_generation_prompt=True, return_dict=False)
    assert prompt == render_prompt(messages, ours)


@KINDS
def test_the_names_control_tokens_go_out_by_give_no_control_id_in_a_chat(
    kinds: dict[str, Tokenizer], theirs: dict[str, Any], kind: str
) -> None:
    names = sorted(theirs[kind].get_added_vocab())
    assert names == sorted(MARK + token for token in CONTROL_TOKENS)
    typed = "".join(names)
    ids = theirs[kind].apply_chat_template([{"role": "user", "content": typed}], return_dict=False)
    ours = kinds[kind]
    assert [index for index in ids if index in ours.control_ids] == [
        ours.bos_id,
        ours.user_id,
        ours.end_id,
    ]
    split = theirs[kind](typed, split_special_tokens=True)["input_ids"]
    assert not set(split) & set(ours.control_ids)


QUIZ = make_format(
    {"system": "{text}<|end|>", "user": "Q: {text}<|end|>", "assistant": "A: {text}<|end|>"}
)


def test_a_chat_format_added_to_the_table_is_rendered_saved_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_documents: Any, run_stage: Any
) -> None:
    monkeypatch.setitem(CHAT_FORMATS, "quiz", QUIZ)
    chat = [Message(role="user", content="2 + 2?"), Message(role="assistant", content="4")]
    documents = make_documents([chat], [chat])
    settings = {"kind": "bytes", "chat_format": "quiz"}
    folder, _ = run_stage(train_tokenizer, settings, out="tokenizer", documents=documents)
    tokenizer = load_tokenizer(folder)
    ids, mask = render_chat(chat, tokenizer)
    assert tokenizer.decode(ids) == "Q: 2 + 2?A: 4" and ids[0] == tokenizer.bos_id
    assert sum(mask) == 2, "the answer and its end"
    assert render_prompt(chat[:1], tokenizer) == ids[:-2]
    out, _ = run_stage(pack, {"seq_len": 32}, documents=documents, tokenizer=folder)
    packed = PackedSequences(out, "train").read([0])
    assert packed.tokens[0, : len(ids)].tolist() == ids
    assert packed.mask[0, : len(ids)].tolist() == mask
    export_model(make_model(tmp_path / "ours", tokenizer), tmp_path / "theirs")
    template = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs").apply_chat_template
    assert template(chat, return_dict=False) == ids
    prompt = template(chat[:1], add_generation_prompt=True, return_dict=False)
    assert prompt == render_prompt(chat[:1], load_both(tmp_path / "ours")[1])
    import_model(tmp_path / "theirs", tmp_path / "back")
    assert load_both(tmp_path / "back")[1].chat_format == "quiz"
    monkeypatch.delitem(CHAT_FORMATS, "quiz")
    with pytest.raises(ArtifactError, match="chat format: found 'quiz', expected one of turns"):
        render_chat(chat, tokenizer)


def test_a_role_of_none_of_ours_is_refused_by_the_template(theirs: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="a role other than system, user, assistant"):
        theirs["bpe"].apply_chat_template([{"role": "tool", "content": "x"}])


def test_a_character_outside_the_vocabulary_is_an_error_there_as_here(tmp_path: Path) -> None:
    tokenizer = CharacterTokenizer.train(["abc"], has_byte_fallback=False)
    for name, data in exported_files(tokenizer, 64).items():
        (tmp_path / name).write_bytes(data)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("cab")["input_ids"] == tokenizer.encode_batch(["cab"])[0]
    with pytest.raises(Exception, match="UNK"):
        theirs("cad")
    with pytest.raises(DataError):
        tokenizer.encode_batch(["cad"])


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"has_qk_norm": True},
        {"mlp": "geglu", "is_embedding_scaled": True},
        {
            "positions": "learned",
            "norm": "layernorm",
            "mlp": "gelu",
            "has_biases": True,
            "num_kv_heads": 4,
        },
    ],
    ids=["llama", "qwen3", "gemma", "gpt2"],
)
def test_an_exported_folder_answers_a_chat_as_ours_does(
    tmp_path: Path, tokenizer: ByteLevelBPE, change: dict[str, Any]
) -> None:
    config = ModelConfig(**{name: getattr(LLAMA, name) for name in SHAPE} | change)
    source = make_model(tmp_path / "ours", tokenizer, config)
    export_model(source, tmp_path / "theirs")
    names = {path.name for path in (tmp_path / "theirs").iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    controls = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert controls == (tokenizer.bos_id, tokenizer.end_id, tokenizer.pad_id)
    assert model.generation_config.eos_token_id == [tokenizer.end_id, tokenizer.bos_id]
    messages: list[Message] = [{"role": "user", "content": "What does parse_args return?"}]
    prompt = theirs.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=20)[0, prompt["input_ids"].shape[1] :]
    expected = generate(
        load_model(source),
        [render_prompt(messages, tokenizer)],
        GenerationOptions(max_new_tokens=20, stop_ids=(tokenizer.end_id, tokenizer.bos_id)),
    )[0]
    kept = [index for index in answer.tolist() if index not in (tokenizer.end_id, tokenizer.bos_id)]
    assert kept == expected


SHAPE = ("num_layers", "d_model", "num_heads", "num_kv_heads", "d_ff")


def test_the_scale_of_embeddings_goes_into_the_embedding_where_no_layout_has_it(
    tmp_path: Path, tokenizer: ByteLevelBPE
) -> None:
    config = replace(LLAMA, has_qk_norm=True, is_embedding_scaled=True)
    model = load_model(make_model(tmp_path / "ours", tokenizer, config)).eval()
    export_model(tmp_path / "ours", tmp_path / "theirs")
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    assert found.config.model_type == "qwen3" and not found.config.tie_word_embeddings
    tokens = torch.randint(7, tokenizer.vocab_size, (2, 30))
    with torch.no_grad():
        expected, logits = model(tokens), found(tokens).logits
        import_model(tmp_path / "theirs", tmp_path / "back")
        again = load_model(tmp_path / "back").eval()(tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again[..., : model.vocab_size], expected, rtol=1e-5, atol=1e-5)


def test_an_exported_folder_comes_back_as_it_was(tmp_path: Path, tokenizer: ByteLevelBPE) -> None:
    source = make_model(tmp_path / "ours", tokenizer)
    export_model(source, tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "back")
    for name in ("tokenizer.json", "model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    model, _ = load_both(tmp_path / "back")
    assert model.config.d_model == 32


def test_nothing_is_overwritten_and_nothing_half_written_stays(
    tmp_path: Path, tokenizer: ByteLevelBPE
) -> None:
    source = make_model(tmp_path / "ours", tokenizer)
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="there: exists; name a new folder"):
        export_model(source, tmp_path / "there")
    with pytest.raises(ConfigError, match="exists"):
        import_model(source, tmp_path / "there")
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be written"):
        export_model(source, tmp_path / "file" / "model")
    odd = make_model(tmp_path / "odd", tokenizer, ModelConfig(d_model=32, mlp="relu2", d_ff=64))
    with pytest.raises(ConfigError, match="no layout"):
        export_model(odd, tmp_path / "theirs")
    assert {path.name for path in tmp_path.iterdir()} == {"ours", "there", "file", "odd"}


def test_a_model_with_another_tokenizer_is_refused(tmp_path: Path, tokenizer: ByteLevelBPE) -> None:
    source = make_model(tmp_path / "ours", tokenizer)
    (source / "tokenizer.json").write_bytes(ByteTokenizer().to_files()["tokenizer.json"])
    with pytest.raises(ArtifactError, match="found a tokenizer of 263 tokens, expected the model"):
        export_model(source, tmp_path / "theirs")


def test_a_folder_without_a_fast_tokenizer_is_refused(
    tmp_path: Path, tokenizer: ByteLevelBPE
) -> None:
    export_model(make_model(tmp_path / "ours", tokenizer), tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: not there"):
        import_model(tmp_path / "theirs", tmp_path / "back")
    shutil.rmtree(tmp_path / "theirs")
    with pytest.raises(ArtifactError):
        import_model(tmp_path / "theirs", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_tokenizer_larger_than_the_model_is_refused(
    tmp_path: Path, tokenizer: ByteLevelBPE
) -> None:
    export_model(make_model(tmp_path / "small", ByteTokenizer()), tmp_path / "theirs")
    export_model(make_model(tmp_path / "large", tokenizer), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "tokenizer.json", tmp_path / "theirs" / "tokenizer.json")
    with pytest.raises(ArtifactError, match="the tokenizer's ids 263 to 599 have no vector"):
        import_model(tmp_path / "theirs", tmp_path / "back")


def test_the_card_says_what_holds_for_control_tokens(
    tmp_path: Path, tokenizer: ByteLevelBPE
) -> None:
    export_model(make_model(tmp_path / "ours", tokenizer), tmp_path / "theirs", dtype="bfloat16")
    card = (tmp_path / "theirs" / "README.md").read_text()
    assert "U+FDD0" in card and "bfloat16" in card and "LlamaForCausalLM" in card
    config = json.loads((tmp_path / "theirs" / "tokenizer_config.json").read_text())
    assert config["split_special_tokens"] is False
