"""Masks equal their rule, pair by pair, in whole sequences and over a cache."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from llm.model.attention_mask import boolean_mask, cache_mask, mask_rule


def documents_of(*sequences: Sequence[int]) -> Tensor:
    """Document ids (B, T) of sequences given by the lengths of their documents."""
    ids = [[number for number, n in enumerate(lengths) for _ in range(n)] for lengths in sequences]
    return torch.tensor(ids)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    window=st.integers(0, 12),
    is_causal=st.booleans(),
    has_documents=st.booleans(),
)
def test_the_mask_of_a_sequence_allows_what_the_settings_say(
    lengths: list[int], window: int, is_causal: bool, has_documents: bool
) -> None:
    documents = documents_of(lengths, lengths[::-1])
    given = documents if has_documents else None
    T = documents.shape[1]
    found = boolean_mask(mask_rule(is_causal, window, given), documents, given)
    assert found.shape == (len(documents) if has_documents else 1, 1, T, T)
    for sequence in range(len(found)):
        for query in range(T):
            for key in range(T):
                allowed = (
                    (not is_causal or key <= query)
                    and (not window or abs(query - key) < window)
                    and (given is None or bool(given[sequence, query] == given[sequence, key]))
                )
                assert bool(found[sequence, 0, query, key]) == allowed


@pytest.mark.parametrize("window", [0, 3])
def test_the_mask_over_a_cache_counts_from_each_querys_position(window: int) -> None:
    positions = torch.tensor([[4, 5], [1, 2]])
    found = cache_mask(window, positions, 6)
    assert found.shape == (2, 1, 2, 6)
    for sequence, query in ((b, t) for b in range(2) for t in range(2)):
        position = int(positions[sequence, query])
        expected = [key <= position and (not window or position - key < window) for key in range(6)]
        assert found[sequence, 0, query].tolist() == expected


def test_a_block_mask_leaves_out_blocks_without_allowed_pairs() -> None:
    documents = documents_of([256, 256])
    mask = create_block_mask(mask_rule(True, 0, documents), 1, None, 512, 512, device="cpu")
    assert mask.sparsity() > 50  # percent: of 16 blocks of 128, 6 hold an allowed pair
