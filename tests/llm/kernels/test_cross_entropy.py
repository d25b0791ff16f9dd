"""The chunked loss equals `token_losses` of whole logits, in value and in every gradient."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from llm.config import ModelConfig
from llm.model.kernels import cross_entropy
from llm.model.loss import IGNORED, ModelWithLoss, token_losses
from llm.model.transformer import Transformer

V, T = 70, 12  # not a multiple of 64, so that the head has rows that are no tokens
W = 128  # with these
SMALL = ModelConfig(num_layers=1, d_model=16, num_heads=2, num_kv_heads=2, d_ff=24)
CAPPED = ModelConfig(
    num_layers=1, d_model=16, num_heads=2, num_kv_heads=2, d_ff=24, logit_soft_cap=2.0
)
UNTIED = ModelConfig(
    num_layers=1, d_model=16, num_heads=2, num_kv_heads=2, d_ff=24, tie_embeddings=False
)
Gradients = dict[str, Tensor]


@pytest.fixture
def tiny_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut every few positions, unevenly."""
    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", 1)
    monkeypatch.setattr(cross_entropy, "MIN_CHUNK_POSITIONS", 7)
    monkeypatch.setitem(cross_entropy.SOFTMAX_LOGITS, "cpu", 3 * V)


def make_model(config: ModelConfig = SMALL, std: float = 0.5) -> Transformer:
    """Weights large enough for losses from near 0 to far above ln V; padding is not zero."""
    model = Transformer(config, V, T)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, std, generator=generator)
    return model


def make_batch(rows: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, V, (rows, T + 1), generator=generator)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[1, 4:] = IGNORED
    targets[2] = IGNORED
    return inputs, targets


def plain(model: Transformer, inputs: Tensor, targets: Tensor) -> Tensor:
    return token_losses(model(inputs), targets)


def gradients(
    model: Transformer, losses: Tensor, reduce: Callable[[Tensor], Tensor] = torch.sum
) -> Gradients:
    model.zero_grad()
    reduce(losses).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


WEIGHTS = torch.randn(3, T, generator=torch.Generator().manual_seed(3))
REDUCTIONS = {"sum": torch.sum, "mean": torch.mean, "weighted": lambda x: (x * WEIGHTS).sum()}


