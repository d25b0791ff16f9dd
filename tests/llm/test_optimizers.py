"""The optimizers equal independent references, and their state survives a round trip."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llm.config import OptimizationConfig
from llm.errors import ArtifactError
from llm.model.transformer import Transformer
from llm.training.muon import Muon
from llm.training.optimizers import FusedAdamW, Optimizer, make_optimizer
from tests.llm.training_setup import tiny_model

SOURCE = Path("optimizer.safetensors")
ADAMW = OptimizationConfig(optimizer="adamw", learning_rate=1e-2, weight_decay=0.1)
MUON = OptimizationConfig(optimizer="muon", learning_rate=1e-2, weight_decay=0.1)


def set_gradients(model: Transformer, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def adamw_reference(config: OptimizationConfig) -> Callable[[str, Tensor, Tensor, float], Tensor]:
    """AdamW as its paper has it, Algorithm 2 (arXiv 1711.05101), in float64."""
    moments: dict[str, tuple[Tensor, Tensor, int]] = {}

    def update(name: str, weight: Tensor, gradient: Tensor, factor: float) -> Tensor:
        zero = torch.zeros_like(weight)
        first, second, step = moments.get(name, (zero, zero, 0))
        first = config.beta1 * first + (1 - config.beta1) * gradient
        second = config.beta2 * second + (1 - config.beta2) * gradient**2
        moments[name] = (first, second, step + 1)
        unbiased = first / (1 - config.beta1 ** (step + 1))
        spread = (second / (1 - config.beta2 ** (step + 1))).sqrt()
        decay = config.weight_decay if weight.ndim == 2 else 0.0
        rate = config.learning_rate * factor
        return weight * (1 - rate * decay) - rate * unbiased / (spread + 1e-8)

    return update


def muon_reference(config: OptimizationConfig) -> Callable[[str, Tensor, Tensor, float], Tensor]:
    """Momentum, then U V^T of its singular value decomposition instead of Newton-Schulz."""
    momenta: dict[str, Tensor] = {}

    def update(name: str, weight: Tensor, gradient: Tensor, factor: float) -> Tensor:
        share = config.muon_momentum
        momentum = share * momenta.get(name, torch.zeros_like(weight)) + (1 - share) * gradient
        momenta[name] = momentum
        ahead = share * momentum + (1 - share) * gradient
        left, _, right = torch.linalg.svd(ahead, full_matrices=False)
        rate = config.muon_learning_rate * factor
        scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
        return weight * (1 - rate * config.weight_decay) - rate * scale * left @ right

    return update


def test_adamw_equals_the_algorithm_of_its_paper() -> None:
    model = tiny_model()
    optimizer = make_optimizer(model, ADAMW)
    reference = adamw_reference(ADAMW)
    expected = {name: weight.detach().double() for name, weight in model.named_parameters()}
    for step, factor in enumerate((0.5, 1.0, 0.7, 0.1)):
        gradients = set_gradients(model, step)
        optimizer.set_learning_rates(factor)
        optimizer.step()
        for name, gradient in gradients.items():
            expected[name] = reference(name, expected[name], gradient.double(), factor)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach().double(), expected[name], rtol=1e-5, atol=1e-6)


def test_muon_turns_matrices_of_the_blocks_towards_the_polar_factor_and_adamw_the_rest() -> None:
    model = tiny_model()
    optimizer = make_optimizer(model, MUON)
    muon, adamw = muon_reference(MUON), adamw_reference(MUON)
    for step in range(3):
        before = {name: weight.detach().double() for name, weight in model.named_parameters()}
        gradients = set_gradients(model, step)
        optimizer.set_learning_rates(1.0)
        optimizer.step()
        for name, weight in model.named_parameters():
            is_muons = name.startswith("blocks.") and weight.ndim == 2
            reference = muon if is_muons else adamw
            expected = reference(name, before[name], gradients[name].double(), 1.0)
            moved, should_move = weight.detach() - before[name], expected - before[name]
            if not is_muons:
                torch.testing.assert_close(moved, should_move, rtol=1e-4, atol=1e-6)
                continue
            # Newton-Schulz in bfloat16 brings singular values to 0.7 .. 1.2, not to 1
            cosine = torch.cosine_similarity(moved.flatten(), should_move.flatten(), dim=0)
            assert cosine > 0.95, name
            assert 0.7 < moved.norm() / should_move.norm() < 1.2, name


@pytest.mark.parametrize("config", [ADAMW, MUON], ids=["adamw", "muon"])
def test_the_state_goes_on_bit_equal_after_a_round_trip(config: OptimizationConfig) -> None:
    model, copy = tiny_model(), tiny_model()
    optimizer = make_optimizer(model, config)
    for step in range(3):
        set_gradients(model, step)
        optimizer.step()
    copy.load_state_dict(model.state_dict())
    resumed = make_optimizer(copy, config)
    state = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    resumed.load_state_dict(state, SOURCE)
    for step in range(3, 6):
        for some, its in ((model, optimizer), (copy, resumed)):
            set_gradients(some, step)
            its.set_learning_rates(0.5)
            its.step()
    assert all(map(torch.equal, model.parameters(), copy.parameters()))


def test_the_names_in_the_state_say_optimizer_weight_and_tensor() -> None:
    model = tiny_model()
    optimizer = make_optimizer(model, MUON)
    assert optimizer.state_dict() == {}
    set_gradients(model, 0)
    optimizer.step()
    names = optimizer.state_dict().keys()
    assert "muon/blocks.0.attention.query.weight/momentum_buffer" in names
    assert "adamw/embedding.weight/exp_avg" in names
    assert "adamw/blocks.1.attention_norm.weight/exp_avg_sq" in names


def stepped(config: OptimizationConfig) -> tuple[Optimizer, dict[str, Tensor]]:
    model = tiny_model()
    optimizer = make_optimizer(model, config)
    set_gradients(model, 0)
    optimizer.step()
    return make_optimizer(tiny_model(), config), optimizer.state_dict()


def test_a_state_of_another_optimizer_is_refused() -> None:
    optimizer, _ = stepped(ADAMW)
    _, state = stepped(MUON)
    with pytest.raises(ArtifactError, match="belongs to no weight of this optimizer"):
        optimizer.load_state_dict(state, SOURCE)


def test_a_state_of_another_shape_is_refused_with_both_shapes() -> None:
    optimizer, state = stepped(ADAMW)
    state["adamw/norm.weight/exp_avg"] = torch.zeros(3)
    with pytest.raises(ArtifactError, match=r"norm.weight/exp_avg: found shape \[3\].*\[32\]"):
        optimizer.load_state_dict(state, SOURCE)


def test_a_state_that_lacks_a_weight_is_refused() -> None:
    optimizer, state = stepped(ADAMW)
    state = {name: tensor for name, tensor in state.items() if "/norm.weight/" not in name}
    with pytest.raises(ArtifactError, match="found the adamw state of 19 weights, expected 20"):
        optimizer.load_state_dict(state, SOURCE)


def test_vectors_are_not_decayed() -> None:
    model = tiny_model()
    optimizer = make_optimizer(model, OptimizationConfig(weight_decay=10.0, learning_rate=1e-3))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    matrix = model.embedding.weight.detach().clone()
    optimizer.step()
    assert torch.equal(model.norm.weight, torch.ones(32))
    torch.testing.assert_close(model.embedding.weight, matrix * 0.99)


def test_batched_muon_equals_torchs_own() -> None:
    """Tolerance: both round in bfloat16, in another order; an update's entries are near 0.1."""
    torch.manual_seed(0)
    shapes = ((12, 12), (12, 12), (48, 12), (12, 48), (12, 12))
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(weight.detach().clone()) for weight in ours]
    muon = Muon(ours, lr=0.02, weight_decay=0.1, momentum=0.9)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.9)
    for _ in range(5):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape)
            other.grad = mine.grad.clone()
        muon.step()
        reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-3)
    assert all(not torch.equal(weight.detach(), torch.zeros_like(weight)) for weight in ours), (
        "the comparison would hold for weights that were lost"
    )


