"""The transformer: equal to transformers', blind to the future, its cache exact."""

import math
from dataclasses import asdict
from typing import Any

import pytest
import torch

from llm.config import ModelConfig
from llm.errors import ConfigError, DataError
from llm.model.cache import KeyValueCache
from llm.model.loss import token_losses
from llm.model.transformer import Transformer
from tests.llm.training_setup import SEQ_LEN, TINY, tiny_model

# Names here -> names in transformers' LlamaForCausalLM.
LLAMA_NAMES = {
    "embedding": "model.embed_tokens",
    "blocks": "model.layers",
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    "attention": "self_attn",
    "feed_forward": "mlp",
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "output": "o_proj",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
SHAPES: dict[str, dict[str, Any]] = {
    "multi-head, tied": {"num_kv_heads": 4},
    "grouped, tied": {"num_kv_heads": 2},
    "one key head, untied": {"num_kv_heads": 1, "tie_embeddings": False},
    "wide, far base, other eps": {"d_model": 48, "num_heads": 6, "num_kv_heads": 3}
    | {"rope_theta": 500_000.0, "norm_eps": 1e-6, "d_ff": 100, "num_layers": 3},
}


def random_tokens(*shape: int, seed: int = 0, vocab_size: int = 600) -> torch.Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def spread_weights(model: Transformer) -> None:
    """Make weights large and norms uneven, so that an error anywhere shows in the logits."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0.0, 0.15, generator=generator)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("vocab_size", [640, 601], ids=["whole", "padded"])
def test_logits_equal_those_of_transformers(shape: dict[str, Any], vocab_size: int) -> None:
    transformers = pytest.importorskip("transformers")
    model = tiny_model(vocab_size=vocab_size, **shape)
    spread_weights(model)
    config = model.config
    oracle = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=SEQ_LEN,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="eager",
        )
    ).eval()
    weights = {llama_name(name): tensor for name, tensor in model.state_dict().items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:vocab_size]
    oracle.load_state_dict(weights)
    tokens = random_tokens(3, SEQ_LEN, vocab_size=vocab_size)
    with torch.no_grad():
        expected = oracle(tokens).logits
        found = model(tokens)
    assert found.shape == (3, SEQ_LEN, vocab_size)
    # sums of a few hundred fp32 products in another order; the logits are of order 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def llama_name(name: str) -> str:
    return ".".join(LLAMA_NAMES.get(part, part) for part in name.split("."))


def test_no_logit_depends_on_a_later_token() -> None:
    model = tiny_model()
    spread_weights(model)
    tokens = random_tokens(1, SEQ_LEN)
    with torch.no_grad():
        before = model(tokens)
        for position in range(1, SEQ_LEN):
            changed = tokens.clone()
            changed[0, position] = (changed[0, position] + 1) % 600
            after = model(changed)
            assert torch.equal(before[:, :position], after[:, :position])
            assert not torch.equal(before[:, position], after[:, position])


def test_with_document_ids_packed_documents_score_as_each_alone() -> None:
    model = tiny_model()
    spread_weights(model)
    first, second = random_tokens(1, 12, seed=1), random_tokens(1, 20, seed=2)
    packed = torch.cat([first, second], dim=1)
    ids = torch.tensor([[0] * 12 + [1] * 20])
    with torch.no_grad():
        found = model(packed, ids)
        alone = torch.cat([model(first), model(second)], dim=1)
        assert not torch.allclose(model(packed)[:, 12:], alone[:, 12:], atol=1e-3)
    # rotations by other absolute, equal relative positions differ in the last bits
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_logits_through_the_cache_equal_those_of_one_pass(num_kv_heads: int) -> None:
    model = tiny_model(num_kv_heads=num_kv_heads)
    spread_weights(model)
    tokens = random_tokens(2, SEQ_LEN)
    with torch.no_grad():
        whole = model(tokens)
        cache = KeyValueCache(model.config, 2, SEQ_LEN)
        sizes = [5, 1, 1, 9, 1, 15]
        parts = [model(part, cache=cache) for part in tokens.split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)


def test_the_vocabulary_is_padded_inside_and_nowhere_else() -> None:
    model = tiny_model(vocab_size=601)
    assert model.embedding.num_embeddings == 640
    assert model.embedding.weight[601:].abs().max() == 0
    loss = model(random_tokens(2, 8)).logsumexp(-1).sum()
    loss.backward()
    assert model.embedding.weight.grad is not None
    assert model.embedding.weight.grad[601:].abs().max() == 0  # so they stay zero


@pytest.mark.parametrize("is_tied", [True, False])
def test_num_parameters_counts_what_is_stored(is_tied: bool) -> None:
    model = tiny_model(vocab_size=601, tie_embeddings=is_tied)
    C, F, L, D = TINY.d_model, TINY.d_ff, TINY.num_layers, TINY.d_model // TINY.num_heads
    attention = 2 * C * C + 2 * C * TINY.num_kv_heads * D
    expected = L * (attention + 3 * C * F + 2 * C) + C + (1 if is_tied else 2) * 601 * C
    assert model.num_parameters() == expected


def test_first_weights_have_the_deviations_they_should_and_the_first_loss_is_uniform() -> None:
    model = tiny_model(d_model=128, d_ff=512, num_layers=8)
    down = torch.cat([block.feed_forward.down.weight.flatten() for block in model.blocks])
    gate = torch.cat([block.feed_forward.gate.weight.flatten() for block in model.blocks])
    assert gate.std().item() == pytest.approx(0.02, rel=0.02)
    assert down.std().item() == pytest.approx(0.02 / 4, rel=0.02)  # sqrt(2 * 8) = 4
    with torch.no_grad():
        losses = token_losses(model(random_tokens(8, 32)), random_tokens(8, 32, seed=9))
    assert losses.mean().item() == pytest.approx(math.log(600), rel=0.02)


def test_equal_seeds_give_equal_weights_and_others_do_not() -> None:
    first, same, other = tiny_model(seed=1), tiny_model(seed=1), tiny_model(seed=2)
    assert all(map(torch.equal, first.parameters(), same.parameters()))
    assert not torch.equal(first.embedding.weight, other.embedding.weight)


def test_more_tokens_than_the_context_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(DataError, match=f"found {SEQ_LEN + 1} tokens.*context of {SEQ_LEN}"):
        model(random_tokens(1, SEQ_LEN + 1))
    cache = KeyValueCache(model.config, 1, SEQ_LEN)
    model(random_tokens(1, SEQ_LEN), cache=cache)
    with pytest.raises(DataError, match="context"):
        model(random_tokens(1, 1), cache=cache)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"d_model": 34}, "model.d_model: found 34"),
        ({"d_model": 12}, "model.d_model: found 12, which makes heads 3 wide, expected an even"),
        ({"num_kv_heads": 3}, "model.num_kv_heads: found 3"),
    ],
)
def test_impossible_shapes_are_refused_by_name(shape: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Transformer(ModelConfig(**{**asdict(TINY), **shape}), 600, SEQ_LEN)
