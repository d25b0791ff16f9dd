"""Who may look at whom: one rule, however attention is computed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from llm.config import ModelConfig
from llm.data.packed import PADDING_ID
from llm.model import attention_mask as reach
from llm.model.attention_mask import (
    Attend,
    Flex,
    Masked,
    Segmented,
    Short,
    Sight,
    Unmasked,
    Written,
    boolean_mask,
    make_rule,
)
from llm.model.loss import ModelWithLoss
from llm.model.transformer import Transformer
from tests.llm.training_setup import TINY

GROUPED = (2, 4, 2, 16)  # B rows, H query heads, K key/value heads, D head width
FITTING = ModelConfig(d_model=64, num_heads=4, num_kv_heads=2)  # heads of that width


def heads(T: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Random q (B, H, T, D), k and v (B, K, T, D)."""
    B, H, K, D = GROUPED
    generator = torch.Generator().manual_seed(T)
    shapes = [(B, T, number, D) for number in (H, K, K)]
    drawn = [torch.randn(shape, generator=generator).transpose(1, 2) for shape in shapes]
    q, k, v = (x.to(device).detach().requires_grad_() for x in drawn)
    return q, k, v


def documents_of(*rows: Sequence[int]) -> Tensor:
    """Document ids (B, T) of rows given by the lengths of their documents."""
    ids = [[number for number, n in enumerate(lengths) for _ in range(n)] for lengths in rows]
    return torch.tensor(ids)


def output_and_gradients(attend: Attend, T: int, device: str = "cpu") -> list[Tensor]:
    q, k, v = heads(T, device)
    mixed = attend(q, k, v, 0.0)
    weights = torch.linspace(-1, 1, mixed.numel(), device=device).view(mixed.shape)
    return [mixed, *torch.autograd.grad((mixed * weights).sum(), (q, k, v))]


def test_document_by_document_equals_one_pass_with_a_mask() -> None:
    documents = documents_of([5, 1, 20, 14], [40])
    for is_causal in (True, False):
        mask = boolean_mask(make_rule(is_causal, 0, documents), documents, documents)
        found = output_and_gradients(Segmented(documents, is_causal), 40)
        expected = output_and_gradients(Masked(mask.unsqueeze(1)), 40)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_no_mask_equals_the_mask_of_the_rule() -> None:
    tokens = torch.zeros(2, 40, dtype=torch.long)
    for is_causal in (True, False):
        mask = boolean_mask(make_rule(is_causal, 0, None), tokens, None)
        found = output_and_gradients(Unmasked(is_causal), 40)
        expected = output_and_gradients(Masked(mask.unsqueeze(1)), 40)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    window=st.integers(0, 12),
    is_causal=st.booleans(),
    has_documents=st.booleans(),
)
def test_the_rule_is_what_it_says(
    lengths: list[int], window: int, is_causal: bool, has_documents: bool
) -> None:
    documents = documents_of(lengths, lengths[::-1])
    given = documents if has_documents else None
    T = documents.shape[1]
    found = boolean_mask(make_rule(is_causal, window, given), documents, given)
    for row in range(len(found)):
        for query in range(T):
            for key in range(T):
                allowed = (
                    (not is_causal or key <= query)
                    and (not window or abs(query - key) < window)
                    and (given is None or bool(given[row, query] == given[row, key]))
                )
                assert bool(found[row, query, key]) == allowed


def on_cpu(**shape: Any) -> Sight:
    return Sight(replace(TINY, **shape))


@pytest.mark.parametrize(
    ("shape", "T", "documents", "kind"),
    [
        ({}, 300, False, Unmasked),
        ({"is_causal": False}, 300, False, Unmasked),
        ({}, 300, True, Segmented),
        ({}, 60, False, Short),
        ({}, 60, True, Short),  # rows so short that a mask is faster
        ({"sliding_window": 8}, 300, False, Short),
        ({"sliding_window": 300}, 300, False, Unmasked),  # as wide as the row: no window
        ({"sliding_window": 8}, 300, True, Short),
        ({"attention_soft_cap": 5.0}, 300, False, Written),
        ({"attention_soft_cap": 5.0}, 300, True, Written),
    ],
)
def test_sight_chooses_the_fastest_way_that_is_right(
    shape: dict[str, Any], T: int, documents: bool, kind: type
) -> None:
    tokens = torch.zeros(1, T, dtype=torch.long)
    ways = on_cpu(**shape).over_rows(tokens, documents_of([T - 9, 9]) if documents else None)
    assert {type(way) for way in ways.values()} == {kind}


