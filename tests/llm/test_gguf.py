"""GGUF: read back by llama.cpp's own reader, and run by a forward pass in numpy.

There is no llama.cpp here. The forward pass below is written from what llama.cpp computes for each
architecture and reads nothing but the file; it agrees with our model within 1e-4, since it works in
fp64 where the model works in fp32.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from llm.artifact import ArtifactWriter
from llm.config import ModelConfig
from llm.errors import ConfigError
from llm.exchange.gguf import export_gguf
from llm.model.transformer import Transformer
from llm.model.weights import load_model, save_model
from llm.tokenizer.base import MARK
from llm.tokenizer.bpe import ByteLevelBPE
from llm.tokenizer.characters import ByteTokenizer

gguf = pytest.importorskip("gguf", reason="the package gguf reads what is written")

BASE = {"num_layers": 2, "d_model": 32, "num_heads": 4, "num_kv_heads": 2, "d_ff": 72}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-stretched": {
        "rope_scaling": "llama3",
        "rope_original_seq_len": 16,
        "rope_theta": 50_000.0,
        "tie_embeddings": False,
        "head_dim": 12,
    },
    "llama-biases": {"has_biases": True, "num_kv_heads": 1},
    "qwen3": {"has_qk_norm": True, "head_dim": 16},
    "gemma": {"mlp": "geglu", "is_embedding_scaled": True, "head_dim": 16},
    "gpt2": {
        "positions": "learned",
        "norm": "layernorm",
        "mlp": "gelu",
        "has_biases": True,
        "num_kv_heads": 4,
    },
}
# What llama.cpp's conversion writes for the same model, beside general.* and what names the file
CONVERSION_KEYS = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
}
ROPE_KEYS = {
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
    "attention.key_length",
    "attention.value_length",
}
TOKENIZER_KEYS = {
    "model",
    "pre",
    "tokens",
    "token_type",
    "merges",
    "bos_token_id",
    "eos_token_id",
    "padding_token_id",
    "add_bos_token",
}
Array = npt.NDArray[np.float64]


@pytest.fixture
def make(tmp_path: Path, tokenizer: ByteLevelBPE) -> Any:
    """Return a function that saves a drawn model with `tokenizer` and exports it."""

    def make(change: dict[str, Any], dtype: str = "float32") -> tuple[Transformer, Any]:
        model = Transformer(ModelConfig(**BASE | change), tokenizer.vocab_size, 48)
        model.initialize(torch.Generator())
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                drawn = 0.2 * torch.randn(parameter.shape, generator=generator)
                parameter.add_(drawn)
        save_model(ArtifactWriter(tmp_path / "model"), model, tokenizer.to_files())
        export_gguf(tmp_path / "model", tmp_path / "out", dtype=dtype)
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.gguf"]
        reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
        return load_model(tmp_path / "model").eval(), reader

    return make


def values(reader: Any) -> dict[str, Any]:
    """The metadata of a file."""
    return {name: field.contents() for name, field in reader.fields.items()}


def tensors(reader: Any) -> dict[str, Array]:
    """The tensors of a file, in the order of axes that torch has."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        for tensor in reader.tensors
    }


