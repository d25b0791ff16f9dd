"""Noise on embeddings has the distribution of its paper; new tokens start as the mean of others."""

import numpy as np
import pytest
import torch

from llm.model.transformer import Transformer
from llm.tokenizer.bpe import ByteLevelBPE
from llm.training.embeddings import EmbeddingNoise, set_to_mean, untrained_tokens
from tests.llm.training_setup import tiny_model

BOS, PAD = 1, 0
NOISE = EmbeddingNoise(alpha=5.0, bos_id=BOS, pad_id=PAD)
# the end of a document, two whole ones, padding; one document; padding alone
TOKENS = torch.tensor(
    [[7, 8, BOS, 5, 6, 7, BOS, 9, PAD, PAD], [BOS, *range(2, 11)], [PAD] * 10]
)  # fmt: skip


def noise_of(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """What the embeddings differ by from the plain ones, (B, T, C)."""
    return (model.embedding(tokens) - model.embedding.weight[tokens]).detach()


def test_the_length_is_that_of_the_document_within_the_sequence() -> None:
    lengths = NOISE.document_lengths(TOKENS)
    assert lengths[0, :8].tolist() == [2, 2, 4, 4, 4, 4, 2, 2]
    assert lengths[1].tolist() == [10] * 10
    assert lengths.min() >= 1


def test_noise_is_uniform_within_the_papers_size_for_each_document() -> None:
    model = tiny_model(d_model=64)
    NOISE.add_to(model)
    torch.manual_seed(0)
    noise = torch.stack([noise_of(model, TOKENS) for _ in range(500)])  # (500, B, T, C)
    for row, start, length in ((0, 0, 2), (0, 2, 4), (1, 0, 10)):
        found = noise[:, row, start : start + length]
        bound = 5.0 / (length * 64) ** 0.5
        assert 0.999 * bound < found.abs().max() <= bound * (1 + 1e-5)
        # 64,000 draws and more: the standard errors are 0.23 % and 0.18 % of the bound
        assert found.mean().abs() < 0.01 * bound
        assert found.std() == pytest.approx(bound / 3**0.5, rel=0.01)
        shares = torch.histc(found, bins=10, min=-bound, max=bound) / found.numel()
        assert shares.tolist() == pytest.approx([0.1] * 10, abs=0.008)


def test_there_is_none_in_evaluation_and_another_one_at_each_call() -> None:
    model = tiny_model()
    plain = model.eval()(TOKENS)
    NOISE.add_to(model)
    assert torch.equal(model(TOKENS), plain)
    model.train()
    first, second = noise_of(model, TOKENS), noise_of(model, TOKENS)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    third = noise_of(model, TOKENS)
    torch.manual_seed(3)
    assert torch.equal(noise_of(model, TOKENS), third)


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_new_tokens_start_as_the_mean_of_text_tokens(
    tie_embeddings: bool, tokenizer: ByteLevelBPE
) -> None:
    model = tiny_model(vocab_size=tokenizer.vocab_size, tie_embeddings=tie_embeddings)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    tokens = untrained_tokens(tokenizer, is_causal=True)
    assert tokens == [id for id in tokenizer.control_ids if id != tokenizer.bos_id]
    masked = untrained_tokens(tokenizer, is_causal=False)
    assert set(tokens) - set(masked) == {tokenizer.mask_id}
    text = np.flatnonzero(tokenizer.token_bytes).tolist()
    set_to_mean(model, tokens, text)
    changed = {"embedding.weight"} | ({"head.weight"} - {"head.weight" * tie_embeddings})
    for name, weight in model.named_parameters():
        if name not in changed:
            assert torch.equal(weight, before[name]), name
            continue
        mean = before[name][text].mean(dim=0)
        torch.testing.assert_close(weight[tokens], mean.expand(len(tokens), -1))
        others = torch.ones(len(weight), dtype=torch.bool)
        others[tokens] = False
        assert torch.equal(weight[others], before[name][others])
