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
from llm.model import reach
from llm.model.reach import (
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
from llm.model.transformer import Transformer
from tests.llm.training_setup import TINY

GROUPED = (2, 4, 2, 8)  # B rows, H query heads, K key/value heads, D head width


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


@pytest.mark.gpu
@pytest.mark.parametrize(("is_causal", "window", "has_documents"), RULES)
@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_flex_attention_on_a_gpu_equals_the_mask(
    is_causal: bool, window: int, has_documents: bool, cap: float
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    documents = documents_of([50, 1, 200, 49], [300]).to("cuda")
    given = documents if has_documents else None
    rule = make_rule(is_causal, window, given, "cuda")
    mask = boolean_mask(rule, documents, given).unsqueeze(1)
    config = ModelConfig(is_causal=is_causal, sliding_window=window, attention_soft_cap=cap)
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
@pytest.mark.parametrize("shape", [{}, {"sliding_window": 40, "full_attention_every": 2}])
def test_a_model_compiled_for_a_gpu_attends_within_documents(shape: dict[str, Any]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    model = Transformer(replace(TINY, d_model=64, **shape), 600, 300)
    with torch.no_grad():
        for parameter in model.parameters():  # large, so that an error shows
            parameter.normal_(0.5, 0.15) if parameter.ndim == 1 else parameter.normal_(0, 0.15)
    documents = documents_of([50, 1, 200, 49], [300])
    tokens = torch.randint(0, 600, documents.shape)
    expected = model(tokens, documents)
    model.to("cuda")
    found = torch.compile(model)(tokens.to("cuda"), documents.to("cuda"))
    # two layers of fp32 products, by kernels that may use TF32
    torch.testing.assert_close(found.cpu(), expected, rtol=5e-2, atol=5e-2)
