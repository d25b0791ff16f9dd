"""Throughput of training: FLOPs per token, model FLOPs utilization (MFU), peak memory.

MFU is the floating-point operations per second that the model's mathematics needs, over the peak of
the device in the configured precision:

    MFU = tokens/s * flops per token / (peak of a device * devices)

Source: "PaLM" (arXiv 2204.02311), appendix B.
"""

import re
import resource
import sys

import torch
from torch import Tensor

from llm.model.attention import window_of
from llm.model.positions import head_dim_of
from llm.model.precision import Precision, computed_precision
from llm.model.transformer import Transformer

TERA = 1e12
# Dense TFLOP/s (the advertised figure is often twice that, for half of the weights zero), 16 bits
# accumulated in fp32. fp32 is without, tf32 with tensor cores; a precision that a device lacks has
# no entry. The first name that is a word of the device's name counts. Sources: NVIDIA's data
# sheets of each (H200 and H100 NVL: h200-tensor-core-gpu-datasheet, h100-datasheet; Ada and Ampere:
# the GeForce and RTX architecture white papers, appendix A; V100 and T4: their data sheets).
PEAKS: dict[str, dict[Precision, float]] = {
    "B200": {"fp32": 75.0, "tf32": 1125.0, "bf16": 2250.0, "fp16": 2250.0},
    "H200 NVL": {"fp32": 60.0, "tf32": 417.5, "bf16": 835.5, "fp16": 835.5},
    "GH200": {"fp32": 66.9, "tf32": 494.7, "bf16": 989.4, "fp16": 989.4},
    "H200": {"fp32": 66.9, "tf32": 494.7, "bf16": 989.4, "fp16": 989.4},
    "H100 PCIe": {"fp32": 51.2, "tf32": 378.0, "bf16": 756.0, "fp16": 756.0},
    "H100 NVL": {"fp32": 60.0, "tf32": 417.5, "bf16": 835.5, "fp16": 835.5},
    "H100": {"fp32": 66.9, "tf32": 494.7, "bf16": 989.4, "fp16": 989.4},
    "A100": {"fp32": 19.5, "tf32": 156.0, "bf16": 312.0, "fp16": 312.0},
    "A40": {"fp32": 37.4, "tf32": 74.8, "bf16": 149.7, "fp16": 149.7},
    "RTX A6000": {"fp32": 38.7, "tf32": 77.4, "bf16": 154.8, "fp16": 154.8},
    "A10": {"fp32": 31.2, "tf32": 62.5, "bf16": 125.0, "fp16": 125.0},
    "L40S": {"fp32": 91.6, "tf32": 183.0, "bf16": 362.0, "fp16": 362.0},
    "L40": {"fp32": 90.5, "tf32": 90.5, "bf16": 181.0, "fp16": 181.0},
    "L4": {"fp32": 30.3, "tf32": 60.0, "bf16": 121.0, "fp16": 121.0},
    "RTX 5090": {"fp32": 104.8, "tf32": 104.8, "bf16": 209.5, "fp16": 209.5},
    "RTX 4090": {"fp32": 82.6, "tf32": 82.6, "bf16": 165.2, "fp16": 165.2},
    "RTX 3090": {"fp32": 35.6, "tf32": 35.6, "bf16": 71.0, "fp16": 71.0},
    "V100-PCIE": {"fp32": 14.0, "fp16": 112.0},
    "V100": {"fp32": 15.7, "fp16": 125.0},
    "T4": {"fp32": 8.1, "fp16": 65.0},
}
# parts of a device, and variants with other clocks under the same name
OTHER_DEVICES = re.compile(r"\b(MIG|Laptop|Max-Q|D)\b")


def flops_per_token(model: Transformer) -> float:
    """Return the operations per token of a training step, forward and backward.

        6 * weights that multiply + 12 * layers * heads * head_dim * attended positions

    A weight multiplies and adds once forward and twice backward, hence 6; a frozen one has no
    gradient of its own, hence 4. The head counts, tied or not, without the vocabulary's
    padding; an embedding lookup does not. Attended positions are the whole context, causal or not,
    by PaLM's convention, so that MFU compares with published values (a kernel that skips the upper
    triangle gets the credit). A sliding window counts with its size, twice if it also looks ahead.
    Document masks and activation checkpointing change nothing.
    """
    config = model.config
    products = model.vocab_size * _flops_per_input(model.head.weight)
    products += sum(
        len(weight) * _flops_per_input(weight)
        for weight in model.blocks.parameters()
        if weight.ndim == 2
    )
    attended = sum(_attended_positions(model, layer) for layer in range(config.num_layers))
    return products + 12.0 * config.num_heads * head_dim_of(config) * attended


def _flops_per_input(weight: Tensor) -> float:
    """Return the operations of a row of a matrix (O, I), forward and backward."""
    return (6.0 if weight.requires_grad else 4.0) * weight.shape[1]


def _attended_positions(model: Transformer, layer: int) -> int:
    window = window_of(model.config, layer)
    sides = 1 if model.config.is_causal else 2
    return min(sides * window or model.seq_len, model.seq_len)


def peak_flops(device: torch.device, precision: Precision) -> float | None:
    """Return the device's peak FLOP/s, None if unknown."""
    if device.type != "cuda":
        return None
    return peak_by_name(torch.cuda.get_device_name(device), computed_precision(precision, "cuda"))


def peak_by_name(name: str, precision: Precision) -> float | None:
    """Return the peak FLOP/s of a device by its name, None if unknown."""
    if OTHER_DEVICES.search(name):
        return None
    for known, peaks in PEAKS.items():
        if re.search(rf"\b{re.escape(known)}\b", name):
            return TERA * peaks[precision] if precision in peaks else None
    return None


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory so far: of tensors on a GPU, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else 1024 * held  # Linux counts in KiB
