"""Mixed precision: the compute dtype, falling back to fp32 where the hardware lacks it.

Weights, gradients, losses and optimizer state are fp32 in every precision.

Source: "Mixed Precision Training" (arXiv 1710.03740) for fp16, whose loss scale is in
llm.training.loss_scale; "A Study of BFLOAT16 for Deep Learning Training" (arXiv 1905.12322).
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def computed_precision(requested: Precision, device_type: str) -> Precision:
    """Return `requested`, or fp32 where a CPU lacks it."""
    if device_type != "cpu":
        return requested
    features = torch.cpu.get_capabilities()
    # without these instructions 16 bits are emulated, many times slower than fp32
    has_bf16 = any(features.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bf16" if requested == "bf16" and has_bf16 else "fp32"  # tf32 and fp16 are for GPUs


def autocast(requested: Precision, device_type: str) -> torch.autocast:
    """Return the context of a forward pass whose matrix products take 16 bits, if `requested`.

    The backward pass is not inside: each gradient is computed in the dtype of its product.
    """
    dtype = AUTOCAST_DTYPES.get(computed_precision(requested, device_type))
    return torch.autocast(device_type, dtype or torch.bfloat16, enabled=dtype is not None)


@contextmanager
def fp32_products(requested: Precision, device_type: str) -> Generator[None]:
    """Round fp32 products to tf32, or forbid it, forward and backward; restored on exit.

    tf32 keeps the range of fp32 and 10 of its 23 bits of fraction.
    """
    if device_type == "cpu":
        yield
        return
    products = torch.backends.cuda.matmul
    before, before_by_name = products.allow_tf32, products.fp32_precision
    # the older setting sets the newer one too; set alone, that one makes the getters of the other
    # raise, which Inductor calls (torch 2.13)
    products.allow_tf32 = requested == "tf32"
    try:
        yield
    finally:
        products.allow_tf32 = before
        products.fp32_precision = before_by_name  # "none" and "ieee" are one for the older setting
