"""Vocabularies of pieces with byte fallback, as Gemma, Llama 2 and SentencePiece publish them.

transformers is the oracle for `tokenizer.json`, the processor of SentencePiece for
`tokenizer.model`.
"""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as LibraryTokenizer

from llm.errors import ArtifactError, ConfigError
from llm.exchange.folders import export_model, import_model, load_both
from llm.exchange.gguf import export_gguf
from llm.exchange.import_tokenizer import import_tokenizer
from llm.exchange.sentencepiece_model import read_piece_model
from llm.inference.chat import main as chat_main
from llm.tokenizer.base import Tokenizer
from llm.tokenizer.load import load_tokenizer
from tests.llm.tokenizer_makers import FRAGMENTS

transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
sentencepiece = pytest.importorskip("sentencepiece", reason="it trains what is published so")

BLANK = "\u2581"
# Of what U+2581 and a vocabulary's own names become there, a text cannot be had back.
ODD = (BLANK, "<unk>", "<s>", "</s>", "<pad>", "<0x41>")
PIECES = [
    *(piece for piece in FRAGMENTS if not any(odd in piece for odd in ODD)), "<tool>", "<0x4", "  ",
    "parser", " parser", " self._actions", "\n    ", "group", "s>", "<s", "12345",
]  # fmt: skip
PLAIN = st.characters(exclude_characters=BLANK, exclude_categories=["Cs"])
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(PLAIN, max_size=6), max_size=6).map("".join)
MANY = st.lists(TEXTS, min_size=4, max_size=4)

Train = Callable[..., bytes]


@pytest.fixture(scope="module")
def train(corpus: list[str]) -> Train:
    """A function that trains with SentencePiece alone and returns `tokenizer.model`."""

    def train(algorithm: str, **options: Any) -> bytes:
        model = io.BytesIO()
        defaults = {
            "vocab_size": 700, "hard_vocab_limit": False, "byte_fallback": True, "minloglevel": 2,
            "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
            "user_defined_symbols": ["<tool>"],
            "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3,
        }  # fmt: skip
        sentences = (line for text in corpus for line in text.split("\n"))
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences, model_writer=model, model_type=algorithm,
            **defaults | options,
        )  # fmt: skip
        return model.getvalue()

    return train


@pytest.fixture(scope="module")
def folders(train: Train, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One vocabulary as Gemma, as Llama 2 and as Llama 2 before version 4.34 have it."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=train("bpe"))
    vocabulary = {processor.id_to_piece(index): index for index in range(len(processor))}
    vocabulary |= {"<s": len(vocabulary)}  # that merges to a control token's name
    merges = transformers.tokenization_utils_base.generate_merges(vocabulary)
    assert ("<s", ">") in merges
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    legacy = LibraryTokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    legacy.normalizer = normalizers.Sequence(
        [normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)]
    )
    legacy.decoder = decoders.Sequence(
        [
            decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )  # fmt: skip
    made = {
        "gemma": transformers.GemmaTokenizer(vocabulary, merges, mask_token="<mask>", **names),
        "llama": transformers.LlamaTokenizer(vocabulary, merges, **names),
        "legacy": transformers.PreTrainedTokenizerFast(tokenizer_object=legacy, **names),
    }
    for form, tokenizer in made.items():
        tool = AddedToken("<tool>", normalized=False)
        tokenizer.add_tokens([tool])
        made[form].save_pretrained(folder := tmp_path_factory.mktemp(form))
        made[form] = folder
    return made


def ids_of(theirs: Any, texts: list[str]) -> list[list[int]]:
    return theirs(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def hold(tokenizer: Tokenizer, texts: list[str], encoded: list[list[int]]) -> None:
    """Check what holds of every tokenizer here."""
    for text, ids in zip(texts, encoded, strict=True):
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert not set(ids) & set(tokenizer.control_ids)
        assert int(tokenizer.token_bytes[ids].sum()) == len(text.encode())


@pytest.mark.parametrize(
    ("form", "options"), [("gemma", {}), ("llama", {"add_prefix_space": False})]
)
def test_ids_are_those_of_transformers(
    folders: dict[str, Path], form: str, options: dict[str, bool]
) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folders[form], **options)
    ours = import_tokenizer(folders[form])

    @settings(max_examples=250)
    @given(MANY)
    def check(texts: list[str]) -> None:
        encoded = ours.encode_batch(texts)
        assert encoded == ids_of(theirs, texts)
        hold(ours, texts, encoded)

    check()
    assert theirs.bos_token_id == ours.bos_id == 2


@pytest.mark.parametrize("form", ["llama", "legacy"])
def test_the_blank_that_llama_puts_first_is_left_to_who_writes_the_text(
    folders: dict[str, Path], form: str, corpus: list[str]
) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folders[form])
    ours = import_tokenizer(folders[form])
    texts = [text.lstrip() for text in corpus]
    encoded = ours.encode_batch([f" {text}" for text in texts])
    assert encoded == ids_of(theirs, texts)
    hold(ours, [f" {text}" for text in texts], encoded)


