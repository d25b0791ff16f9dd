"""Tokenizers others trained, as GPT-2, Llama-3 and Qwen have them; transformers is the oracle."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.artifact import ArtifactWriter
from llm.data.documents import Message
from llm.errors import ArtifactError
from llm.exchange.folders import export_model, import_model, load_both
from llm.exchange.import_tokenizer import import_tokenizer
from llm.finetune import finetune
from llm.inference.chat import main as chat_main
from llm.pack import pack
from llm.tokenizer.imported import ImportedTokenizer
from llm.tokenizer.load import load_tokenizer
from tests.llm.conftest import MakeDocuments, RunStage
from tests.llm.tokenizer_makers import BEGIN, train_library

transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")

FORMS = {"gpt2": "<|endoftext|>", "llama": "<|begin_of_text|>", "qwen3": None}


@pytest.fixture(scope="module")
def folders(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A drawn model of each family with its tokenizer, saved by transformers; Qwen's has room."""
    saved: dict[str, Path] = {}
    for form, begin in FORMS.items():
        folder = saved[form] = tmp_path_factory.mktemp(form)
        library = train_library(form, corpus)
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=library, bos_token=begin, eos_token=BEGIN[form]
        )
        fast.save_pretrained(folder)
        names: dict[str, int] = {"num_hidden_layers": 2, "hidden_size": 32}
        if form == "gpt2":
            names |= {"num_attention_heads": 4, "max_position_embeddings": 64}
        else:
            names |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
            names |= {"intermediate_size": 48, "max_position_embeddings": 64}
        config = transformers.AutoConfig.for_model(
            form, vocab_size=512 if form == "qwen3" else len(fast), **names
        )
        torch.manual_seed(1)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return saved


EACH_FORM = pytest.mark.parametrize("form", FORMS)
PIECES = ["<|endoftext|>", "<|user|>", "<tool_call>", "self._a", "é", "\U0001f600", "  \n", "12345"]


@EACH_FORM
@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.sampled_from(PIECES) | st.text("ab_' \n.é1", max_size=6), max_size=6))
def test_ids_are_those_of_transformers_and_every_byte_comes_back(
    folders: dict[str, Path], form: str, parts: list[str]
) -> None:
    text = "".join(parts)
    ours = import_tokenizer(folders[form])
    theirs = transformers.AutoTokenizer.from_pretrained(folders[form])
    ids = ours.encode_batch([text])[0]
    expected = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ids == expected
    assert ours.decode(ids) == text
    assert not set(ids) & set(ours.control_ids)
    assert int(ours.token_bytes[ids].sum()) == len(text.encode())


@EACH_FORM
def test_an_imported_model_answers_the_same_and_is_whole(
    folders: dict[str, Path], form: str, tmp_path: Path
) -> None:
    import_model(folders[form], tmp_path / "model")
    model, tokenizer = load_both(tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folders[form])
    num_stored = theirs.config.vocab_size
    tokens = torch.randint(0, num_stored, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, expected = model.eval()(tokens), theirs.eval()(tokens).logits
    assert torch.allclose(logits[..., :num_stored], expected, rtol=0, atol=1e-5)
    mean = theirs.get_input_embeddings().weight.mean(dim=0)
    if form == "qwen3":  # its spare vectors are taken
        assert model.vocab_size == num_stored
    else:
        assert model.vocab_size == num_stored + 6
        added = model.embedding.weight[num_stored : num_stored + 6]
        assert torch.allclose(added, mean.expand_as(added), atol=1e-7)
    begins = load_tokenizer(tmp_path / "model").bos_id
    if FORMS[form]:
        assert begins == 400
    assert len(set(tokenizer.control_ids)) == 7


def test_an_imported_tokenizer_goes_out_again_with_the_same_ids(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    import_model(folders["llama"], tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "theirs")
    ours = load_tokenizer(tmp_path / "model")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    text = "def <|begin_of_text|>(self):\n    <|user|> 12345"
    assert theirs(text)["input_ids"] == ours.encode_batch([text])[0]
    assert theirs.bos_token_id == ours.bos_id
    import_model(tmp_path / "theirs", tmp_path / "back")
    assert load_tokenizer(tmp_path / "back").control_ids == ours.control_ids


def test_long_texts_are_cut_where_no_token_ends_up_split(folders: dict[str, Path]) -> None:
    ours = import_tokenizer(folders["gpt2"])
    theirs = transformers.AutoTokenizer.from_pretrained(folders["gpt2"])
    text = "def parse(self, x):\n    return 'x'\n\n\n" * 3000
    expected = theirs(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert ours.encode_batch([text, "", "a"])[0] == expected


def test_an_imported_model_can_be_fine_tuned_and_talked_to(
    folders: dict[str, Path],
    tmp_path: Path,
    make_documents: MakeDocuments,
    run_stage: RunStage,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import_model(folders["gpt2"], tmp_path / "base")
    chats: list[list[Message]] = [
        [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}"}]
        for n in range(24)
    ]
    documents = make_documents(chats[:16], chats[16:])
    rows, _ = run_stage(
        pack, {"seq_len": 64}, out="rows", documents=documents, tokenizer=tmp_path / "base"
    )
    optimization = {"num_steps": 3, "warmup_steps": 1, "global_batch_size": 4}
    chat, _ = run_stage(finetune, optimization, out="chat", base=tmp_path / "base", sequences=rows)
    load_both(chat)
    monkeypatch.setattr("sys.stdin", io.StringIO("say 1\nsay 2\n"))
    assert chat_main([str(chat), "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.count("\n") == 2


def change_json(folder: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Copy a tokenizer to `target`, changed."""
    parts = json.loads((folder / "tokenizer.json").read_text())
    change(parts)
    target.mkdir()
    (target / "tokenizer.json").write_text(json.dumps(parts))
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "found WordLevel"),
        (
            {"normalizer": {"type": "Lowercase"}},
            "normalizer: found Lowercase, .* expected none or NFC",
        ),
        ({"decoder": None}, "decoder: expected ByteLevel"),
        ({"pre_tokenizer": None}, "pre_tokenizer: expected ByteLevel once"),
        (
            {
                "pre_tokenizer": {
                    "type": "ByteLevel",
                    "add_prefix_space": True,
                    "trim_offsets": True,
                    "use_regex": True,
                }
            },
            "which loses or adds characters",
        ),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}, "255 of the 256 bytes"),
        ({"model": 3}, "the library cannot read it"),
        ({"added_tokens": {}}, "the library cannot read it"),
    ],
)
def test_a_tokenizer_that_does_not_keep_every_byte_is_refused(
    folders: dict[str, Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = change_json(folders["gpt2"], tmp_path / "bad", lambda parts: parts.update(change))
    with pytest.raises(ArtifactError, match=message):
        import_tokenizer(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 100_000, b'{"version": "1.0"}'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        import_tokenizer(tmp_path)


def test_what_is_saved_loads_again_and_damage_is_named(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    ours = import_tokenizer(folders["qwen3"])
    assert isinstance(ours, ImportedTokenizer)
    writer = ArtifactWriter(tmp_path / "tokenizer")
    for name, data in ours.padded(512).to_files().items():
        writer.write_bytes(name, data)
    loaded = load_tokenizer(tmp_path / "tokenizer")
    assert (loaded.vocab_size, loaded.control_ids) == (512, ours.control_ids)
    assert loaded.encode_batch(["a <tool_call> b"]) == ours.encode_batch(["a <tool_call> b"])
    fields = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())
    del fields["control_tokens"]
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(ArtifactError, match="no imported tokenizer"):
        load_tokenizer(tmp_path / "tokenizer")