class Runner:
    """What llama.cpp computes for the four architectures, from the file alone."""

    def __init__(self, reader: Any) -> None:
        self.all, self.weights = values(reader), tensors(reader)
        self.arch: str = self.all["general.architecture"]

    def key(self, name: str, default: Any = None) -> Any:
        return self.all.get(f"{self.arch}.{name}", default)

    def run(self, tokens: list[int]) -> Array:
        weights, x = self.weights, self.weights["token_embd.weight"][tokens]  # (T, C)
        if self.arch == "gemma":
            x = x * np.sqrt(x.shape[-1])
        if self.arch == "gpt2":
            x = x + weights["position_embd.weight"][: len(tokens)]
        for layer in range(self.key("block_count")):
            x = x + self.attend(f"blk.{layer}.", self.norm(f"blk.{layer}.attn_norm", x))
            x = x + self.feed(f"blk.{layer}.", self.norm(f"blk.{layer}.ffn_norm", x))
        head = weights.get("output.weight", weights["token_embd.weight"])
        return self.norm("output_norm", x) @ head.T

    def linear(self, name: str, x: Array) -> Array:
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)

    def norm(self, name: str, x: Array) -> Array:
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias", 0.0)
        epsilon = self.key("attention.layer_norm_rms_epsilon")
        if epsilon is None:
            x = x - x.mean(-1, keepdims=True)
            epsilon = self.key("attention.layer_norm_epsilon")
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * weight + bias

    def attend(self, block: str, x: Array) -> Array:
        H, K = self.key("attention.head_count"), self.key("attention.head_count_kv")
        T = len(x)
        if self.arch == "gpt2":
            q, k, v = np.split(self.linear(f"{block}attn_qkv", x), 3, axis=-1)
        else:
            q, k, v = (self.linear(f"{block}attn_{part}", x) for part in "qkv")
        q, k, v = (part.reshape(T, heads, -1) for part, heads in ((q, H), (k, K), (v, K)))
        if self.arch == "qwen3":
            q, k = self.norm(f"{block}attn_q_norm", q), self.norm(f"{block}attn_k_norm", k)
        if self.arch != "gpt2":
            q, k = self.rotate(q), self.rotate(k)
        k, v = (np.repeat(part, H // K, axis=1) for part in (k, v))
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1])
        scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        mixed = np.einsum("hts,shd->thd", shares, v).reshape(T, -1)
        return self.linear(f"{block}attn_output", mixed)

    def rotate(self, x: Array) -> Array:
        """Turn pairs of channels: neighbors in llama, halves apart in qwen3 and gemma."""
        num_pairs = self.key("rope.dimension_count") // 2
        frequency = self.key("rope.freq_base") ** -(np.arange(num_pairs) / num_pairs)
        frequency = frequency / self.weights.get("rope_freqs.weight", 1.0)
        turn = np.exp(1j * np.arange(len(x))[:, None] * frequency)[:, None]  # (T, 1, D/2)
        if self.arch == "llama":
            pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
            return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)
        pairs = (x[..., :num_pairs] + 1j * x[..., num_pairs:]) * turn
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    def feed(self, block: str, x: Array) -> Array:
        up = self.linear(f"{block}ffn_up", x)
        if self.arch == "gpt2":
            return self.linear(f"{block}ffn_down", gelu(up))
        gate = self.linear(f"{block}ffn_gate", x)
        bent = gelu(gate) if self.arch == "gemma" else gate / (1 + np.exp(-gate))
        return self.linear(f"{block}ffn_down", bent * up)


