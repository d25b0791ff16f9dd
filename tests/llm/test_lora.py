"""LoRA: a frozen model with adapters equals its base, its merged form and peft's formula."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from llm.config import LoraConfig, ModelConfig, OptimizationConfig
from llm.consistency import lora_problems
from llm.errors import ConfigError
from llm.inference.packed import packed
from llm.model.feed_forward import MLPS
from llm.model.kernels.linear import Linear
from llm.model.lora import Adapter, adapters_of, add_adapters, merge_adapters
from llm.model.loss import ModelWithLoss
from llm.model.transformer import Transformer
from llm.monitoring.throughput import flops_per_token
from llm.training.optimizers import make_optimizer
from tests.llm.training_setup import TINY, tiny_model

LORA = LoraConfig(rank=4, alpha=8.0)
TOKENS = torch.arange(64).view(2, 32)


def adapted(lora: LoraConfig = LORA, **shape: Any) -> Transformer:
    """A tiny model with adapters at their start."""
    model = tiny_model(**shape)
    add_adapters(model, lora, 1, "finetune.lora")
    return model


def trained(lora: LoraConfig = LORA, **shape: Any) -> Transformer:
    """A tiny model with adapters that change its logits."""
    model, generator = adapted(lora, **shape), torch.Generator().manual_seed(2)
    for adapter in adapters_of(model).values():
        torch.nn.init.normal_(adapter.b, std=0.1, generator=generator)
    return model


@pytest.mark.parametrize("shape", [{}, {"mlp": "gelu", "has_biases": True}, {"is_causal": False}])
def test_it_equals_its_base_at_the_start_and_its_merged_form_later(shape: dict[str, Any]) -> None:
    base = tiny_model(**shape)(TOKENS)
    torch.testing.assert_close(adapted(**shape)(TOKENS), base, rtol=0, atol=1e-6)
    model = trained(**shape).eval()
    unmerged = model(TOKENS)
    assert (unmerged - base).abs().max() > 0.1
    merge_adapters(model)
    assert not adapters_of(model) and all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(TOKENS), unmerged, rtol=0, atol=1e-5)


@pytest.mark.parametrize("targets", [LORA.targets, ("query",), ("key", "value"), ("up", "down")])
def test_layers_compute_the_formula_of_the_paper_joined_or_not(targets: tuple[str, ...]) -> None:
    model = trained(replace(LORA, targets=targets))
    attention, x = model.blocks[0].attention, torch.randn(2, 5, 32)
    alone = [
        x @ (part.weight + 8.0 / 4 * part.adapter.b @ part.adapter.a).T
        if isinstance(part.adapter, Adapter)
        else x @ part.weight.T
        for part in (attention.query, attention.key, attention.value)
    ]
    torch.testing.assert_close(attention.project(x), torch.cat(alone, dim=-1), rtol=0, atol=1e-6)
    names = {name.rpartition(".")[2] for name in adapters_of(model)}
    assert names == set(targets)


def test_weights_repacked_for_generation_include_the_adapter() -> None:
    model = trained().eval()
    torch.testing.assert_close(packed(model)(TOKENS), model(TOKENS), rtol=0, atol=1e-5)


def test_a_starts_as_in_peft_and_b_at_zero_from_the_seed_alone() -> None:
    [first, *_] = adapters_of(adapted(d_model=512)).values()
    [again, *_] = adapters_of(adapted(d_model=512)).values()
    assert torch.equal(first.a, again.a) and not first.b.any()
    bound = 1 / math.sqrt(512)  # kaiming_uniform_(a=sqrt(5)): sqrt(6 / ((1 + 5) * 512))
    assert first.a.abs().max() <= bound
    # 2048 draws: the standard error of their standard deviation is 0.7 % of the bound
    assert first.a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_only_adapters_get_gradients_and_all_of_them_do() -> None:
    model = trained()
    targets = TOKENS.roll(-1, dims=1)
    ModelWithLoss(model)(TOKENS, targets, None).sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    expected = {f"{layer}.adapter.{letter}" for layer in adapters_of(model) for letter in "ab"}
    assert with_gradient == expected
    # the same as that of the merged weight, by the chain rule: s B^T dW and s dW A^T
    whole = trained()
    adapters = adapters_of(whole)
    merge_adapters(whole)
    ModelWithLoss(whole)(TOKENS, targets, None).sum().backward()
    for name, adapter in adapters_of(model).items():
        gradient = whole.get_submodule(name).weight.grad
        assert gradient is not None and torch.equal(adapter.a, adapters[name].a)
        for found, wanted in (
            (adapter.a.grad, 2.0 * adapter.b.T @ gradient),
            (adapter.b.grad, 2.0 * gradient @ adapter.a.T),
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_dropout_acts_on_the_adapters_input_in_training_only() -> None:
    lora = replace(LORA, dropout=0.5)
    model = trained(lora)
    assert not torch.equal(model(TOKENS), model(TOKENS))
    torch.testing.assert_close(model.eval()(TOKENS), trained().eval()(TOKENS), rtol=0, atol=0)
    adapter, x = Adapter(Linear(64, 8), lora, torch.Generator()), torch.ones(1000, 64)
    torch.nn.init.ones_(adapter.a)
    torch.nn.init.ones_(adapter.b)
    torch.manual_seed(0)
    dropped = torch.nn.functional.dropout(x, 0.5).sum(dim=1) * 4 * 2.0  # r rows of A, s = 2
    torch.manual_seed(0)
    torch.testing.assert_close(adapter(x), dropped[:, None].expand(1000, 8))


@pytest.mark.parametrize(("optimizer", "moments"), [("adamw", 2), ("muon", 1)])
def test_optimizer_memory_falls_by_the_share_of_frozen_weights(
    optimizer: Any, moments: int
) -> None:
    config, sizes = OptimizationConfig(optimizer=optimizer), {}
    for name, model in (("all", tiny_model(vocab_size=640)), ("adapter", adapted())):
        trainable = [p for p in model.parameters() if p.requires_grad]
        made = make_optimizer(model, config)
        for parameter in trainable:
            parameter.grad = torch.ones_like(parameter)
        made.step()
        state = made.state_dict()
        sizes[name] = sum(tensor.nbytes for tensor in state.values() if tensor.ndim)
        assert len({key.rpartition("/")[0] for key in state}) == len(trainable)
        if name == "adapter":
            assert sizes[name] == moments * sum(p.nbytes for p in trainable)
    ours = tiny_model(vocab_size=640)
    num_frozen = sum(p.numel() for p in ours.parameters())
    num_trained = sum(p.numel() for p in adapted().parameters() if p.requires_grad)
    if optimizer == "adamw":  # all weights have the same number of moments
        assert sizes["adapter"] / sizes["all"] == pytest.approx(num_trained / num_frozen)
    assert sizes["adapter"] < 0.4 * sizes["all"]


@pytest.mark.parametrize("mlp", MLPS)
def test_the_check_of_settings_agrees_with_the_layers_there_are(mlp: Any) -> None:
    blocks = tiny_model(mlp=mlp).blocks
    there = {n.rpartition(".")[2] for n, part in blocks.named_modules() if isinstance(part, Linear)}
    config = replace(TINY, mlp=mlp)
    for target in (*LORA.targets, "head", "embedding", ""):
        found = lora_problems(config, replace(LORA, targets=(target,)), "finetune.lora")
        assert (not found) == (target in there)
    assert not lora_problems(config, LORA, "finetune.lora")
    assert {name.rpartition(".")[2] for name in adapters_of(adapted(mlp=mlp))} == there


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("query", "q_proj"), r"finetune.lora.targets: found q_proj, expected some of query, key"),
        (("gate",), "finetune.lora.targets: found gate, .* up, down"),
        ((), "finetune.lora.targets: found none"),
    ],
)
def test_targets_that_do_not_exist_are_named_with_those_there_are(
    targets: tuple[str, ...], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        adapted(replace(LORA, targets=targets), mlp="gelu")


def test_a_step_with_frozen_weights_counts_no_gradients_of_them() -> None:
    model = tiny_model()
    layers = [part for part in model.modules() if isinstance(part, Linear)]
    num_multiplied = sum(part.weight.numel() for part in layers) - 40 * 32  # without the padding
    rest = flops_per_token(model) - 6 * num_multiplied
    num_trained = sum(p.numel() for p in adapted().parameters() if p.requires_grad)
    assert flops_per_token(adapted()) == rest + 4 * num_multiplied + 6 * num_trained


def test_settings_of_a_model_without_an_adapter_are_not_checked() -> None:
    assert not lora_problems(ModelConfig(mlp="gelu"), LoraConfig(targets=("nowhere",)), "x")


def test_compiled_layers_with_adapters_are_one_graph_each() -> None:
    block, x = trained().blocks[0], torch.randn(2, 5, 32)
    for layer in (block.attention.project, block.feed_forward):
        compiled = torch.compile(lambda x, layer=layer: layer(x), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), layer(x))
