"""A model's weights laid out for generation, where every step reads all of them for a few rows.

A step of generation multiplies a few rows with every matrix of the model, so its time is that of
reading the weights from memory. torch's product of one row and a plain matrix reads, on the CPU
this was measured on, 13 to 18 GB/s of the 30 there are, and with two to eight rows less than half
as much. oneDNN's blocked layout, made once, reads all 30, and does not mind eight rows.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.model.attention import Attention
from llm.model.precision import AUTOCAST_DTYPES, Precision, computed_precision
from llm.model.transformer import Transformer

ROWS = 8  # oneDNN chooses the layout for so many; it served 1 and 256 as well as their own did


class PackedLinear(nn.Module):
    """A linear layer that is only read, in a type and a layout of its own: x W^T + b."""

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: torch.dtype) -> None:
        super().__init__()
        weight = weight.detach().to(kind)
        is_packed = _can_pack(weight)
        self.kind = kind
        # neither is a parameter: what moves or saves those does not know the layout
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS) if is_packed else weight
        self.bias = None if bias is None else bias.detach().to(kind)
        self.multiply: Callable[[Tensor, Tensor, Tensor | None], Tensor] = (
            _packed_product if is_packed else F.linear
        )

    def forward(self, x: Tensor) -> Tensor:
        """Multiply (..., in) -> (..., out)."""
        return self.multiply(x.to(self.kind), self.weight, self.bias)


def packed(model: Transformer, precision: Precision = "fp32") -> Transformer:
    """Return the model ready to generate: its matrices packed, all else shared with `model`.

    The matrices stand in memory a second time while both models live. In bf16, which halves what a
    step reads, the stream between the layers stays in fp32, as under autocast in training.
    """
    if is_packed(model):
        return model
    device = model.embedding.weight.device.type
    kind = AUTOCAST_DTYPES.get(computed_precision(precision, device), torch.float32)
    # deepcopy takes from its memo what is there, and copies only the modules around it
    memo: dict[int, object] = {id(p): p for p in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        if isinstance(module, Attention):
            memo[id(module.project)] = PackedLinear(*module.project.weight_and_bias(), kind)
            memo |= {id(part): part for part in module.project.parts}  # which are now one
        elif isinstance(module, nn.Linear) and id(module) not in memo:  # parts come after the whole
            memo[id(module)] = PackedLinear(module.weight, module.bias, kind)
    return copy.deepcopy(model, memo).eval()


def is_packed(model: nn.Module) -> bool:
    """Tell whether `packed` made this model."""
    return any(isinstance(module, PackedLinear) for module in model.modules())


def _can_pack(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and torch.backends.mkldnn.is_available()


def _packed_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