def gelu(x: Array) -> Array:
    """The tanh form."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("name", MODELS)
def test_a_forward_pass_from_the_file_alone_gives_our_logits(name: str, make: Any) -> None:
    model, reader = make(MODELS[name])
    tokens = torch.randint(0, model.vocab_size, (24,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = model(tokens[None])[0].double().numpy()
    assert 0.2 < expected.std() < 50
    runner = Runner(reader)
    assert runner.arch == name.split("-")[0]
    np.testing.assert_allclose(runner.run(tokens.tolist()), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_the_file_says_what_llama_cpp_reads(name: str, make: Any) -> None:
    model, reader = make(MODELS[name])
    found, arch = values(reader), name.split("-")[0]
    needed = CONVERSION_KEYS | (
        {"attention.layer_norm_epsilon"} if arch == "gpt2" else ROPE_KEYS | {"rope.freq_base"}
    )
    assert {f"{arch}.{key}" for key in needed} <= found.keys()
    assert {f"tokenizer.ggml.{key}" for key in TOKENIZER_KEYS} <= found.keys()
    assert found["general.file_type"] == gguf.LlamaFileType.ALL_F32
    assert found[f"{arch}.context_length"] == 48
    number = next(key for key, other in gguf.MODEL_ARCH_NAMES.items() if other == arch)
    allowed = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[number]}
    for tensor in reader.tensors:
        parts = tensor.name.removesuffix(".weight").removesuffix(".bias").split(".")
        generic = ".".join("{bid}" if part.isdigit() else part for part in parts)
        assert generic in allowed, tensor.name
    num_weights = sum(int(tensor.n_elements) for tensor in reader.tensors)
    num_factors = 6 if name == "llama-stretched" else 0
    assert num_weights == model.num_parameters() + num_factors


def test_every_tensor_has_the_bytes_it_should(make: Any) -> None:
    model, reader = make(MODELS["gemma"])
    found, ours = tensors(reader), dict(model.named_parameters())
    names = {
        "token_embd.weight": "embedding.weight",
        "output_norm.weight": "norm.weight",
        "blk.1.attn_norm.weight": "blocks.1.attention_norm.weight",
        "blk.1.attn_q.weight": "blocks.1.attention.query.weight",
        "blk.1.attn_k.weight": "blocks.1.attention.key.weight",
        "blk.1.attn_v.weight": "blocks.1.attention.value.weight",
        "blk.1.attn_output.weight": "blocks.1.attention.output.weight",
        "blk.1.ffn_norm.weight": "blocks.1.feed_forward_norm.weight",
        "blk.1.ffn_gate.weight": "blocks.1.feed_forward.gate.weight",
        "blk.1.ffn_up.weight": "blocks.1.feed_forward.up.weight",
        "blk.1.ffn_down.weight": "blocks.1.feed_forward.down.weight",
    }
    blocks = {name for name in found if name.startswith("blk.1.")}
    assert found.keys() - {name.replace(".1.", ".0.") for name in blocks} == names.keys()
    for theirs, name in names.items():
        weight = ours[name].detach()[: model.vocab_size] if "embedding" in name else ours[name]
        assert np.array_equal(found[theirs], weight.detach().double().numpy()), theirs


@pytest.mark.parametrize(
    ("dtype", "kind", "slack"), [("float16", "MOSTLY_F16", 1e-3), ("bfloat16", "MOSTLY_BF16", 8e-3)]
)
def test_matrices_may_be_halved_and_vectors_stay(
    make: Any, dtype: str, kind: str, slack: float
) -> None:
    model, reader = make(MODELS["gpt2"], dtype)
    assert values(reader)["general.file_type"] == gguf.LlamaFileType[kind]
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["token_embd.weight"] == kind.removeprefix("MOSTLY_")
    assert kinds["position_embd.weight"] == kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["blk.0.attn_qkv.bias"] == "F32"
    found = tensors(reader)["blk.0.ffn_up.weight"]
    expected = model.get_parameter("blocks.0.feed_forward.up.weight").detach().double().numpy()
    np.testing.assert_allclose(found, expected, rtol=slack, atol=1e-6)


def test_the_tokenizer_is_whole(make: Any, tokenizer: ByteLevelBPE) -> None:
    found = {
        name.removeprefix("tokenizer.ggml."): value
        for name, value in values(make(MODELS["llama"])[1]).items()
    }
    tokens, kinds = found["tokens"], found["token_type"]
    assert len(tokens) == len(kinds) == tokenizer.vocab_size
    controls = [index for index, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL]
    assert controls == sorted(tokenizer.control_ids)
    assert tokens[tokenizer.bos_id] == MARK + "<|bos|>"
    assert (found["model"], found["pre"]) == ("gpt2", "deepseek-v3")
    assert (found["bos_token_id"], found["eos_token_id"]) == (tokenizer.bos_id, tokenizer.end_id)
    assert MARK + "<|assistant|>" in found["tokenizer.chat_template"]


# llama.cpp's deepseek-v3: three expressions, each over what the one before left
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
WORDS = st.text("abst'.,(!-\n", max_size=6)


@pytest.fixture(scope="module")
def as_llama_cpp_splits(tokenizer: ByteLevelBPE) -> Tokenizer:
    """`tokenizer`, pre-tokenizing as llama.cpp does by the name it is given."""
    other = Tokenizer.from_str(tokenizer.to_files()["tokenizer.json"].decode())
    assert isinstance(other.model, models.BPE)
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in DEEPSEEK_V3]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    other.pre_tokenizer = pre_tokenizers.Sequence([*steps, to_bytes])
    return other


@settings(max_examples=200, deadline=None)
@given(words=st.lists(WORDS | st.from_regex(r"\A[0-9]{1,7}\Z"), max_size=8))
def test_the_nearest_splitting_gives_our_ids_where_no_word_has_an_underscore(
    tokenizer: ByteLevelBPE, as_llama_cpp_splits: Tokenizer, words: list[str]
) -> None:
    text = " ".join(word for word in words if word)  # one blank before digits, not two
    found = as_llama_cpp_splits.encode(text, add_special_tokens=False).ids
    assert found == tokenizer.encode_batch([text])[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"has_qk_norm": True, "sliding_window": 8},
            "model.sliding_window: found 8, expected 0; use `--format hf`",
        ),
        (
            {"has_qk_norm": True, "rope_scaling": "llama3"},
            "model.rope_scaling: found llama3, expected none",
        ),
        (
            {"mlp": "geglu", "is_embedding_scaled": True, "tie_embeddings": False},
            "model.tie_embeddings: found False, expected True",
        ),
        ({"mlp": "relu2"}, "no layout of transformers can express this model"),
    ],
)
def test_what_llama_cpp_cannot_express_is_named(
    make: Any, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make(change)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_llama_cpp_cannot_read_is_named(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    model = Transformer(ModelConfig(**BASE), tokenizer.vocab_size, 16)
    save_model(ArtifactWriter(tmp_path / "model"), model, tokenizer.to_files())
    with pytest.raises(ConfigError, match=r"train_tokenizer\.kind: found bytes, which has no merg"):
        export_gguf(tmp_path / "model", tmp_path / "out")
    with pytest.raises(ConfigError, match="dtype: found 'q4', expected one of float32, float16"):
        export_gguf(tmp_path / "model", tmp_path / "out", dtype="q4")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_without_the_package_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'fromscratch\[gguf\]'"):
        export_gguf(tmp_path, tmp_path / "out")