@pytest.mark.usefixtures("tiny_chunks")
@pytest.mark.parametrize("positions", ["targets", "all"], ids=["as_on_a_cpu", "as_on_a_gpu"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("config", [SMALL, CAPPED, UNTIED], ids=["tied", "capped", "untied"])
def test_losses_and_all_gradients_equal_those_of_whole_logits(
    config: ModelConfig, reduction: str, positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if positions == "all":
        monkeypatch.setattr(
            cross_entropy, "_target_positions", lambda targets: torch.arange(len(targets))
        )
    model, batch = make_model(config), make_batch()
    reduce = REDUCTIONS[reduction]
    found, expected = ModelWithLoss(model)(*batch, None), plain(model, *batch)
    # fp32 sums of up to 70 numbers in another order
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)
    mine, theirs = gradients(model, found, reduce), gradients(model, expected, reduce)
    assert mine.keys() == theirs.keys() == dict(model.named_parameters()).keys()
    for name in mine:
        scale = float(theirs[name].abs().max())
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=1e-6 * scale)


@given(
    num_positions=st.integers(1, 9),
    vocab_size=st.integers(1, 9),
    cap=st.sampled_from([0.0, 1.5]),
    is_weighted=st.booleans(),
    is_grad_early=st.booleans(),
    data=st.data(),
)
def test_gradients_are_those_of_finite_differences(
    num_positions: int,
    vocab_size: int,
    cap: float,
    is_weighted: bool,
    is_grad_early: bool,
    data: st.DataObject,
) -> None:
    ids = st.sampled_from([IGNORED, *range(vocab_size)])
    wanted = data.draw(st.lists(ids, min_size=num_positions, max_size=num_positions))
    targets = torch.tensor(wanted)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_positions, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(
        vocab_size + 2, 3, dtype=torch.float64, generator=generator, requires_grad=True
    )
    head = cross_entropy._Head(
        vocab_size=vocab_size,
        soft_cap=cap,
        temperature=1.0,
        dtype=torch.float64,
        is_grad_early=is_grad_early,
        is_compiled=False,
    )

    def reduced(x: Tensor, weight: Tensor) -> Tensor:
        losses = cross_entropy._HeadLosses.apply(x, weight, targets, head)
        assert isinstance(losses, Tensor)
        return (losses * torch.arange(num_positions) if is_weighted else losses).sum()

    assert torch.autograd.gradcheck(reduced, (x, weight))


@pytest.mark.filterwarnings("default")  # torch's own tracing does what torch warns of
@pytest.mark.usefixtures("tiny_chunks")
@pytest.mark.parametrize("is_compiled", [False, True], ids=["", "compiled"])
def test_training_walks_over_the_logits_once(
    is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks = seen_walks(monkeypatch)
    compiled_losses = torch.compile(cross_entropy._softmax_losses, backend="eager")
    monkeypatch.setattr(cross_entropy, "_compiled_softmax_losses", lambda: compiled_losses)
    module = ModelWithLoss(make_model())
    if is_compiled:
        module.compile(backend="eager")
    (module(*make_batch(), None).sum() / 17 * 2).backward()
    assert walks == [(True, True)]


def test_weighted_losses_take_their_gradient_once_their_weights_are_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    walks, model, batch = seen_walks(monkeypatch), make_model(), make_batch()
    weights = torch.linspace(-1, 2, batch[1].numel()).view_as(batch[1])
    losses = ModelWithLoss(model)(*batch, None, is_weighted=True)
    found = gradients(model, losses * weights)
    assert walks == [(False, False), (True, True)], "no gradient is computed to be thrown away"
    for name, wanted in gradients(model, plain(model, *batch) * weights).items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-5)


def test_going_backward_twice_gives_the_same_gradient_twice() -> None:
    model = make_model()
    total = ModelWithLoss(model)(*make_batch(), None).sum()
    total.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[name], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("tiny_chunks")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_gradient_is_as_near_to_fp32_as_that_of_whole_logits(
    dtype: torch.dtype,
) -> None:
    model, batch = make_model(), make_batch()
    exact = gradients(model, plain(model, *batch))
    with torch.autocast("cpu", dtype):
        found, whole = ModelWithLoss(model)(*batch, None), plain(model, *batch)
    mine, theirs = gradients(model, found), gradients(model, whole)
    assert found.dtype == torch.float32
    for name, wanted in exact.items():
        far = (theirs[name] - wanted).norm()
        # both round every factor; the sum over chunks is rounded once here, in fp32
        assert (mine[name] - wanted).norm() <= 1.3 * far + 1e-6 * wanted.norm(), name


def test_where_nothing_is_learned_there_is_no_loss_and_no_gradient() -> None:
    model = make_model()
    inputs, targets = make_batch()
    losses = ModelWithLoss(model)(inputs, torch.full_like(targets, IGNORED), None)
    assert losses.abs().max() == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients(model, losses).values())


