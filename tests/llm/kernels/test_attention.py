"""Every attention kernel equals eager attention, and the fastest that fits is chosen."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from llm.config import ModelConfig
from llm.data.packed import PADDING_ID
from llm.model.attention import Attend, eager_attention
from llm.model.attention_mask import boolean_mask, mask_rule
from llm.model.kernels import attention as kernels
from llm.model.kernels.attention import SDPA, AttentionKernels, Flex, ShortOnCPU, Varlen
from llm.model.loss import ModelWithLoss
from llm.model.transformer import Transformer
from tests.llm.training_setup import TINY

GROUPED = (2, 4, 2, 16)  # B sequences, H query heads, K key/value heads, D head width
FITTING = ModelConfig(d_model=64, num_heads=4, num_kv_heads=2)  # heads of that width


def heads(T: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Random q (B, H, T, D), k and v (B, K, T, D)."""
    B, H, K, D = GROUPED
    generator = torch.Generator().manual_seed(T)
    shapes = [(B, T, number, D) for number in (H, K, K)]
    drawn = [torch.randn(shape, generator=generator).transpose(1, 2) for shape in shapes]
    q, k, v = (x.to(device).detach().requires_grad_() for x in drawn)
    return q, k, v


def documents_of(*sequences: Sequence[int]) -> Tensor:
    """Document ids (B, T) of sequences given by the lengths of their documents."""
    ids = [[number for number, n in enumerate(lengths) for _ in range(n)] for lengths in sequences]
    return torch.tensor(ids)


def output_and_gradients(attend: Attend, T: int, device: str = "cpu") -> list[Tensor]:
    q, k, v = heads(T, device)
    mixed = attend(q, k, v, 0.0)
    weights = torch.linspace(-1, 1, mixed.numel(), device=device).view(mixed.shape)
    return [mixed, *torch.autograd.grad((mixed * weights).sum(), (q, k, v))]


def eager(mask: Tensor, cap: float = 0.0) -> Attend:
    return partial(eager_attention, mask=mask, cap=cap)


@pytest.mark.parametrize("is_causal", [True, False])
def test_varlen_equals_eager_attention_within_documents(is_causal: bool) -> None:
    documents = documents_of([5, 1, 20, 14], [40])
    mask = boolean_mask(mask_rule(is_causal, 0, documents), documents, documents)
    expected = output_and_gradients(eager(mask), 40)
    for kernel in (Varlen(documents, is_causal), SDPA(mask)):
        found = output_and_gradients(kernel, 40)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_causal", [True, False])
def test_sdpa_and_short_attention_equal_eager_attention(is_causal: bool) -> None:
    tokens = torch.zeros(2, 40, dtype=torch.long)
    mask = boolean_mask(mask_rule(is_causal, 0, None), tokens, None)
    expected = output_and_gradients(eager(mask), 40)
    refused: Any = None  # a sequence of 40 is short: the other kernel is not called
    for kernel in (SDPA(is_causal=is_causal), SDPA(mask), ShortOnCPU(refused, mask)):
        found = output_and_gradients(kernel, 40)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def on_cpu(**shape: Any) -> AttentionKernels:
    return AttentionKernels(replace(TINY, **shape))


@pytest.mark.parametrize(
    ("shape", "T", "documents", "kind"),
    [
        ({}, 300, False, SDPA),
        ({"is_causal": False}, 300, False, SDPA),
        ({}, 300, True, Varlen),
        ({}, 60, False, ShortOnCPU),
        ({}, 60, True, ShortOnCPU),  # so short that a mask is faster
        ({"sliding_window": 8}, 300, False, ShortOnCPU),
        ({"sliding_window": 300}, 300, False, SDPA),  # as wide as the sequence: no window
        ({"sliding_window": 8}, 300, True, ShortOnCPU),
        ({"attention_soft_cap": 5.0}, 300, False, partial),
        ({"attention_soft_cap": 5.0}, 300, True, partial),
    ],
)
def test_the_fastest_kernel_that_fits_is_chosen(
    shape: dict[str, Any], T: int, documents: bool, kind: type
) -> None:
    tokens = torch.zeros(1, T, dtype=torch.long)
    chosen = on_cpu(**shape).for_sequences(tokens, documents_of([T - 9, 9]) if documents else None)
    assert {type(kernel) for kernel in chosen.values()} == {kind}
    for kernel in chosen.values():
        assert not isinstance(kernel, SDPA) or kernel.mask is None
        assert not isinstance(kernel, partial) or kernel.func is eager_attention


