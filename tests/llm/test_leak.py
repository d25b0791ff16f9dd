"""The leak test passes sound models and catches every leak planted in one."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm.artifact import Json
from llm.config import ModelConfig
from llm.data.packed import PackedSequences
from llm.errors import ConfigError
from llm.evaluation import leak
from llm.evaluation.leak import LeakResult, find_leaks, leak_metrics, worst_metrics
from llm.evaluation.report import Metric
from llm.model.attention import Attend, Attention, AttentionContext
from llm.model.attention_mask import MaskRule, boolean_mask, mask_rule
from llm.model.cache import KeyValueCache
from llm.model.kernels import attention as kernels
from llm.model.kernels.attention import SDPA, AttentionKernels
from llm.model.loss import token_losses
from llm.model.transformer import Transformer
from llm.pack import pack
from llm.tokenizer.bpe import ByteLevelBPE
from tests.llm.toy_presets import toy_shape

SEQ_LEN = 32
SHAPE = ModelConfig(num_layers=2, d_model=32, num_heads=2, num_kv_heads=1, d_ff=48)

MakeDocuments = Callable[..., Path]
RunStage = Callable[..., tuple[Path, Mapping[str, Json]]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products are slower on two threads, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def rows(
    make_documents: MakeDocuments,
    tokenizer_folder: Path,
    run_stage: RunStage,
    corpus: list[str],
) -> PackedSequences:
    documents = make_documents(corpus[:2], corpus[2:8])
    folder, _ = run_stage(
        pack, {"seq_len": SEQ_LEN}, out="rows", documents=documents, tokenizer=tokenizer_folder
    )
    return PackedSequences(folder, "validation")


def make_model(tokenizer: ByteLevelBPE, shape: ModelConfig = SHAPE, **choices: Any) -> Transformer:
    """A freshly initialized model."""
    model = Transformer(replace(shape, **choices), tokenizer.vocab_size, SEQ_LEN)
    model.initialize(torch.Generator().manual_seed(1))
    return model.eval()


def train(
    model: Transformer, rows: PackedSequences, shift: int, num_steps: int = 60
) -> Transformer:
    """Train on targets `shift` tokens after their inputs; 1 is right."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.from_numpy(rows.read(range(min(16, rows.num_sequences))).tokens)
    for _ in range(num_steps):
        targets = tokens[:, shift : shift + SEQ_LEN]
        loss = token_losses(model(tokens[:, :SEQ_LEN]), targets).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def examine(model: Transformer, rows: PackedSequences, document_mask: bool = False) -> LeakResult:
    return find_leaks(model, rows, document_mask=document_mask, seed=1)


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_a_sound_model_passes_untrained(
    rows: PackedSequences, tokenizer: ByteLevelBPE, tie_embeddings: bool, document_mask: bool
) -> None:
    found = examine(make_model(tokenizer, tie_embeddings=tie_embeddings), rows, document_mask)
    assert found.is_passed
    assert found.future_difference == 0.0, "the same sums in the same order"
    assert found.document_difference == (0.0 if document_mask else None)
    assert found.num_cuts >= 3 * leak.NUM_SEQUENCES


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("preset", ["gpt2-124m", "llama3.2-1b", "qwen3-0.6b", "gemma-2b"])
def test_a_sound_model_of_every_family_passes(
    rows: PackedSequences, tokenizer: ByteLevelBPE, preset: str, document_mask: bool
) -> None:
    assert examine(make_model(tokenizer, toy_shape(preset)), rows, document_mask).is_passed


@pytest.mark.parametrize("document_mask", [False, True])
def test_a_sound_model_with_windows_and_caps_passes(
    rows: PackedSequences, tokenizer: ByteLevelBPE, document_mask: bool
) -> None:
    choices = {"sliding_window": 5, "full_attention_every": 2, "attention_soft_cap": 20.0}
    model = make_model(tokenizer, **choices, logit_soft_cap=10.0)
    assert examine(model, rows, document_mask).is_passed


def test_the_leak_test_refuses_masked_language_models(
    rows: PackedSequences, tokenizer: ByteLevelBPE
) -> None:
    with pytest.raises(ConfigError, match="leak test does not apply: a model that fills in"):
        examine(make_model(tokenizer, is_causal=False), rows)


def test_a_sound_model_passes_trained(rows: PackedSequences, tokenizer: ByteLevelBPE) -> None:
    found = examine(train(make_model(tokenizer), rows, shift=1), rows)
    assert found.is_passed
    assert abs(found.repetition) < 0.1


def test_the_same_seed_gives_the_same_result(
    rows: PackedSequences, tokenizer: ByteLevelBPE
) -> None:
    model = make_model(tokenizer)
    assert examine(model, rows) == examine(model, rows)


def plant_mask(monkeypatch: pytest.MonkeyPatch, mask_of: Callable[[Tensor], Tensor]) -> None:
    """Replace the attention mask (B or 1, 1, T, T) of every layer by `mask_of` of it."""

    def for_sequences(
        self: AttentionKernels, tokens: Tensor, document_ids: Tensor | None
    ) -> dict[int, Attend]:
        mask = boolean_mask(mask_rule(True, 0, document_ids), tokens, document_ids)
        return {0: SDPA(mask_of(mask))}

    monkeypatch.setattr(AttentionKernels, "for_sequences", for_sequences)


def one_further(mask: Tensor) -> Tensor:
    """Let every position also attend to the next one: off by one."""
    later = torch.zeros_like(mask)
    later[..., 1:] = mask[..., :-1]
    return mask | later


def everything(mask: Tensor) -> Tensor:
    """Let every position attend to all: no mask."""
    return torch.ones_like(mask)


