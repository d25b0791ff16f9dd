"""Models in the Hugging Face layouts; transformers is the oracle, on randomly drawn models.

Tolerance: both sides compute in fp32, in another order of sums; the logits drawn here are of size
1, so that 1e-5 is about a hundred roundings and any wrong weight is far outside.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm.artifact import ArtifactWriter
from llm.config import ModelConfig
from llm.errors import ArtifactError, ConfigError
from llm.exchange.huggingface import read_model, write_model
from llm.inference.generate import generate
from llm.inference.options import GenerationOptions
from llm.model.transformer import Transformer

transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")

VOCAB_SIZE = 101  # no multiple of 64, so that ours is padded inside
ROTARY = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 48,
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GPT2 = {"vocab_size": VOCAB_SIZE, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 4}
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2),
    "gpt2-narrow": ("gpt2", GPT2 | {"n_inner": 40, "n_layer": 3, "layer_norm_epsilon": 1e-3}),
    "gpt2-untied": ("gpt2", GPT2 | {"tie_word_embeddings": False}),
    "llama": ("llama", ROTARY),
    "llama3-rope": ("llama", ROTARY | {"rope_parameters": LLAMA3_ROPE}),
    "llama-biases": ("llama", ROTARY | {"attention_bias": True, "mlp_bias": True}),
    "llama-multi-query": ("llama", ROTARY | {"num_key_value_heads": 1, "head_dim": 16}),
    "llama-tied": ("llama", ROTARY | {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen3": ("qwen3", ROTARY | {"head_dim": 12}),
    "qwen3-windows": (
        "qwen3",
        ROTARY
        | {
            "head_dim": 8,
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "gemma": ("gemma", ROTARY | {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma-theta": (
        "gemma",
        ROTARY
        | {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
    ),
}
ROPE_OURS = {"num_layers": 2, "d_model": 32, "num_heads": 4, "num_kv_heads": 2, "d_ff": 72}
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "gpt2",
        ROPE_OURS
        | {"num_kv_heads": 4, "positions": "learned", "norm": "layernorm", "mlp": "gelu"}
        | {"has_biases": True, "dropout": 0.1},
    ),
    "llama": ("llama", ROPE_OURS | {"num_kv_heads": 1, "init": "zero"}),
    "llama-stretched": (
        "llama",
        ROPE_OURS
        | {"rope_scaling": "llama3", "rope_original_seq_len": 16, "rope_theta": 500_000.0}
        | {"tie_embeddings": False, "has_biases": True},
    ),
    "qwen3": ("qwen3", ROPE_OURS | {"has_qk_norm": True, "head_dim": 16}),
    "qwen3-windows": (
        "qwen3",
        ROPE_OURS
        | {"has_qk_norm": True, "num_layers": 3, "sliding_window": 5, "full_attention_every": 3},
    ),
    "gemma": ("gemma", ROPE_OURS | {"mlp": "geglu", "is_embedding_scaled": True}),
}


def their_model(name: str) -> Any:
    """A model of transformers whose every weight is drawn, so that none is at its default."""
    kind, settings = THEIRS[name]
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config)
    return draw(model).eval()


def our_model(name: str) -> Transformer:
    """A model of ours whose every weight is drawn."""
    model = Transformer(ModelConfig(**OURS[name][1]), VOCAB_SIZE, 48)
    with torch.no_grad():
        model.initialize(torch.Generator())  # padding rows are zero
    weights = draw(model).state_dict()
    for key in ("embedding.weight", "head.weight"):
        weights[key][VOCAB_SIZE:] = 0.0
    return model.eval()


@torch.no_grad()
def draw(model: Any) -> Any:
    """Draw all weights so that logits come out of size 1."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        around = 0.0 if parameter.ndim == 2 else parameter.mean().round()
        parameter.copy_(around + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def export(model: Transformer, folder: Path, dtype: str = "float32") -> Path:
    """Write `model` into a new folder."""
    write_model(ArtifactWriter(folder), model, dtype)
    return folder


@torch.no_grad()
def assert_same(ours: Transformer, theirs: Any) -> None:
    """Compare logits, and 20 greedy tokens of each of three prompts."""
    tokens = torch.randint(0, VOCAB_SIZE, (3, 24), generator=torch.Generator().manual_seed(2))
    expected = theirs(tokens).logits
    assert 0.2 < expected.std() < 20
    assert torch.allclose(ours.eval()(tokens), expected, rtol=0, atol=1e-5)
    prompts = tokens[:, :8]
    greedy = theirs.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=20,
        min_new_tokens=20,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert generate(ours, prompts.tolist(), GenerationOptions(max_new_tokens=20)) == [
        row[8:] for row in greedy.tolist()
    ]


@pytest.mark.parametrize("name", THEIRS)
def test_a_model_of_transformers_answers_the_same_here_and_comes_back_whole(
    name: str, tmp_path: Path
) -> None:
    theirs = their_model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = read_model(tmp_path / "theirs")
    assert_same(ours, theirs)
    back = transformers.AutoModelForCausalLM.from_pretrained(export(ours, tmp_path / "back"))
    assert type(back) is type(theirs)
    for key, weight in theirs.state_dict().items():
        # Gemma's norms are stored less one, which rounds the last bits
        assert torch.allclose(back.state_dict()[key], weight, rtol=0, atol=1e-7), key


@pytest.mark.parametrize("name", OURS)
def test_a_model_of_ours_answers_the_same_in_transformers_and_comes_back_bit_equal(
    name: str, tmp_path: Path
) -> None:
    ours = our_model(name)
    folder = export(ours, tmp_path / "model")
    assert json.loads((folder / "config.json").read_text())["model_type"] == OURS[name][0]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert_same(ours, theirs)
    back = read_model(folder)
    slack = 1e-7 if name == "gemma" else 0.0  # its norms are stored less one, which rounds
    for mine, stored in zip(ours.parameters(), back.parameters(), strict=True):
        assert torch.allclose(stored, mine, rtol=0, atol=slack)
    assert (back.vocab_size, back.seq_len) == (VOCAB_SIZE, 48)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small Llama of transformers, saved."""
    their_model("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def change_tensors(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replace, add or (None) remove tensors in a saved model."""
    path = folder / "model.safetensors"
    tensors = load_file(path) | change
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, path, metadata={"format": "pt"})