def test_muon_leaves_all_as_it_is_where_the_gradient_is_not_finite() -> None:
    torch.manual_seed(0)
    matrix = nn.Parameter(torch.randn(8, 4))
    muon = Muon([matrix], lr=0.1, weight_decay=0.1, momentum=0.9)
    matrix.grad = torch.randn(8, 4)
    muon.step()
    weight, momentum = matrix.detach().clone(), muon.state[matrix]["momentum_buffer"].clone()
    matrix.grad = torch.full((8, 4), torch.nan)
    muon.step(is_skipped=torch.ones(()))
    assert torch.equal(matrix, weight)
    assert torch.equal(muon.state[matrix]["momentum_buffer"], momentum)


def test_adamw_leaves_all_as_it_is_where_the_step_is_skipped() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 4))
    adamw = FusedAdamW([weight], lr=0.1, weight_decay=0.1, fused=True)
    weight.grad = torch.randn(8, 4)
    adamw.step(is_skipped=torch.zeros(()))
    before = [weight.detach().clone(), *(t.clone() for t in adamw.state[weight].values())]
    weight.grad = torch.full((8, 4), torch.nan)
    adamw.step(is_skipped=torch.ones(()))
    after = [weight.detach(), *adamw.state[weight].values()]
    assert all(map(torch.equal, before, after))
