"""Linear layers by oneDNN equal torch's own, which use another library on a CPU."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.model.kernels.linear import (
    MIN_MULTIPLICATIONS,
    JoinedLinear,
    Linear,
    linear,
    product,
    transposed_product,
)

# Sums of at most 2,048 products of normal numbers in fp32, in another order: their size is about
# 45, and a rounding is 6e-8 of it.
TOLERANCE = 5e-4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outputs_and_gradients(layer: nn.Linear, x: Tensor, grad_output: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    weights = list(layer.parameters())
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, *weights], grad_output)]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(128, 128, 384), (128, 384, 128), (2048, 96, 65), (3, 5, 7)])
def test_values_and_gradients_are_those_of_torch(
    shape: tuple[int, int, int], has_bias: bool
) -> None:
    num_positions, num_inputs, num_outputs = shape
    ours, theirs = (each(num_inputs, num_outputs, bias=has_bias) for each in (Linear, nn.Linear))
    theirs.load_state_dict(ours.state_dict())
    x, grad_output = (
        normal(2, num_positions, num_inputs),
        normal(2, num_positions, num_outputs, seed=1),
    )
    found, wanted = (outputs_and_gradients(layer, x, grad_output) for layer in (ours, theirs))
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("has_biases", [False, True])
@pytest.mark.parametrize("width", [8, 256])
def test_joined_layers_equal_each_alone_in_outputs_and_gradients(
    width: int, has_biases: bool
) -> None:
    parts = [Linear(width, num_outputs, bias=has_biases) for num_outputs in (width, 16, 16)]
    weights = [weight for part in parts for weight in part.parameters()]
    found, wanted = [], []
    for outputs, joined in ((found, True), (wanted, False)):
        x = normal(32, width).requires_grad_()
        y = (
            JoinedLinear(parts, has_biases)(x)
            if joined
            else torch.cat([part(x) for part in parts], dim=-1)
        )
        outputs += [y, *torch.autograd.grad(y, [x, *weights], normal(*y.shape, seed=1))]
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)


def test_factors_of_any_layout_give_the_same_product() -> None:
    left, right = normal(192, 128), normal(160, 128, seed=1)
    wide, many = normal(192, 384, seed=2), normal(3, 192, 128, seed=3)
    pairs = [(left.T.contiguous().T, right), (left, right.T.contiguous().T)]
    pairs += [(wide[:, 100:228], right), (many[:, ::2], right), (left[:1].expand(192, -1), right)]
    pairs += [(left, wide[:, 100:228]), (left, wide.T[:128].T[:100])]
    for some, other in pairs:
        assert some.numel() * len(other) >= MIN_MULTIPLICATIONS
        wanted = some @ other.T
        torch.testing.assert_close(product(some, other), wanted, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(linear(some, other, None), wanted, atol=TOLERANCE, rtol=0)
    for narrow, broad in ((left, wide), (wide, left), (wide[:, 100:228], left)):
        found = transposed_product(narrow, broad)
        torch.testing.assert_close(found, narrow.T @ broad, atol=TOLERANCE, rtol=0)


def test_the_gradient_may_be_one_expanded_number() -> None:
    x, weight = normal(256, 128), normal(128, 128).requires_grad_()
    [found] = torch.autograd.grad(linear(x, weight, None).sum(), weight)
    torch.testing.assert_close(found, x.sum(0).expand(128, -1), atol=TOLERANCE, rtol=0)


def test_a_gradient_that_is_not_needed_is_not_computed() -> None:
    x, weight = normal(256, 128), normal(128, 128)
    assert not linear(x, weight, None).requires_grad
    [found] = torch.autograd.grad(linear(x.requires_grad_(), weight, None).sum(), x)
    torch.testing.assert_close(found, weight.sum(0).expand(256, -1), atol=TOLERANCE, rtol=0)


def test_an_empty_input_gives_an_empty_output() -> None:
    assert linear(torch.zeros(0, 8), torch.ones(4, 8), None).shape == (0, 4)


def test_autocast_and_other_types_are_left_to_torch() -> None:
    x, weight = normal(256, 128), normal(128, 128, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, weight, None), F.linear(x, weight))
    for dtype in (torch.bfloat16, torch.float64):
        assert torch.equal(
            product(x.to(dtype), weight.to(dtype)), F.linear(x.to(dtype), weight.to(dtype))
        )


def test_a_compiled_layer_is_one_graph() -> None:
    layer, x = Linear(128, 128), normal(256, 128)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), atol=TOLERANCE, rtol=0)
