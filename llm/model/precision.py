"""Which precision matrix products are computed in: as asked for, where the processor has it.

Weights, gradients, losses and the optimizer's state are in fp32 whatever the products are in.

Source: "Mixed Precision Training" (arXiv 1710.03740) for fp16, whose loss scale is in
llm.training.loss_scale; "A Study of BFLOAT16 for Deep Learning Training" (arXiv 1905.12322).
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def computed_precision(asked: Precision, device_type: str) -> Precision:
    """Return `asked`, or fp32 where it is asked of a CPU that has no such products.

    bf16 it could only emulate, many times slower than fp32; fp16 too; tf32 is of GPUs.
    """
    if device_type != "cpu":
        return asked
    features = torch.cpu.get_capabilities()
    has_bf16 = any(features.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bf16" if asked == "bf16" and has_bf16 else "fp32"


def autocast(asked: Precision, device_type: str) -> torch.autocast:
    """Return the context in which a forward pass has products of 16 bits, if they are `asked` for.

    The backward pass follows: each product's gradient is computed as the product was.
    """
    kind = TYPES.get(computed_precision(asked, device_type))
    return torch.autocast(device_type, kind or torch.bfloat16, enabled=kind is not None)


@contextmanager
def fp32_products(asked: Precision, device_type: str) -> Generator[None]:
    """Have what is left of fp32 products rounded to tf32 or whole, forward and backward.

    tf32 keeps the range of fp32 and 10 of its 23 bits of fraction. What held before holds after.
    """
    if device_type == "cpu":
        yield
        return
    products = torch.backends.cuda.matmul
    before, before_by_name = products.allow_tf32, products.fp32_precision
    # the older setting sets the newer one too; set alone, that one makes the getters of the other
    # raise, which Inductor asks (torch 2.13)
    products.allow_tf32 = asked == "tf32"
    try:
        yield
    finally:
        products.allow_tf32 = before
        products.fp32_precision = before_by_name  # "none" and "ieee" are one for the older setting
