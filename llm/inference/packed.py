"""Weights repacked for generation, which is bound by reading them from memory.

Each step multiplies a few rows with every matrix. Measured on a CPU with 30 GB/s of memory
bandwidth, torch's product of one row and a plain matrix reads 13 to 18 GB/s, and with two to eight
rows less than half as much; oneDNN's blocked layout reads 30 GB/s in all these cases.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.model.attention import Attention
from llm.model.kernels.linear import Linear
from llm.model.precision import AUTOCAST_DTYPES, Precision, computed_precision
from llm.model.transformer import Transformer

LAYOUT_ROWS = 8  # batch size the layout is chosen for; as fast at 1 and 256 as their own layouts


class PackedLinear(nn.Module):
    """An inference-only linear layer x W^T + b in its own dtype and memory layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        weight = weight.detach().to(dtype)
        is_packed = _can_pack(weight)
        self.dtype = dtype
        # not parameters: code that moves or saves parameters does not know the layout
        self.weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight, LAYOUT_ROWS) if is_packed else weight
        )
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.multiply: Callable[[Tensor, Tensor, Tensor | None], Tensor] = (
            _packed_product if is_packed else F.linear
        )

    def forward(self, x: Tensor) -> Tensor:
        """Multiply (..., in) -> (..., out)."""
        return self.multiply(x.to(self.dtype), self.weight, self.bias)


def packed(model: Transformer, precision: Precision = "fp32") -> Transformer:
    """Return a model with repacked matrices that shares everything else with `model`.

    The matrices take memory twice while both models live. bf16 halves what a step reads; the
    residual stream stays in fp32, as under autocast in training.
    """
    if is_packed(model):
        return model
    device = model.embedding.weight.device.type
    dtype = AUTOCAST_DTYPES.get(computed_precision(precision, device), torch.float32)
    # deepcopy takes memo entries as they are and copies only the modules around them
    memo: dict[int, object] = {id(p): p for p in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        if isinstance(module, Attention):
            project = module.project
            memo[id(project)] = PackedLinear(project.merged_weight(), project.bias, dtype)
            memo |= {id(part): part for part in project.parts}  # joined into `project`
        # `project` comes before its parts
        elif isinstance(module, Linear) and id(module) not in memo:
            memo[id(module)] = PackedLinear(module.merged_weight(), module.bias, dtype)
    return copy.deepcopy(model, memo).eval()


def is_packed(model: nn.Module) -> bool:
    """Return whether `packed` made this model."""
    return any(isinstance(module, PackedLinear) for module in model.modules())


def _can_pack(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and torch.backends.mkldnn.is_available()


def _packed_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