@pytest.mark.parametrize(
    ("head_dim", "dropout", "kind"),
    [
        (16, 0.0, Flex),
        (20, 0.0, Flex),
        (8, 0.0, ShortOnCPU),
        (15, 0.0, ShortOnCPU),
        (16, 0.1, ShortOnCPU),
    ],
)
def test_flex_attention_is_chosen_for_the_heads_it_takes(
    head_dim: int, dropout: float, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU it refuses heads narrower than 16; here a CPU stands for one."""
    monkeypatch.setattr(kernels, "FLEX_DEVICES", ("cpu",))
    documents = documents_of([30, 10])
    for shape in ({}, {"sliding_window": 8}, {"is_causal": False}):
        chosen = on_cpu(head_dim=head_dim, dropout=dropout, positions="learned", **shape)
        (kernel,) = chosen.for_sequences(documents, documents).values()
        assert type(kernel) is kind
    (kernel,) = on_cpu(head_dim=head_dim).for_sequences(torch.zeros(1, 300), None).values()
    assert isinstance(kernel, SDPA) and kernel.mask is None, "without a mask it is faster still"


KERNELS: dict[str, dict[str, Any]] = {
    "SDPA with a mask": {"MAX_EAGER_POSITIONS": {torch.float32: 0}},
    "eager": {"MAX_EAGER_POSITIONS": {torch.float32: 999}},
    "varlen": {"MIN_VARLEN_POSITIONS": 1},
    "flex_attention": {"FLEX_DEVICES": ("cpu",)},
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("shape", [{}, {"is_causal": False}, {"positions": "learned"}])
@pytest.mark.parametrize("name", KERNELS)
def test_with_each_kernel_packed_documents_get_the_logits_of_each_alone(
    name: str, shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Transformer(replace(FITTING, num_layers=2, d_ff=48, **shape), 600, 64)
    with torch.no_grad():
        for parameter in model.parameters():  # large, so that an error shows
            parameter.normal_(0.5, 0.15) if parameter.ndim == 1 else parameter.normal_(0, 0.15)
    tokens = torch.randint(0, 600, (2, 40))
    ids = documents_of([12, 17, 11], [33, 7])
    ids[0, 29:] = ids[1, 33:] = PADDING_ID
    with torch.no_grad():
        alone = [model(part) for part in tokens[0, :29][None].split([12, 17], dim=1)]
        alone.append(model(tokens[1:, :33]))
        monkeypatch.setattr(kernels, "_compiled_flex_attention", lambda: flex_attention)
        for constant, value in KERNELS[name].items():
            monkeypatch.setattr(kernels, constant, value)
        packed = model(tokens, ids)
    found = [packed[:1, :12], packed[:1, 12:29], packed[1:, :33]]
    # sums in another order, and rotations by other positions of the same distance
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)


def test_each_window_has_its_kernel() -> None:
    chosen = on_cpu(num_layers=4, sliding_window=8, full_attention_every=2)
    found = chosen.for_sequences(torch.zeros(1, 30, dtype=torch.long), None)
    assert {window: type(kernel) for window, kernel in found.items()} == {
        0: ShortOnCPU,
        8: ShortOnCPU,
    }


RULES = [
    pytest.param(True, 0, True, id="documents"),
    pytest.param(True, 7, False, id="window"),
    pytest.param(True, 7, True, id="window and documents"),
    pytest.param(False, 7, True, id="not causal"),
]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("is_causal", "window", "has_documents"), RULES)
def test_flex_attention_equals_eager_attention(
    is_causal: bool, window: int, has_documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = documents_of([5, 1, 20, 14], [40])
    given = documents if has_documents else None
    rule = mask_rule(is_causal, window, given)
    monkeypatch.setattr(kernels, "_compiled_flex_attention", lambda: flex_attention)
    q, k, v = (x.detach() for x in heads(40))  # on a CPU it has no gradient
    mask = boolean_mask(rule, documents, given)
    for cap in (0.0, 2.0):
        flex = Flex(rule, len(mask), 40, torch.device("cpu"), cap)
        expected = eager_attention(q, k, v, mask=mask, cap=cap)
        # sums of 40 fp32 products in another order
        torch.testing.assert_close(flex(q, k, v, 0), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def gpu() -> torch.device:
    """A GPU, with nothing compiled yet: torch keeps few versions of a function."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    torch.compiler.reset()
    return torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # torch says what it would do faster in TF32
@pytest.mark.parametrize(("is_causal", "window", "has_documents"), RULES)
@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_flex_attention_on_a_gpu_equals_eager_attention(
    is_causal: bool, window: int, has_documents: bool, cap: float, gpu: torch.device
) -> None:
    documents = documents_of([50, 1, 200, 49], [300]).to(gpu)
    given = documents if has_documents else None
    rule = mask_rule(is_causal, window, given, gpu)
    mask = boolean_mask(rule, documents, given)
    config = replace(FITTING, is_causal=is_causal, sliding_window=window, attention_soft_cap=cap)
    (kernel,) = AttentionKernels(config).for_sequences(documents, given).values()
    assert isinstance(kernel, Flex)
    # fp32 sums of 300 products in another order, by a kernel that may use TF32
    torch.testing.assert_close(
        output_and_gradients(kernel, 300, "cuda"),
        output_and_gradients(eager(mask, cap), 300, "cuda"),
        rtol=1e-2,
        atol=1e-2,
    )


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"sliding_window": 40, "full_attention_every": 2},
        {"is_causal": False},
        pytest.param({"num_heads": 8}, id="heads too narrow for flex_attention"),
    ],
)
def test_a_model_compiled_for_a_gpu_attends_within_documents(
    shape: dict[str, Any], gpu: torch.device
) -> None:
    model = Transformer(replace(FITTING, num_layers=2, d_ff=48, **shape), 600, 300)
    with torch.no_grad():
        for parameter in model.parameters():  # large, so that an error shows
            parameter.normal_(0.5, 0.15) if parameter.ndim == 1 else parameter.normal_(0, 0.15)
    documents = documents_of([50, 1, 200, 49], [300])
    tokens = torch.randint(0, 600, documents.shape)

    def losses(module: ModelWithLoss) -> list[Tensor]:
        device = model.embedding.weight.device
        found = module(*(x.to(device) for x in (tokens, tokens.roll(-1, 1), documents)))
        gradients = torch.autograd.grad(found.mean(), list(model.parameters()))
        return [x.detach().cpu() for x in (found, *gradients)]

    expected = losses(ModelWithLoss(model))
    model.to(gpu)
    compiled = ModelWithLoss(model)
    compiled.compile()
    for module in (ModelWithLoss(model), compiled):
        for name, found, wanted in zip(
            ["losses", *dict(model.named_parameters())], losses(module), expected, strict=True
        ):
            # two layers of fp32 products, by kernels that may use TF32
            scale = float(wanted.abs().max())
            torch.testing.assert_close(
                found, wanted, rtol=5e-2, atol=2e-2 * scale, msg=lambda text, n=name: f"{n}: {text}"
            )