def change_config(folder: Path, change: dict[str, Any]) -> None:
    """Set keys of a saved `config.json`."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act: found 'gelu', allowed: silu"),
        ("llama", {"hidden_size": "32"}, "hidden_size: found '32', expected a whole number"),
        ("llama", {"hidden_size": True}, "hidden_size: found True, expected a whole number"),
        ("llama", {"hidden_size": 1 << 40}, "hidden_size: found 1099511627776, expected >= 1"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers: found 1000000000, expected"),
        ("llama", {"num_attention_heads": [4]}, "num_attention_heads: found [4]"),
        ("llama", {"hidden_size": None}, "hidden_size: missing"),
        ("llama", {"mlp_bias": True}, "mlp_bias: found True, expected False as attention_bias"),
        ("llama", {"rope_parameters": "fast"}, "rope_parameters: found 'fast'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
            "rope_parameters.rope_type: found 'yarn', allowed: default, llama3",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
            "rope_parameters.low_freq_factor: missing",
        ),
        (
            "llama",
            {"partial_rotary_factor": 0.5},
            "rope_parameters.partial_rotary_factor: found 0.5, allowed: 1",
        ),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config: found one"),
        ("llama", {"num_key_value_heads": 3}, "num_kv_heads: found 3"),
        ("llama", {"model_type": "mamba"}, "model_type: found 'mamba', expected one of gpt2"),
        ("llama", {"model_type": 7}, "model_type: found 7"),
        ("gpt2", {"activation_function": "gelu"}, "activation_function: found 'gelu'"),
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx: found True, allowed: False",
        ),
        (
            "qwen3",
            {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True},
            "layer_types: found ['full_attention', 'sliding_attention']",
        ),
        ("qwen3", {"layer_types": "full"}, "layer_types: found 'full'"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention: found True"),
    ],
)
def test_a_setting_we_cannot_express_is_named(
    tmp_path: Path, kind: str, change: dict[str, Any], message: str
) -> None:
    their_model(kind).save_pretrained(tmp_path)
    change_config(tmp_path, change)
    with pytest.raises(ArtifactError) as caught:
        read_model(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "{", "\xff", "[" * 100_000, '{"model_type": null}'])
def test_a_config_that_is_none_is_named(folder: Path, content: str) -> None:
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ArtifactError, match=r"config\.json"):
        read_model(folder)


def test_every_tensor_that_does_not_fit_is_named(folder: Path) -> None:
    change_tensors(
        folder,
        {
            "model.norm.weight": None,
            "model.layers.0.mlp.router.weight": torch.zeros(3),
            "model.layers.1.mlp.up_proj.weight": torch.zeros(4, 4),
        },
    )
    with pytest.raises(ArtifactError) as caught:
        read_model(folder)
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "model.layers.0.mlp.router.weight: unknown",
        "model.layers.1.mlp.up_proj.weight: found shape [4, 4], expected [72, 32]",
        "model.norm.weight: missing",
    ]


def test_weights_that_are_no_floats_are_refused(folder: Path) -> None:
    change_tensors(folder, {"model.norm.weight": torch.zeros(32, dtype=torch.int8)})
    with pytest.raises(ArtifactError, match=r"model\.norm\.weight: found type I8, expected one of"):
        read_model(folder)


@pytest.mark.parametrize("is_same", [True, False])
def test_a_tied_head_may_be_stored_twice_but_not_differ(tmp_path: Path, is_same: bool) -> None:
    theirs = their_model("llama-tied")
    theirs.save_pretrained(tmp_path)
    head = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(tmp_path, {"lm_head.weight": head if is_same else head + 1})
    if is_same:
        assert_same(read_model(tmp_path), theirs)
    else:
        with pytest.raises(ArtifactError, match=r"lm_head\.weight: found other weights than"):
            read_model(tmp_path)


def test_weights_in_several_files_are_read(tmp_path: Path) -> None:
    theirs = their_model("qwen3")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(read_model(tmp_path), theirs)


@pytest.mark.parametrize(
    "place", ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "..", "a.bin"]
)
def test_an_index_cannot_point_outside_its_folder(folder: Path, place: str) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": place}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match="expected the name of a safetensors file beside it"):
        read_model(folder)


@pytest.mark.parametrize("weights", ["gone", "pickled", "cut", "no map", "shard gone"])
def test_weights_that_cannot_be_read_are_named(folder: Path, weights: str) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.unlink()
    if weights == "pickled":
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    if weights == "cut":
        path.write_bytes(data[:-5])
    if weights in ("no map", "shard gone"):
        index = {} if weights == "no map" else {"weight_map": {"a": "b.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    message = {
        "gone": "found neither, expected model.safetensors",
        "pickled": "found only pytorch_model.bin, pickled, which can run code",
        "cut": "model.safetensors: no readable safetensors file",
        "no map": "weight_map: expected tensors with their files",
        "shard gone": "b.safetensors: no readable safetensors file",
    }
    with pytest.raises(ArtifactError, match=message[weights]):
        read_model(folder)


def test_old_files_are_read_without_prefix_and_with_masks_and_old_keys(tmp_path: Path) -> None:
    theirs = their_model("gpt2")
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 48, 48).tril()
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_hidden_layers"] = config.pop("n_layer")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same(read_model(tmp_path), theirs)


def test_rope_settings_are_read_where_older_files_have_them(tmp_path: Path) -> None:
    theirs = their_model("llama3-rope")
    theirs.save_pretrained(tmp_path)
    old = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    change_config(tmp_path, {"rope_parameters": None, "rope_scaling": old, "rope_theta": 10_000.0})
    assert_same(read_model(tmp_path), theirs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_comes_in_as_fp32(tmp_path: Path, dtype: str) -> None:
    their_model("gemma").to(getattr(torch, dtype)).save_pretrained(tmp_path)
    ours = read_model(tmp_path)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    load = transformers.AutoModelForCausalLM.from_pretrained
    assert_same(ours, load(tmp_path, dtype=torch.float32).eval())


def test_bf16_goes_out_rounded_once(tmp_path: Path) -> None:
    ours = our_model("gpt2")
    folder = export(ours, tmp_path / "model", "bfloat16")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.dtype == torch.bfloat16
    for mine, stored in zip(ours.parameters(), read_model(folder).parameters(), strict=True):
        assert torch.equal(mine.bfloat16().float(), stored)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp": "relu2"}, "llama: model.mlp: found relu2, expected swiglu"),
        ({"is_causal": False}, "llama: model.is_causal: found False, expected True"),
        ({"logit_soft_cap": 30.0}, "llama: model.logit_soft_cap: found 30.0, expected 0.0"),
        ({"sliding_window": 8}, "qwen3: model.has_qk_norm: found False, expected True"),
        ({"norm": "layernorm"}, "llama: model.norm: found layernorm, expected rmsnorm"),
        ({"has_qk_norm": True, "has_biases": True}, "qwen3: model.has_biases: found True"),
    ],
)
def test_a_model_no_layout_can_hold_is_refused_with_what_hinders_each(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    model = Transformer(ModelConfig(**ROPE_OURS | change), VOCAB_SIZE, 16)
    with pytest.raises(ConfigError) as caught:
        export(model, tmp_path / "model")
    assert message in str(caught.value)
    assert not list((tmp_path / "model").iterdir())


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dtype: found 'int4', expected one of float32, bfloat16"):
        export(our_model("llama"), tmp_path / "model", "int4")