@pytest.mark.parametrize("mask_of", [one_further, everything])
@pytest.mark.parametrize("document_mask", [False, True])
def test_a_mask_that_shows_the_future_is_caught(
    rows: PackedSequences,
    tokenizer: ByteLevelBPE,
    monkeypatch: pytest.MonkeyPatch,
    mask_of: Callable[[Tensor], Tensor],
    document_mask: bool,
) -> None:
    plant_mask(monkeypatch, mask_of)
    found = examine(make_model(tokenizer), rows, document_mask)
    assert not found.is_passed
    assert found.future_difference > leak.FUTURE_TOLERANCE


def test_the_right_mask_planted_in_the_same_way_passes(
    rows: PackedSequences, tokenizer: ByteLevelBPE, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_mask(monkeypatch, lambda mask: mask)
    assert examine(make_model(tokenizer), rows).is_passed


def test_one_bidirectional_layer_is_caught(rows: PackedSequences, tokenizer: ByteLevelBPE) -> None:
    class BothWays(Attention):
        def forward(
            self, x: Tensor, context: AttentionContext, cache: KeyValueCache | None
        ) -> Tensor:
            return super().forward(x, replace(context, attend={0: SDPA(is_causal=False)}), None)

    model = make_model(tokenizer)
    model.blocks[1].attention.__class__ = BothWays
    found = examine(model, rows)
    assert not found.is_passed and found.future_difference > leak.FUTURE_TOLERANCE


def test_a_leak_of_one_part_in_ten_thousand_is_caught(
    rows: PackedSequences, tokenizer: ByteLevelBPE
) -> None:
    class Whisper(Transformer):
        def hidden_states(
            self,
            tokens: Tensor,
            document_ids: Tensor | None = None,
            cache: KeyValueCache | None = None,
        ) -> Tensor:
            x = super().hidden_states(tokens, document_ids, cache)
            return x + 1e-3 * x.mean(dim=1, keepdim=True)  # normalization over the row, say

    model = make_model(tokenizer)
    model.__class__ = Whisper
    assert examine(model, rows).future_difference > leak.FUTURE_TOLERANCE


def test_training_on_targets_that_were_not_shifted_is_caught(
    rows: PackedSequences, tokenizer: ByteLevelBPE
) -> None:
    found = examine(train(make_model(tokenizer), rows, shift=0), rows)
    assert not found.is_passed
    assert found.repetition > leak.REPETITION_TOLERANCE
    assert found.future_difference == 0.0, "no other check sees it"


def test_scoring_that_forgets_the_shift_is_caught(
    rows: PackedSequences, tokenizer: ByteLevelBPE, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(model: Transformer, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        logits = model(tokens[:, 1:], None if documents is None else documents[:, 1:])
        return token_losses(logits, tokens[:, 1:])

    monkeypatch.setattr(leak, "target_nats", forgetful)
    found = examine(make_model(tokenizer), rows)
    assert not found.is_passed
    assert found.total_error > leak.TOTAL_TOLERANCE


def one_late(lengths: Tensor, num_tokens: int) -> Tensor:
    """Positions counted from the last cached token instead of from the next."""
    return (lengths[:, None] + torch.arange(num_tokens) - 1).clamp(min=0)


def from_zero(lengths: Tensor, num_tokens: int) -> Tensor:
    """Positions that ignore the cached tokens."""
    return torch.zeros_like(lengths)[:, None] + torch.arange(num_tokens)


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("place", [one_late, from_zero])
def test_a_wrong_offset_of_positions_in_the_cache_is_caught(
    rows: PackedSequences,
    tokenizer: ByteLevelBPE,
    monkeypatch: pytest.MonkeyPatch,
    place: Callable[[Tensor, int], Tensor],
    positions: str,
) -> None:
    monkeypatch.setattr(KeyValueCache, "positions", lambda self, n: place(self.lengths, n))
    found = examine(make_model(tokenizer, positions=positions), rows)
    assert not found.is_passed and found.cache_difference > leak.CACHE_TOLERANCE


def test_attention_across_documents_is_caught(
    rows: PackedSequences, tokenizer: ByteLevelBPE, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = kernels.mask_rule

    def blind(
        is_causal: bool, window: int, document_ids: Tensor | None, device: torch.device
    ) -> MaskRule:
        return rule(is_causal, window, None, device)

    monkeypatch.setattr(kernels, "mask_rule", blind)
    found = examine(make_model(tokenizer), rows, document_mask=True)
    assert not found.is_passed and found.future_difference == 0.0
    assert found.document_difference is not None
    assert found.document_difference > leak.FUTURE_TOLERANCE
    assert examine(make_model(tokenizer), rows).is_passed, "where none is asked for, none is missed"


def test_metrics_show_the_worse_of_two_models() -> None:
    sound = LeakResult(
        num_cuts=8, future_difference=0, cache_difference=1e-7, total_error=0, repetition=0
    )
    leaky = replace(sound, future_difference=0.25, repetition=0.75)

    def worst(*leaks: LeakResult) -> dict[str, Metric]:
        return worst_metrics([leak_metrics(one) for one in leaks])

    metrics = worst(sound, leaky)
    assert metrics["leak/passed"].value == 0
    assert metrics["leak/largest_difference"].value == 0.25
    assert metrics["leak/repetition"].value == 0.75
    assert metrics["leak/passed"].num_examples == 16
    assert "leak/document_difference" not in metrics
    across = replace(sound, document_difference=0.5)
    assert worst(sound, across)["leak/document_difference"].value == 0.5
    assert worst(sound, across)["leak/passed"].value == 0
    assert worst(sound, sound)["leak/passed"].value == 1
