"""Adapters leave for PEFT and are merged: peft on our exported base is the oracle."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llm.artifact import ArtifactWriter
from llm.config import LoraConfig, ModelConfig
from llm.errors import ArtifactError, ConfigError
from llm.exchange.adapters import export_adapter, merge_adapter
from llm.exchange.folders import export_model
from llm.model.lora import adapters_of, add_adapters, merge_adapters, save_adapter
from llm.model.transformer import Transformer
from llm.model.weights import load_model, save_model
from llm.tokenizer.bpe import ByteLevelBPE

transformers = pytest.importorskip("transformers", reason="it runs the base")
peft = pytest.importorskip("peft", reason="peft is the oracle here")

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"has_qk_norm": True},
    "gemma": {"mlp": "geglu", "is_embedding_scaled": True},
    "gpt2": {
        "positions": "learned", "norm": "layernorm", "norm_eps": 1e-5, "mlp": "gelu",
        "has_biases": True, "num_kv_heads": 4,
    },
}  # fmt: skip
LORA = LoraConfig(rank=3, alpha=8.0)


def make_folders(
    folder: Path, tokenizer: ByteLevelBPE, lora: LoraConfig = LORA, **shape: Any
) -> tuple[Path, Path]:
    """A base model, and the model that a training with an adapter could have made of it."""
    sizes = {"num_layers": 2, "d_model": 32, "num_heads": 4, "num_kv_heads": 2, "d_ff": 64}
    model = Transformer(ModelConfig(**{**sizes, **shape}), tokenizer.vocab_size, 32)
    generator = torch.Generator().manual_seed(1)
    model.initialize(generator)
    save_model(ArtifactWriter(folder / "base"), model, tokenizer.to_files())
    add_adapters(model, lora, 0, "lora")
    for adapter in adapters_of(model).values():
        torch.nn.init.normal_(adapter.b, std=0.1, generator=generator)
    writer = ArtifactWriter(folder / "chat")
    save_adapter(writer, model, lora, folder / "base")
    merge_adapters(model)
    save_model(writer, model, tokenizer.to_files())
    return folder / "base", folder / "chat"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads it
@pytest.mark.parametrize("targets", [LORA.targets, ("value", "down"), ("value", "query", "output")])
@pytest.mark.parametrize("layout", SHAPES)
def test_peft_loads_the_adapter_on_our_base_and_gives_our_logits(
    layout: str, targets: tuple[str, ...], tmp_path: Path, tokenizer: ByteLevelBPE
) -> None:
    lora = LoraConfig(rank=3, alpha=8.0, dropout=0.5, targets=targets)
    base, chat = make_folders(tmp_path, tokenizer, lora, **SHAPES[layout])
    export_model(base, tmp_path / "exported")
    export_adapter(chat, tmp_path / "peft")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert theirs.config.model_type == layout
    tokens = torch.arange(60).view(2, 30)
    with torch.no_grad():
        before = theirs(tokens).logits
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft")
        after, ours = theirs(tokens).logits, load_model(chat)(tokens)
    assert (after - before).abs().max() > 0.01  # a thousand times the tolerance below
    torch.testing.assert_close(after, ours, rtol=1e-5, atol=1e-5)


def test_merging_into_the_base_gives_the_bytes_of_the_trained_model(
    tmp_path: Path, tokenizer: ByteLevelBPE
) -> None:
    base, chat = make_folders(tmp_path, tokenizer)
    merge_adapter(base, chat, tmp_path / "merged")
    for name in ("model.safetensors", "model.json", "tokenizer.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (chat / name).read_bytes()


def test_the_adapter_of_another_base_is_refused_with_both_digests(
    tmp_path: Path, tokenizer: ByteLevelBPE
) -> None:
    base, chat = make_folders(tmp_path, tokenizer)
    with pytest.raises(ArtifactError, match=r"adapter of another base: .* sha256 [0-9a-f]{64}"):
        merge_adapter(chat, chat, tmp_path / "merged")
    with pytest.raises(ArtifactError, match=r"adapter.json: not found; .* lora.rank above 0"):
        merge_adapter(base, base, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("adapter.json", "{", "adapter.json: not an adapter of this version"),
        ("adapter.json", '{"lora": {"rank": "three"}}', "rank: found 'three'"),
        ("adapter.safetensors", "", "adapter.safetensors: no readable safetensors file"),
    ],
)
def test_damaged_adapters_are_refused_by_file(
    name: str, content: str, expected: str, tmp_path: Path, tokenizer: ByteLevelBPE
) -> None:
    _, chat = make_folders(tmp_path, tokenizer)
    (chat / name).write_text(content)
    with pytest.raises(ArtifactError, match=expected):
        export_adapter(chat, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


def test_an_adapter_of_another_shape_than_its_folder_is_refused_by_tensor(
    tmp_path: Path, tokenizer: ByteLevelBPE
) -> None:
    _, chat = make_folders(tmp_path, tokenizer)
    info = json.loads((chat / "adapter.json").read_text())
    info["lora"]["rank"] = 4
    (chat / "adapter.json").write_text(json.dumps(info))
    expected = r"query.a: found shape \[3, 32\], expected \[4, 32\]"
    with pytest.raises(ArtifactError, match=expected):
        export_adapter(chat, tmp_path / "peft")


def test_a_dtype_that_cannot_be_written_is_a_setting_to_change(
    tmp_path: Path, tokenizer: ByteLevelBPE
) -> None:
    _, chat = make_folders(tmp_path, tokenizer)
    with pytest.raises(ConfigError, match="dtype: found 'float16'"):
        export_adapter(chat, tmp_path / "peft", dtype="float16")
