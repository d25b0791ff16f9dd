"""Each feed-forward network equals its formula, written out."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from llm.model.feed_forward import MLPS
from tests.llm.training_setup import TINY


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {
    "gelu": gelu,
    "relu2": lambda x: torch.where(x > 0, x * x, torch.zeros_like(x)),
    "geglu": gelu,
    "swiglu": lambda x: x / (1 + torch.exp(-x)),
}


def affine(x: Tensor, layer: nn.Linear) -> Tensor:
    y = x @ layer.weight.T
    return y if layer.bias is None else y + layer.bias


@pytest.mark.parametrize("has_biases", [False, True])
@pytest.mark.parametrize("name", MLPS)
def test_outputs_equal_the_formula(name: str, has_biases: bool) -> None:
    torch.manual_seed(0)
    mlp = MLPS[name](replace(TINY, mlp=name, has_biases=has_biases))
    x = torch.randn(2, 3, TINY.d_model)
    up, activation = affine(x, mlp.up), ACTIVATIONS[name]
    inside = activation(affine(x, mlp.gate)) * up if hasattr(mlp, "gate") else activation(up)
    assert hasattr(mlp, "gate") == name.endswith("glu")
    torch.testing.assert_close(mlp(x), affine(inside, mlp.down), rtol=1e-5, atol=1e-6)
