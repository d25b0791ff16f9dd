"""The transformer equals transformers' and its own plain parts, and never sees later tokens."""

import math
from dataclasses import asdict
from functools import partial
from typing import Any

import pytest
import torch

from llm.config import ModelConfig
from llm.data.packed import PADDING_ID
from llm.errors import ConfigError, DataError
from llm.model import norms
from llm.model.attention import Attend, eager_attention
from llm.model.attention_mask import boolean_mask, mask_rule
from llm.model.cache import KeyValueCache
from llm.model.kernels.attention import AttentionKernels
from llm.model.kernels.linear import JoinedLinear, Linear
from llm.model.loss import ModelWithLoss, token_losses
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


# Every choice of the settings, alone and as whole families; the rest is TINY's.
CHOICES: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "multi-query, wide heads": {"num_kv_heads": 1, "head_dim": 20},
    "odd heads, learned positions": {"positions": "learned", "d_model": 28},
    "rope scaled as in llama3": {"rope_scaling": "llama3", "rope_original_seq_len": 16},
    "layernorm": {"norm": "layernorm"},
    "layernorm with biases": {"norm": "layernorm", "has_biases": True},
    "normalized queries and keys": {"has_qk_norm": True},
    "geglu, scaled embedding": {"mlp": "geglu", "is_embedding_scaled": True},
    "gelu": {"mlp": "gelu"},
    "squared relu": {"mlp": "relu2", "tie_embeddings": False},
    "soft caps": {"attention_soft_cap": 3.0, "logit_soft_cap": 2.0},
    "sliding in every layer": {"sliding_window": 5},
    "sliding and full layers": {"sliding_window": 5, "full_attention_every": 2},
    "window, cap and grouped heads": {"sliding_window": 3, "attention_soft_cap": 2.0},
    "gpt2": {"positions": "learned", "norm": "layernorm", "mlp": "gelu", "has_biases": True}
    | {"num_kv_heads": 4},
}
NOT_CAUSAL: dict[str, dict[str, Any]] = {
    "not causal": {"is_causal": False},
    "not causal, sliding": {"is_causal": False, "sliding_window": 4, "has_qk_norm": True},
}


def three_documents() -> torch.Tensor:
    """Document ids of two sequences."""
    return torch.tensor([[0] * 5 + [1] * 1 + [2] * (SEQ_LEN - 6), [2] * 9 + [3] * (SEQ_LEN - 9)])


