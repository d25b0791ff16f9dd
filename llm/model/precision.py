"""Which precision matrix products are computed in: as asked for, where the processor has it."""

from typing import Literal

import torch

Precision = Literal["fp32", "tf32", "bf16", "fp16"]


def computed_precision(asked: Precision, device_type: str) -> Precision:
    """Return `asked`, or fp32 where bf16 is asked of a CPU that has no bfloat16.

    It could only emulate it, many times slower than fp32.
    """
    features = torch.cpu.get_capabilities()
    has_bf16 = any(features.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "fp32" if device_type == "cpu" and not has_bf16 else asked


def autocast(asked: Precision, device_type: str) -> torch.autocast:
    """Return the context in which matrix products have the precision `asked` for."""
    is_bf16 = computed_precision(asked, device_type) == "bf16"
    return torch.autocast(device_type, torch.bfloat16, enabled=is_bf16)
