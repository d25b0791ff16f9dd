"""Linear layers: against torch's own, which on a CPU take another library."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.model.linear import MIN_MULTIPLICATIONS, Linear, linear, product, transposed_product

# Sums of at most 2,048 products of normal numbers in fp32, in another order: their size is about
# 45, and a rounding is 6e-8 of it.
TOLERANCE = 5e-4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outputs_and_gradients(layer: nn.Linear, x: Tensor, above: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    weights = list(layer.parameters())
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, *weights], above)]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(128, 128, 384), (128, 384, 128), (2048, 96, 65), (3, 5, 7)])
def test_values_and_gradients_are_those_of_torch(
    shape: tuple[int, int, int], has_bias: bool
) -> None:
    num_positions, num_inputs, num_outputs = shape
    ours, theirs = (kind(num_inputs, num_outputs, bias=has_bias) for kind in (Linear, nn.Linear))
    theirs.load_state_dict(ours.state_dict())
    x, above = normal(2, num_positions, num_inputs), normal(2, num_positions, num_outputs, seed=1)
    found, wanted = (outputs_and_gradients(layer, x, above) for layer in (ours, theirs))
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, atol=TOLERANCE, rtol=0)


def test_any_layout_of_what_is_multiplied_gives_the_same() -> None:
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


def test_the_gradient_may_be_one_number_for_all() -> None:
    x, weight = normal(256, 128), normal(128, 128).requires_grad_()
    [found] = torch.autograd.grad(linear(x, weight, None).sum(), weight)
    torch.testing.assert_close(found, x.sum(0).expand(128, -1), atol=TOLERANCE, rtol=0)


def test_a_gradient_nobody_asks_for_is_not_made() -> None:
    x, weight = normal(256, 128), normal(128, 128)
    assert not linear(x, weight, None).requires_grad
    [found] = torch.autograd.grad(linear(x.requires_grad_(), weight, None).sum(), x)
    torch.testing.assert_close(found, weight.sum(0).expand(256, -1), atol=TOLERANCE, rtol=0)


def test_nothing_to_multiply_gives_nothing() -> None:
    assert linear(torch.zeros(0, 8), torch.ones(4, 8), None).shape == (0, 4)


def test_autocast_and_other_types_are_left_to_torch() -> None:
    x, weight = normal(256, 128), normal(128, 128, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, weight, None), F.linear(x, weight))
    for kind in (torch.bfloat16, torch.float64):
        assert torch.equal(
            product(x.to(kind), weight.to(kind)), F.linear(x.to(kind), weight.to(kind))
        )


def test_a_compiled_layer_is_one_graph() -> None:
    layer, x = Linear(128, 128), normal(256, 128)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), atol=TOLERANCE, rtol=0)