@pytest.mark.usefixtures("tiny_chunks")
@pytest.mark.parametrize("cap", [0.0, 2.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_padding_of_the_vocabulary_is_no_choice_and_learns_nothing(
    cap: float, reduction: str
) -> None:
    model = make_model(replace(UNTIED, logit_soft_cap=cap))
    inputs, targets = make_batch()
    before = ModelWithLoss(model)(inputs, targets, None)
    with torch.no_grad():
        model.head.weight[V:] = 1e4
    after = ModelWithLoss(model)(inputs, targets, None)
    assert torch.equal(before, after)
    found = gradients(model, after, REDUCTIONS[reduction])["head.weight"]
    assert found[V:].abs().max() == 0 and found[:V].abs().max() > 0


@pytest.mark.usefixtures("tiny_chunks")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_product_with_the_head_has_the_padded_width(
    reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []

    def seen(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def called(left: Tensor, right: Tensor) -> Tensor:
            shapes.extend((left.shape, right.shape))
            return function(left, right)

        return called

    for name in ("product", "transposed_product"):
        monkeypatch.setattr(cross_entropy, name, seen(getattr(cross_entropy, name)))
    monkeypatch.setitem(
        cross_entropy.SOFTMAX_LOGITS, "cpu", 1 << 20
    )  # products are not cut in blocks
    model = make_model()
    gradients(model, ModelWithLoss(model)(*make_batch(), None), REDUCTIONS[reduction])
    assert len(model.head.weight) == W
    assert shapes and all(W in shape or SMALL.d_model in shape for shape in shapes)
    assert not any(V in shape for shape in shapes)


@pytest.mark.filterwarnings("default")  # torch's own tracing does what torch warns of
@pytest.mark.usefixtures("tiny_chunks")
@pytest.mark.parametrize(
    ("dtype", "is_whole"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
    ids=["fp32", "bf16", "by torch.compile of the whole module"],
)
def test_compiled_it_keeps_no_logits_from_forward_to_backward(
    dtype: torch.dtype, is_whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: all positions are computed, in several chunks, and the cut into forward and
    backward is that of Inductor. No code is generated.
    """
    outputs: list[tuple[int, ...]] = []

    def record(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        [results] = (node.args[0] for node in graph.graph.nodes if node.op == "output")
        values = [node.meta["val"] for node in results if isinstance(node, torch.fx.Node)]
        outputs.extend(tuple(value.shape) for value in values if isinstance(value, Tensor))
        return make_boxed_func(graph.forward)

    cut = min_cut_rematerialization_partition
    backend = aot_autograd(fw_compiler=record, bw_compiler=record, partition_fn=cut)
    compiled_losses = torch.compile(cross_entropy._softmax_losses, backend="aot_eager")
    monkeypatch.setattr(cross_entropy, "_compiled_softmax_losses", lambda: compiled_losses)
    monkeypatch.setattr(
        cross_entropy, "_target_positions", lambda targets: torch.arange(len(targets))
    )
    model, batch = make_model(), make_batch()
    module: Any = ModelWithLoss(model)
    if is_whole:
        module = torch.compile(module, backend=backend)
    else:
        module.compile(backend=backend)
    saved: list[tuple[int, ...]] = []
    keep = saved_tensors_hooks(lambda x: (saved.append(tuple(x.shape)), x)[1], lambda x: x)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        with keep:
            found = module(*batch, None)
        expected = plain(model, *batch)
    mine, theirs = gradients(model, found), gradients(model, expected)
    assert outputs and saved
    weights = (W, SMALL.d_model)
    assert not [s for s in outputs + saved if {V, W} & set(s) and s != weights]
    # the same products, in other types where autocast has a say
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for name in mine:
        scale = float(theirs[name].abs().max())
        torch.testing.assert_close(mine[name], theirs[name], rtol=tolerance, atol=tolerance * scale)


def test_frozen_weights_get_no_gradient_and_pass_one_on() -> None:
    model, batch = make_model(UNTIED), make_batch()
    expected = gradients(model, plain(model, *batch))
    model.head.weight.requires_grad_(False)
    model.head.weight.grad = None
    found = gradients(model, ModelWithLoss(model)(*batch, None))
    assert "head.weight" not in found
    torch.testing.assert_close(
        found["embedding.weight"], expected["embedding.weight"], rtol=1e-5, atol=1e-5
    )


def test_without_gradients_the_losses_are_the_same() -> None:
    model, batch = make_model(), make_batch()
    with torch.no_grad():
        measured = ModelWithLoss(model)(*batch, None)
    assert torch.equal(measured, ModelWithLoss(model)(*batch, None))


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_sure_and_wrong_models_have_finite_exact_losses(scale: float) -> None:
    """A chance far below the smallest number of fp32 still has its logarithm."""
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(5))
    weight = torch.randn(V, 8, generator=torch.Generator().manual_seed(6)) * scale
    targets = torch.arange(40)
    head = cross_entropy._Head(
        vocab_size=V,
        soft_cap=0.0,
        temperature=1.0,
        dtype=torch.float32,
        is_grad_early=False,
        is_compiled=False,
    )
    found = cross_entropy._HeadLosses.apply(x, weight, targets, head)
    expected = F.cross_entropy(x.double() @ weight.double().T, targets, reduction="none")
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * max(1, scale / 10))


def seen_walks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """A list that grows by the gradients asked for, of hidden states and weight, at each walk."""
    walks: list[tuple[bool, bool]] = []
    walk = cross_entropy._walk

    def seen(*arguments: Any) -> Any:
        walks.append(arguments[-1])
        return walk(*arguments)

    monkeypatch.setattr(cross_entropy, "_walk", seen)
    return walks