def use_plain_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace every kernel by the plain version in the book."""

    def eager(
        self: AttentionKernels, tokens: torch.Tensor, document_ids: torch.Tensor | None
    ) -> dict[int, Attend]:
        masks = {
            window: boolean_mask(
                mask_rule(self._is_causal, window, document_ids), tokens, document_ids
            )
            for window in self._windows
        }
        return {
            window: partial(eager_attention, mask=mask, cap=self._soft_cap)
            for window, mask in masks.items()
        }

    def each_alone(self: JoinedLinear, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)

    monkeypatch.setattr(AttentionKernels, "for_sequences", eager)
    monkeypatch.setattr(JoinedLinear, "__call__", each_alone)
    monkeypatch.setattr(Linear, "forward", torch.nn.Linear.forward)
    monkeypatch.setattr(norms, "fused_rms_norm", norms.rms_norm)


@pytest.mark.parametrize("has_documents", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize("name", CHOICES | NOT_CAUSAL)
def test_losses_logits_and_gradients_with_kernels_equal_those_of_the_plain_book(
    name: str, has_documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(vocab_size=70, **(CHOICES | NOT_CAUSAL)[name])
    spread_weights(model)
    inputs, targets = (random_tokens(2, SEQ_LEN, seed=seed, vocab_size=70) for seed in (0, 3))
    documents = three_documents() if has_documents else None

    def gradients(losses: torch.Tensor) -> dict[str, torch.Tensor]:
        found = torch.autograd.grad(losses.mean(), list(model.parameters()))
        return dict(zip(dict(model.named_parameters()), found, strict=True))

    found, losses = model(inputs, documents), ModelWithLoss(model)(inputs, targets, documents)
    found_gradients = gradients(losses)
    use_plain_versions(monkeypatch)
    expected = model(inputs, documents)
    plain_losses = token_losses(expected, targets)
    # sums of tens of fp32 products in another order; the logits are of order 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses, plain_losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_gradients, gradients(plain_losses), rtol=1e-4, atol=1e-6)


def test_a_logit_cap_caps_the_logits_of_the_head() -> None:
    model = tiny_model(logit_soft_cap=2.0)
    spread_weights(model)
    with torch.no_grad():
        x = model.hidden_states(random_tokens(2, 8))
        plain = x @ model.head.weight[:600].T
        torch.testing.assert_close(model.logits(x), 2.0 * torch.tanh(plain / 2.0))


@pytest.mark.parametrize("num_padding", [0, 9])
@pytest.mark.parametrize("name", CHOICES | NOT_CAUSAL)
def test_packed_documents_get_the_logits_of_each_alone(name: str, num_padding: int) -> None:
    model = tiny_model(**(CHOICES | NOT_CAUSAL)[name])
    spread_weights(model)
    lengths = 8, SEQ_LEN - 8 - num_padding
    first, second = (random_tokens(1, length, seed=length) for length in lengths)
    packed = torch.cat([first, second, torch.full((1, num_padding), 5)], dim=1)
    ids = torch.tensor([[0] * lengths[0] + [1] * lengths[1] + [PADDING_ID] * num_padding])
    num_tokens = sum(lengths)
    with torch.no_grad():
        found = model(packed, ids)[:, :num_tokens]
        alone = torch.cat([model(first), model(second)], dim=1)
        assert not torch.allclose(model(packed)[:, 8:num_tokens], alone[:, 8:], atol=1e-3)
    # rotations by other absolute, equal relative positions differ in the last bits
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CHOICES)
def test_logits_through_the_cache_equal_those_of_one_pass(name: str) -> None:
    model = tiny_model(**CHOICES[name])
    spread_weights(model)
    tokens = random_tokens(2, SEQ_LEN)
    with torch.no_grad():
        whole = model(tokens)
        cache = KeyValueCache(model.config, 2, SEQ_LEN)
        sizes = [5, 1, 1, 9, 1, 15]
        parts = [model(part, cache=cache) for part in tokens.split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)


def test_a_model_that_is_not_causal_takes_no_cache() -> None:
    model = tiny_model(is_causal=False)
    with pytest.raises(ConfigError, match=r"model.is_causal: found false, expected true"):
        model(random_tokens(1, 4), cache=KeyValueCache(model.config, 1, 4))


@pytest.mark.parametrize("shape", [{}, {"attention_soft_cap": 3.0}], ids=["plain", "capped"])
def test_dropout_acts_in_training_alone_and_keeps_the_mean(shape: dict[str, Any]) -> None:
    model = tiny_model(dropout=0.2, **shape)
    undropped = tiny_model(**shape)
    tokens = random_tokens(2, SEQ_LEN)
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens), undropped(tokens))
        model.train()
        torch.manual_seed(5)
        first, second = model.hidden_states(tokens), model.hidden_states(tokens)
        torch.manual_seed(5)
        assert torch.equal(model.hidden_states(tokens), first)
    assert not torch.equal(first, second)
    for name in ("attention", "stream", "embedding"):
        assert drops(name, shape), f"{name} is not dropped"


def drops(where: str, shape: dict[str, Any]) -> bool:
    """Return whether dropout here alone changes the logits."""
    model = tiny_model(dropout=0.2, **shape).train()
    spread_weights(model)
    for block in model.blocks:
        block.attention.dropout = 0.2 if where == "attention" else 0.0
        block.dropout.p = 0.2 if where == "stream" else 0.0
    model.dropout.p = 0.2 if where == "embedding" else 0.0
    tokens = random_tokens(2, SEQ_LEN)
    with torch.no_grad():
        return not torch.equal(model(tokens), model(tokens))


def test_blocks_initialized_to_zero_are_the_identity() -> None:
    model = tiny_model(init="zero", has_biases=True, norm="layernorm")
    tokens = random_tokens(1, 8)
    with torch.no_grad():
        torch.testing.assert_close(model.hidden_states(tokens), model.norm(model.embedding(tokens)))


def test_weights_have_the_names_of_checkpoints_and_exports() -> None:
    model = tiny_model(
        positions="learned", norm="layernorm", has_biases=True, has_qk_norm=True, num_layers=1
    )
    linear = ["attention.query", "attention.key", "attention.value", "attention.output"]
    linear += ["feed_forward.gate", "feed_forward.up", "feed_forward.down"]
    both = [f"blocks.0.{name}" for name in (*linear, "attention_norm", "feed_forward_norm")]
    names = {f"{name}.{kind}" for name in (*both, "norm") for kind in ("weight", "bias")}
    names |= {"embedding.weight", "positions.weight"}
    names |= {f"blocks.0.attention.{name}_norm.weight" for name in ("query", "key")}
    assert {name for name, _ in model.named_parameters()} == names


def test_the_vocabulary_is_padded_inside_and_nowhere_else() -> None:
    model = tiny_model(vocab_size=601)
    assert model.embedding.num_embeddings == 640
    assert model.embedding.weight[601:].abs().max() == 0
    loss = model(random_tokens(2, 8)).logsumexp(-1).sum()
    loss.backward()
    assert model.embedding.weight.grad is not None
    assert model.embedding.weight.grad[601:].abs().max() == 0  # so they stay zero


@pytest.mark.parametrize("is_tied", [True, False])
def test_num_parameters_counts_the_stored_weights(is_tied: bool) -> None:
    model = tiny_model(vocab_size=601, tie_embeddings=is_tied)
    C, F, L, D = TINY.d_model, TINY.d_ff, TINY.num_layers, TINY.d_model // TINY.num_heads
    attention = 2 * C * C + 2 * C * TINY.num_kv_heads * D
    expected = L * (attention + 3 * C * F + 2 * C) + C + (1 if is_tied else 2) * 601 * C
    assert model.num_parameters() == expected


def test_first_weights_have_their_deviations_and_the_first_loss_is_uniform() -> None:
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
        ({"head_dim": 7}, "model.head_dim: found 7, which makes heads 7 wide, expected an even"),
        ({"full_attention_every": 2}, "model.full_attention_every: found 2, expected 0 where"),
        ({"positions": "learned", "rope_scaling": "llama3"}, "model.rope_scaling: found llama3"),
        (
            {"rope_scaling": "llama3", "rope_low_frequency_factor": 4.0},
            "model.rope_low_frequency_factor: found 4.0, expected less than",
        ),
    ],
)
def test_contradictory_settings_are_refused_by_name(shape: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Transformer(ModelConfig(**{**asdict(TINY), **shape}), 600, SEQ_LEN)
