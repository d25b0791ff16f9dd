"""Utilization: operations of a token and peaks of devices, beside numbers worked out by hand."""

import resource
import sys
from typing import Any

import pytest
import torch

from llm.config import ModelConfig
from llm.model.transformer import Transformer
from llm.monitoring.throughput import (
    PEAKS,
    flops_per_token,
    peak_by_name,
    peak_flops,
    peak_memory_bytes,
)

GPT2 = {
    "num_layers": 12,
    "d_model": 768,
    "num_heads": 12,
    "num_kv_heads": 12,
    "d_ff": 3072,
    "positions": "learned",
    "norm": "layernorm",
    "mlp": "gelu",
    "has_biases": True,
}
# 12 layers of query, key, value and output, 768 x 768 each, and 768 x 3072 twice; the head
GPT2_WEIGHTS = 12 * (4 * 768**2 + 2 * 768 * 3072) + 50_257 * 768


def model(vocab_size: int = 50_257, seq_len: int = 1024, **shape: Any) -> Transformer:
    """A model that takes no memory."""
    with torch.device("meta"):
        return Transformer(ModelConfig(**{**GPT2, **shape}), vocab_size, seq_len)


def test_gpt2_needs_what_palms_formula_gives() -> None:
    assert GPT2_WEIGHTS == 123_532_032
    expected = 6 * GPT2_WEIGHTS + 12 * 12 * 12 * 64 * 1024
    assert expected == 854_438_400
    assert flops_per_token(model()) == expected


def test_untied_embeddings_change_nothing_since_looking_up_is_no_product() -> None:
    assert flops_per_token(model(tie_embeddings=False)) == flops_per_token(model())


def test_fewer_key_heads_save_their_projections_and_not_the_scores() -> None:
    saved = 12 * 2 * 768 * (12 - 4) * 64
    expected = 6 * (GPT2_WEIGHTS - saved) + 12 * 12 * 768 * 1024
    assert flops_per_token(model(num_kv_heads=4)) == expected


def test_a_gate_is_a_third_matrix() -> None:
    gated = 6 * (GPT2_WEIGHTS + 12 * 768 * 3072) + 12 * 12 * 768 * 1024
    assert flops_per_token(model(mlp="swiglu")) == gated


@pytest.mark.parametrize(
    ("shape", "attended"),
    [
        ({"sliding_window": 256}, 12 * 256),
        ({"sliding_window": 256, "full_attention_every": 4}, 9 * 256 + 3 * 1024),
        ({"sliding_window": 2000}, 12 * 1024),
        ({"sliding_window": 256, "is_causal": False}, 12 * 512),
        ({"is_causal": False}, 12 * 1024),
    ],
)
def test_a_window_is_all_a_layer_attends_to(shape: dict[str, Any], attended: int) -> None:
    assert flops_per_token(model(**shape)) == 6 * GPT2_WEIGHTS + 12 * 12 * 64 * attended


@pytest.mark.parametrize(
    ("name", "precision", "teraflops"),
    [
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H100 NVL", "tf32", 417.5),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100 80GB PCIe", "tf32", 156.0),
        ("NVIDIA L4", "bf16", 121.0),
        ("NVIDIA L40S", "bf16", 362.0),
        ("NVIDIA GeForce RTX 4090", "fp16", 165.2),
        ("NVIDIA GeForce RTX 3090", "fp32", 35.6),
        ("Tesla V100-SXM2-16GB", "fp16", 125.0),
        ("Tesla T4", "fp16", 65.0),
        ("Tesla T4", "bf16", None),
        ("Tesla V100-SXM2-16GB", "tf32", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA GeForce RTX 4090 D", "bf16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA A10G", "bf16", None),
        ("AMD Instinct MI300X", "bf16", None),
    ],
)
def test_a_device_has_the_peak_of_its_data_sheet_or_none(
    name: str, precision: Any, teraflops: float | None
) -> None:
    found = peak_by_name(name, precision)
    assert found == (None if teraflops is None else pytest.approx(teraflops * 1e12))


def test_a_cpu_has_no_known_peak() -> None:
    assert peak_flops(torch.device("cpu"), "fp32") is None


def test_no_product_of_fewer_bits_is_slower() -> None:
    for peaks in PEAKS.values():
        in_order = [peaks[kind] for kind in ("fp32", "tf32", "fp16") if kind in peaks]
        assert in_order == sorted(in_order)


def test_memory_of_a_cpu_is_that_of_the_process() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    room = torch.ones(1 << 26)  # 256 MiB
    after = peak_memory_bytes(torch.device("cpu"))
    assert after >= before and after >= room.nbytes
    unit = 1 if sys.platform == "darwin" else 1024
    assert after <= unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