@pytest.mark.parametrize("form", ["gemma", "llama", "legacy"])
def test_what_stands_for_a_blank_or_names_a_token_comes_back_too(
    folders: dict[str, Path], form: str
) -> None:
    ours = import_tokenizer(folders[form])
    texts = [
        *ODD, *FRAGMENTS, f"a{BLANK}{BLANK}b {BLANK}the", " <s>", "</s> <s>x", "<0x0A><0xC3><0xA9>",
    ]  # fmt: skip
    hold(ours, texts, ours.encode_batch(texts))


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True, "split_digits": True, "split_by_whitespace": False},
    ],
    ids=["llama", "gemma", "words"],
)
def test_a_published_model_of_sentencepiece_gives_its_ids(
    train: Train, algorithm: str, options: dict[str, bool], tmp_path: Path
) -> None:
    model = train(algorithm, **options)
    (tmp_path / "tokenizer.model").write_bytes(model)
    ours = import_tokenizer(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    prefix = " " if options.get("add_dummy_prefix", True) else ""

    @settings(max_examples=250)
    @given(MANY)
    def check(texts: list[str]) -> None:
        texts = [text.replace("\0", "") for text in texts]  # where its processor stops
        if "remove_extra_whitespaces" in options:
            texts = [" ".join(filter(None, text.split(" "))) for text in texts]
        texts = [prefix + text for text in texts if text]
        encoded = ours.encode_batch(texts)
        assert encoded == theirs.encode([text.removeprefix(prefix) for text in texts])
        hold(ours, texts, encoded)

    check()
    assert ours.bos_id == 2
    texts = [*ODD, *FRAGMENTS, "a\0b", "  a   b  "]
    hold(ours, texts, ours.encode_batch(texts))


def test_a_published_model_gives_the_ids_of_transformers(
    train: Train, tmp_path: Path, corpus: list[str]
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train("bpe"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GemmaTokenizer"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert import_tokenizer(tmp_path).encode_batch(corpus) == ids_of(theirs, corpus)


def test_pieces_scores_and_types_are_read_as_the_library_reads_them(train: Train) -> None:
    data = train("unigram")
    processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    model = read_piece_model(data)
    assert len(model.pieces) == len(processor)
    for index, found in enumerate(model.pieces):
        assert found.piece == processor.id_to_piece(index)
        assert found.score == processor.get_score(index)
        assert (found.type.name == "CONTROL") == processor.is_control(index)
        assert (found.type.name == "BYTE") == processor.is_byte(index)
    assert (model.bos_id, model.begin) == (processor.bos_id(), "<s>")


@pytest.mark.parametrize(
    ("algorithm", "options", "message"),
    [
        ("bpe", {"normalization_rule_name": "nmt_nfkc"},
         "normalization_rule_name: found nmt_nfkc, which changes texts; expected identity. Train"),
        ("bpe", {"byte_fallback": False}, "byte_fallback: found false, expected true"),
        ("char", {}, "model_type: found char, expected unigram or bpe"),
        ("unigram", {"user_defined_symbols": [BLANK * 2]}, "user_defined_symbols: found some with"),
    ],
)  # fmt: skip
def test_a_model_that_changes_or_loses_text_is_refused_by_the_name_of_its_option(
    train: Train, tmp_path: Path, algorithm: str, options: dict[str, Any], message: str
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train(algorithm, **options))
    with pytest.raises(ArtifactError, match=rf"tokenizer\.model: .*{message}"):
        import_tokenizer(tmp_path)


def test_a_damaged_model_is_an_error_or_keeps_every_byte(train: Train, tmp_path: Path) -> None:
    data, rng = train("unigram"), random.Random(1)
    bad = [b"", b"x" * 100, b"IQ== 0\nIg== 1\n", data[: len(data) // 2], data[:-3] + b"\xff" * 3]
    for _ in range(60):
        changed = bytearray(data)
        for place in rng.choices(range(len(data)), k=3):
            changed[place] = rng.randrange(256)
        bad.append(bytes(changed))
    num_refused = 0
    for content in bad:
        (tmp_path / "tokenizer.model").write_bytes(content)
        try:
            ours = import_tokenizer(tmp_path)
        except ArtifactError as error:
            assert "tokenizer.model" in str(error)
            num_refused += 1
        else:
            hold(ours, list(FRAGMENTS), ours.encode_batch(FRAGMENTS))
    assert num_refused >= 4


def change(folder: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Copy a tokenizer to `target`, changed."""
    parts = json.loads((folder / "tokenizer.json").read_text())
    change(parts)
    (target / "tokenizer.json").write_text(json.dumps(parts))
    return target


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"normalizer": {"type": "NFKC"}}, "normalizer: found NFKC, which changes texts; .* Train"),
        ({"pre_tokenizer": {"type": "WhitespaceSplit"}}, "pre_tokenizer: found .*WhitespaceSplit"),
        ({"model": {"byte_fallback": False}}, "model.byte_fallback: found False, expected True"),
        ({"model": {"ignore_merges": True}}, "model.ignore_merges: found True"),
        ({"model": {"vocab": {"a": 0}, "merges": [], "unk_token": None}}, "256 of the 256 bytes"),
        ({"model": {"dropout": 0.5}}, "model.dropout: found 0.5, expected none"),
    ],
)
def test_pieces_that_do_not_keep_every_byte_are_refused(
    folders: dict[str, Path], tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    def apply(parts: dict[str, Any]) -> None:
        model = parts["model"] | changed.get("model", {})
        parts.update(changed | {"model": model})

    with pytest.raises(ArtifactError, match=message):
        import_tokenizer(change(folders["gemma"], tmp_path, apply))


def test_a_model_of_gemma_comes_in_answers_a_chat_and_goes_out_again(
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = folders["gemma"]
    names = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    names |= {"intermediate_size": 48, "max_position_embeddings": 64}
    num_tokens = len(transformers.AutoTokenizer.from_pretrained(source))
    config = transformers.AutoConfig.for_model(
        "gemma", vocab_size=num_tokens, num_hidden_layers=2, hidden_size=32, **names
    )
    torch.manual_seed(1)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    theirs.save_pretrained(source)
    import_model(source, tmp_path / "model")
    model, tokenizer = load_both(tmp_path / "model")
    tokens = torch.tensor(tokenizer.encode_batch(["    return self._parser, <s> \u2581"]))
    with torch.no_grad():
        logits, expected = model.eval()(tokens), theirs.eval()(tokens).logits
    assert torch.allclose(logits[..., :num_tokens], expected, rtol=0, atol=1e-5)  # of fp32
    monkeypatch.setattr("sys.stdin", io.StringIO("say 1\n"))
    assert chat_main([str(tmp_path / "model"), "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.endswith("\n")

    export_model(tmp_path / "model", tmp_path / "out")
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [*FRAGMENTS, *PIECES, f" a{BLANK}  b", "<s>typed</s>"]
    texts.remove("\ufdd0")  # see the model card
    assert exported(texts)["input_ids"] == tokenizer.encode_batch(texts)
    import_model(tmp_path / "out", tmp_path / "back")
    back = load_tokenizer(tmp_path / "back")
    assert back.control_ids == tokenizer.control_ids
    assert back.encode_batch(texts) == tokenizer.encode_batch(texts)

    pytest.importorskip("gguf")
    with pytest.raises(ConfigError, match=r"pieces with byte fallback.*use `--format hf`"):
        export_gguf(tmp_path / "model", tmp_path / "gguf")