@pytest.mark.parametrize(
    ("head_dim", "dropout", "kind"),
    [(16, 0.0, Flex), (20, 0.0, Flex), (8, 0.0, Short), (15, 0.0, Short), (16, 0.1, Short)],
)
def test_where_flex_attention_is_fast_it_takes_the_heads_that_it_can(
    head_dim: int, dropout: float, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU it refuses heads narrower than 16; here a CPU stands for one."""
    monkeypatch.setattr(reach, "FLEX_DEVICES", ("cpu",))
    documents = documents_of([30, 10])
    for shape in ({}, {"sliding_window": 8}, {"is_causal": False}):
        sight = on_cpu(head_dim=head_dim, dropout=dropout, positions="learned", **shape)
        (way,) = sight.over_rows(documents, documents).values()
        assert type(way) is kind
    (way,) = on_cpu(head_dim=head_dim).over_rows(torch.zeros(1, 300), None).values()
    assert type(way) is Unmasked, "a kernel that knows the rule is faster still"


WAYS: dict[str, dict[str, Any]] = {
    "kernel with a mask": {"SHORT_POSITIONS": {torch.float32: 0}},
    "all scores written": {"SHORT_POSITIONS": {torch.float32: 999}},
    "document by document": {"SEGMENTED_POSITIONS": 1},
    "flex_attention": {"FLEX_DEVICES": ("cpu",)},
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("shape", [{}, {"is_causal": False}, {"positions": "learned"}])
@pytest.mark.parametrize("way", WAYS)
def test_each_way_scores_packed_and_padded_documents_as_each_alone(
    way: str, shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch
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
        monkeypatch.setattr(reach, "_compiled_flex_attention", lambda: flex_attention)
        for name, value in WAYS[way].items():
            monkeypatch.setattr(reach, name, value)
        packed = model(tokens, ids)
    found = [packed[:1, :12], packed[:1, 12:29], packed[1:, :33]]
    # sums in another order, and rotations by other positions of the same distance
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)


def test_layers_of_two_kinds_have_a_way_each() -> None:
    sight = on_cpu(num_layers=4, sliding_window=8, full_attention_every=2)
    ways = sight.over_rows(torch.zeros(1, 30, dtype=torch.long), None)
    assert {window: type(way) for window, way in ways.items()} == {0: Short, 8: Short}


RULES = [
    pytest.param(True, 0, True, id="documents"),
    pytest.param(True, 7, False, id="window"),
    pytest.param(True, 7, True, id="window and documents"),
    pytest.param(False, 7, True, id="both ways"),
]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("is_causal", "window", "has_documents"), RULES)
def test_flex_attention_reads_the_rule_as_the_mask_does(
    is_causal: bool, window: int, has_documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = documents_of([5, 1, 20, 14], [40])
    given = documents if has_documents else None
    rule = make_rule(is_causal, window, given)
    monkeypatch.setattr(reach, "_compiled_flex_attention", lambda: flex_attention)
    q, k, v = (x.detach() for x in heads(40))  # on a CPU it has no gradient
    mask = boolean_mask(rule, documents, given).unsqueeze(1)
    for cap in (0.0, 2.0):
        flex = Flex(rule, len(mask), 40, torch.device("cpu"), cap)
        plain = Written(mask, cap) if cap else Masked(mask)
        # sums of 40 fp32 products in another order
        torch.testing.assert_close(flex(q, k, v, 0), plain(q, k, v, 0), rtol=1e-5, atol=1e-5)


def test_a_block_mask_leaves_out_blocks_where_nobody_may_look() -> None:
    documents = documents_of([256, 256])
    mask = create_block_mask(make_rule(True, 0, documents), 1, None, 512, 512, device="cpu")
    assert mask.sparsity() > 50  # percent: of 16 blocks of 128, 6 hold something


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
def test_flex_attention_on_a_gpu_equals_the_mask(
    is_causal: bool, window: int, has_documents: bool, cap: float, gpu: torch.device
) -> None:
    documents = documents_of([50, 1, 200, 49], [300]).to(gpu)
    given = documents if has_documents else None
    rule = make_rule(is_causal, window, given, gpu)
    mask = boolean_mask(rule, documents, given).unsqueeze(1)
    config = replace(FITTING, is_causal=is_causal, sliding_window=window, attention_soft_cap=cap)
    (way,) = Sight(config).over_rows(documents, given).values()
    assert isinstance(way, Flex)
    plain = Written(mask, cap) if cap else Masked(mask)
    # fp32 sums of 300 products in another order, by a kernel that may use TF32
    torch.testing.assert_close(
        output_and_gradients(way, 300, "cuda"),
        output_and_gradients(plain, 300, "cuda"),
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
