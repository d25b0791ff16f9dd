"""The loop: the loss is the mean over all targets, and a bad step changes nothing."""

import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.nn import functional as F

from llm.config import OptimizationConfig
from llm.data.packed import PackedArrays, PackedSequences
from llm.errors import DataError, StageError
from llm.model.loss import ModelWithLoss
from llm.model.masked_lm import Masking
from llm.model.transformer import Transformer
from llm.tokenizer.bpe import ByteLevelBPE
from llm.training import loop
from llm.training.batches import batches_of_steps
from llm.training.kept_weights import KeptWeights
from llm.training.loop import Step, TrainingSetup, TrainState, training_steps
from llm.training.objectives import MaskedTokens, ModelWithObjective, NextToken
from llm.training.optimizers import make_optimizer
from llm.training.sequences import sample_sequences
from llm.training.validation import Validation, validate
from tests.llm.training_setup import (
    SEQ_LEN,
    fresh_accelerator,
    tiny_model,
    write_chat_sequences,
    write_text_sequences,
)

CONFIG = OptimizationConfig(num_steps=6, global_batch_size=8, warmup_steps=2, learning_rate=1e-2)


class NoTargets(PackedSequences):
    """Sequences of which nothing is to be learned."""

    def read(self, indices: npt.ArrayLike) -> PackedArrays:
        """Return the sequences at `indices`."""
        found = super().read(indices)
        return found._replace(mask=np.zeros_like(found.mask))


@pytest.fixture
def text(tmp_path: Path, tokenizer: ByteLevelBPE, corpus: list[str]) -> Path:
    """Sequences of text."""
    return write_text_sequences(tmp_path / "text", tokenizer, corpus[:40])


@pytest.fixture
def chats(tmp_path: Path, tokenizer: ByteLevelBPE) -> Path:
    """Sequences of chats, mostly padding."""
    return write_chat_sequences(tmp_path / "chats", tokenizer, 60)


NEXT_TOKEN = NextToken(document_mask=False)


def run(
    model: Transformer,
    sequences: PackedSequences,
    config: OptimizationConfig = CONFIG,
    micro_batch_size: int = 8,
    state: TrainState | None = None,
    **more: Any,
) -> Iterator[Step]:
    """Train `model` in this process."""
    accelerator = fresh_accelerator()
    objective = more.pop("objective", NextToken(document_mask=config.document_mask))
    module = ModelWithObjective(ModelWithLoss(model), objective)
    training = TrainingSetup(
        accelerator=accelerator,
        model=accelerator.prepare_model(module),
        optimizer=more.pop("optimizer", None) or make_optimizer(model, config),
        sequences=sequences,
        objective=objective,
        config=config,
        stage="pretrain",
        seed=3,
        micro_batch_size=micro_batch_size,
        kept=more.pop("kept", None),
    )
    more = {"is_stopping": lambda: False, **more}
    return training_steps(training, state or TrainState(), **more)


def masked_tokens(tokenizer: ByteLevelBPE) -> MaskedTokens:
    """Fill in three tokens of ten."""
    masking = Masking(
        seed=5, fraction=0.3, mask_id=tokenizer.mask_id, is_text=tokenizer.token_bytes > 0
    )
    return MaskedTokens(document_mask=False, masking=masking)


def check(
    model: Transformer, sequences: PackedSequences, tokenizer: ByteLevelBPE, **more: Any
) -> Validation:
    """Validate `model` on five sequences in this process."""
    return validate(
        fresh_accelerator(),
        ModelWithLoss(model),
        sequences,
        more.get("objective", NEXT_TOKEN),
        tokenizer.token_bytes,
        precision="fp32",
        num_sequences=5,
        max_batch_size=more.get("max_batch_size", 2),
    )


@pytest.mark.parametrize("kind", ["text", "chats"])
def test_a_training_equals_one_written_with_plain_torch(
    kind: str, request: pytest.FixtureRequest
) -> None:
    sequences = PackedSequences(request.getfixturevalue(kind), "train")
    model, reference = tiny_model(), tiny_model()
    steps = list(run(model, sequences, micro_batch_size=3))
    matrices = [p for p in reference.parameters() if p.ndim == 2]
    vectors = [p for p in reference.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    for number, step in enumerate(steps):
        arrays = sequences.read(
            sample_sequences(3, np.arange(8) + number * 8, sequences.num_sequences)
        )
        tokens, mask = torch.from_numpy(arrays.tokens), torch.from_numpy(arrays.mask)
        logits = reference(tokens[:, :-1])
        loss = F.cross_entropy(logits[mask[:, 1:]], tokens[:, 1:][mask[:, 1:]])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        rising = (number + 1) / 3
        falling = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (number - 2) / 3))
        optimizer.param_groups[0]["lr"] = rate = 1e-2 * (rising if number < 2 else falling)
        optimizer.param_groups[1]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        # the same numbers added in another order: a few units in the last place, grown by AdamW
        assert step.loss == pytest.approx(loss.item(), rel=1e-4)
        assert step.gradient_norm == pytest.approx(norm.item(), rel=1e-3)
        assert step.learning_rate == pytest.approx(rate)
        assert step.num_targets == int(mask[:, 1:].sum())
    assert steps[-1].loss < steps[0].loss


@pytest.mark.parametrize("kind", ["text", "chats"])
def test_micro_batches_give_the_gradient_of_one_batch(
    kind: str, request: pytest.FixtureRequest
) -> None:
    sequences = PackedSequences(request.getfixturevalue(kind), "train")
    found = [
        next(run(tiny_model(), sequences, micro_batch_size=micro_batch_size))
        for micro_batch_size in (8, 4, 3, 1)
    ]
    for step in found[1:]:
        assert step.loss == pytest.approx(found[0].loss, rel=1e-6)
        assert step.gradient_norm == pytest.approx(found[0].gradient_norm, rel=1e-5)


@pytest.mark.parametrize("objective", ["next", "masked"])
@pytest.mark.parametrize("optimizer_name", ["adamw", "muon"])
def test_training_in_micro_batches_gives_the_weights_of_whole_batches(
    chats: Path, tokenizer: ByteLevelBPE, objective: str, optimizer_name: Any
) -> None:
    sequences = PackedSequences(chats, "train")
    config = replace(CONFIG, optimizer=optimizer_name)
    learned = NEXT_TOKEN if objective == "next" else masked_tokens(tokenizer)
    models = [tiny_model(is_causal=objective == "next") for _ in range(3)]
    for model, micro_batch_size in zip(models, (8, 4, 1), strict=True):
        for _ in run(model, sequences, config, micro_batch_size, objective=learned):
            pass
    whole, *others = (
        torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models
    )
    # The same sums in another order. AdamW divides by the root of gradients that are near zero, and
    # Muon stretches, in bf16, directions in which there is hardly a gradient.
    tolerance = {"adamw": 1e-5, "muon": 2e-2}[optimizer_name]
    for parts in others:
        assert float((parts - whole).norm() / whole.norm()) < tolerance


def test_a_masked_training_equals_one_written_with_plain_torch(
    text: Path, tokenizer: ByteLevelBPE
) -> None:
    sequences, objective = PackedSequences(text, "train"), masked_tokens(tokenizer)
    model, reference = tiny_model(is_causal=False), tiny_model(is_causal=False)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.0)
    first = next(run(model, sequences, micro_batch_size=3, objective=objective))
    samples = np.arange(8)
    arrays = sequences.read(sample_sequences(3, samples, sequences.num_sequences))
    tokens = arrays.tokens[:, :-1]
    inputs, targets = objective.masking.hide(tokens, arrays.mask[:, :-1], samples)
    is_target = targets != -100
    assert (inputs[~is_target] == tokens[~is_target]).all() and not is_target[:, 0].any()
    logits = reference(torch.from_numpy(inputs))
    loss = F.cross_entropy(logits[is_target], torch.from_numpy(targets[is_target]))
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    optimizer.step()
    assert first.num_targets == is_target.sum() > 0
    assert first.loss == pytest.approx(loss.item(), rel=1e-5)  # sums in another order
    assert first.gradient_norm == pytest.approx(norm.item(), rel=1e-4)


def test_what_is_masked_does_not_depend_on_the_number_of_processes(
    text: Path, tokenizer: ByteLevelBPE
) -> None:
    sequences, objective = PackedSequences(text, "train"), masked_tokens(tokenizer)

    def read(process: int, num_processes: int, first_step: int) -> list[torch.Tensor]:
        batches = batches_of_steps(
            sequences,
            objective,
            CONFIG,
            seed=3,
            first_step=first_step,
            process=process,
            num_processes=num_processes,
            micro_batch_size=2,
            device=torch.device("cpu"),
        )
        return [torch.cat([batch.inputs for batch in step.micro_batches]) for step in batches]

    whole = read(0, 1, 0)
    halves = [torch.cat(parts) for parts in zip(read(0, 2, 0), read(1, 2, 0), strict=True)]
    assert len(whole) == 6 and all(map(torch.equal, whole, halves))
    assert all(map(torch.equal, whole[4:], read(0, 1, 4))), "nor on where training resumes"


@pytest.mark.parametrize("optimizer_name", ["adamw", "muon"])
def test_norms_of_update_and_weights_are_those_of_the_tenth_step(
    text: Path, optimizer_name: Any
) -> None:
    config = replace(CONFIG, num_steps=11, optimizer=optimizer_name)
    model = tiny_model()
    weights: list[torch.Tensor] = []
    steps: list[Step] = []
    for step in run(model, PackedSequences(text, "train"), config):
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]).double())
        steps.append(step)
    measured = [step.step for step in steps if step.update_norm is not None]
    assert measured == [10]
    # differences of fp32 weights, added up in fp32
    assert steps[9].update_norm == pytest.approx(float((weights[9] - weights[8]).norm()), rel=1e-4)
    assert steps[9].weight_norm == pytest.approx(float(weights[9].norm()), rel=1e-5)


def test_dropout_drops_the_same_after_a_resume_and_other_things_in_other_steps(text: Path) -> None:
    sequences = PackedSequences(text, "train")
    model, resumed = tiny_model(dropout=0.3), tiny_model(dropout=0.3)
    optimizer = make_optimizer(resumed, CONFIG)
    whole = [step.loss for step in run(model, sequences, micro_batch_size=3)]
    state = TrainState()
    first = run(resumed, sequences, micro_batch_size=3, state=state, optimizer=optimizer)
    losses = [next(first).loss for _ in range(2)]
    torch.manual_seed(99)  # whatever the generators did meanwhile
    rest = run(resumed, sequences, micro_batch_size=3, state=state, optimizer=optimizer)
    losses += [step.loss for step in rest]
    assert losses == whole
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))
    still = replace(CONFIG, learning_rate=1e-30, global_batch_size=sequences.num_sequences)
    every_row = [step.loss for step in run(tiny_model(dropout=0.3), sequences, still, 100)]
    assert len(set(every_row)) == len(every_row), (
        "the same sequences and weights, dropped differently"
    )


def test_a_step_ahead_gives_the_same_steps_and_the_state_of_the_step_yielded(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = PackedSequences(text, "train")
    model, ahead = tiny_model(), tiny_model()
    states: list[tuple[int, float | None, torch.Tensor]] = []
    for step in run(model, sequences):
        states.append((step.step, step.loss, model.norm.weight.detach().clone()))
    monkeypatch.setitem(loop.STEPS_AHEAD, "cpu", 1)
    state, awaited = TrainState(), {3, 6}
    for step in run(ahead, sequences, state=state, needs_weights=awaited.__contains__):
        expected_step, loss, weight = states[step.step - 1]
        assert (state.step, state.loss) == (step.step, step.loss) == (expected_step, loss)
        place = step.step - (step.step in awaited)  # elsewhere the weights are a step further
        assert torch.equal(ahead.norm.weight, states[place][2])
        assert torch.equal(weight, ahead.norm.weight) == (step.step in awaited)
    assert state.step == 6


def test_a_stop_while_a_step_is_in_flight_yields_that_step(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loop.STEPS_AHEAD, "cpu", 1)
    asked: list[int] = []
    state = TrainState()
    steps = run(
        tiny_model(),
        PackedSequences(text, "train"),
        state=state,
        needs_weights=lambda step: False,
        is_stopping=lambda: asked.append(1) or len(asked) > 4,
    )
    assert [step.step for step in steps] == [1, 2, 3, 4]
    assert state.step == 4


@pytest.mark.parametrize("optimizer_name", ["adamw", "muon"])
def test_a_failure_found_a_step_later_leaves_weights_and_optimizer_as_before_it(
    text: Path, optimizer_name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loop.STEPS_AHEAD, "cpu", 1)
    config = replace(CONFIG, optimizer=optimizer_name)
    model = tiny_model()
    optimizer = make_optimizer(model, config)
    steps = run(
        model,
        PackedSequences(text, "train"),
        config,
        optimizer=optimizer,
        needs_weights=lambda step: step == 2,
    )
    next(steps), next(steps)
    weights = [parameter.clone() for parameter in model.parameters()]
    moments = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    calls: list[int] = []

    def poison_once(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return output * float("nan") if len(calls) == 1 else output

    model.norm.register_forward_hook(poison_once)  # the step after it would be a sound one
    with pytest.raises(StageError, match="step 3 of 6 gave a loss of nan"):
        next(steps)
    assert len(calls) == 2
    assert all(map(torch.equal, weights, model.parameters()))
    assert all(torch.equal(moments[name], t) for name, t in optimizer.state_dict().items())


@pytest.fixture
def fp16_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in fp16 here, slowly, as a GPU would."""
    for module in ("llm.training.loop", "llm.model.precision"):
        monkeypatch.setattr(f"{module}.computed_precision", lambda asked, device_type: asked)


def test_fp16_skips_what_overflows_halves_its_scale_and_learns(
    text: Path, fp16_on_a_cpu: None
) -> None:
    sequences, config = PackedSequences(text, "train"), replace(CONFIG, precision="fp16")
    state = TrainState(loss_scale=2.0**40)
    model = tiny_model()
    steps: list[Step] = []
    weights = [parameter.clone() for parameter in model.parameters()]
    for step in run(model, sequences, replace(config, num_steps=40), state=state):
        steps.append(step)
        if math.isfinite(step.gradient_norm):
            break
        assert all(map(torch.equal, weights, model.parameters()))
    assert state.skipped_steps == len(steps) - 1 > 0
    assert [step.loss_scale for step in steps] == [2.0 ** (40 - n) for n in range(len(steps))]
    assert (state.loss_scale, state.loss_scale_steps) == (2.0 ** (41 - len(steps)), 1)
    assert not all(map(torch.equal, weights, model.parameters()))


def test_an_average_holds_the_steps_up_to_the_one_awaited_skipped_ones_too(
    text: Path, fp16_on_a_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle adds up the weights of each step of a training that is never a step ahead."""
    ema = {"averaging": "ema", "ema_decay": 0.8, "precision": "fp16", "num_steps": 30}
    config, sequences = replace(CONFIG, **ema), PackedSequences(text, "train")
    model, ahead = tiny_model(), tiny_model()
    history = [
        model.norm.weight.detach().double()
        for _ in run(model, sequences, config, state=TrainState(loss_scale=2.0**30))
    ]
    monkeypatch.setitem(loop.STEPS_AHEAD, "cpu", 1)
    state, awaited, kept = TrainState(loss_scale=2.0**30), {20, 30}, KeptWeights(ahead, config)
    more: dict[str, Any] = {"state": state, "kept": kept, "needs_weights": awaited.__contains__}
    for step in run(ahead, sequences, config, **more):
        if step.step in awaited:
            shares = [0.8 ** (step.step - number) for number in range(1, step.step + 1)]
            sums = sum(s * past for s, past in zip(shares, history, strict=False))
            with kept.averaged():
                found = ahead.norm.weight.detach().double()
            torch.testing.assert_close(found, sums / sum(shares), rtol=1e-5, atol=0)
    assert 5 < state.skipped_steps < 20 and len(history) == 30


def test_fp16_learns_what_fp32_learns(text: Path, fp16_on_a_cpu: None) -> None:
    sequences = PackedSequences(text, "train")
    wide = list(run(tiny_model(), sequences))
    narrow = list(run(tiny_model(), sequences, replace(CONFIG, precision="fp16")))
    for mine, theirs in zip(narrow, wide, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=5e-3)  # 10 bits of fraction
        assert mine.gradient_norm == pytest.approx(theirs.gradient_norm, rel=3e-2)


def test_fp16_that_overflows_at_any_scale_is_a_failure(text: Path, fp16_on_a_cpu: None) -> None:
    model = tiny_model()
    model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    state = TrainState(loss_scale=4.0)
    steps = run(
        model, PackedSequences(text, "train"), replace(CONFIG, precision="fp16"), state=state
    )
    assert [next(steps).loss_scale for _ in range(2)] == [4.0, 2.0]
    with pytest.raises(StageError, match=r"step 3 of 6 .*pretrain.precision=fp32"):
        next(steps)


def test_every_row_is_read_once_an_epoch_and_steps_flow_over_its_end() -> None:
    num_rows = 10
    samples = sample_sequences(1, np.arange(40), num_rows)
    for epoch in samples.reshape(-1, num_rows):
        assert sorted(epoch) == list(range(num_rows))
    assert list(samples[:10]) != list(samples[10:20])
    in_parts = [sample_sequences(1, np.arange(2) + first, num_rows) for first in range(0, 40, 2)]
    assert np.array_equal(np.concatenate(in_parts), samples)  # as two processes read them


def test_a_step_larger_than_an_epoch_reads_several(text: Path) -> None:
    assert np.array_equal(np.bincount(sample_sequences(1, np.arange(30), 10)), [3] * 10)


def test_the_state_counts_steps_tokens_epochs_and_rows(text: Path) -> None:
    sequences = PackedSequences(text, "train")
    state = TrainState()
    for step in run(tiny_model(), sequences, state=state):
        assert (state.step, state.tokens) == (step.step, step.step * 8 * SEQ_LEN)
        assert state.epoch * sequences.num_sequences + state.row == step.step * 8
        assert state.loss == step.loss


@pytest.mark.parametrize("optimizer_name", ["adamw", "muon"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_with_weights_and_optimizer_unchanged(
    text: Path, optimizer_name: Any, poison: float
) -> None:
    sequences = PackedSequences(text, "train")
    config = replace(CONFIG, optimizer=optimizer_name)
    model = tiny_model()
    optimizer = make_optimizer(model, config)
    steps = run(model, sequences, config, optimizer=optimizer)
    next(steps), next(steps)
    # a gradient, and so a loss, that is not finite, from a hook as a fault of the hardware would
    model.norm.register_forward_hook(lambda module, inputs, output: output * poison)
    weights = [parameter.clone() for parameter in model.parameters()]
    moments = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    with pytest.raises(
        StageError, match=r"step 3 of 6 gave a loss of nan.*learning_rate"
    ) as caught:
        next(steps)
    assert "pretrain.warmup_steps (now 2)" in str(caught.value)
    assert all(map(torch.equal, weights, model.parameters()))
    assert all(torch.equal(moments[name], t) for name, t in optimizer.state_dict().items())


def test_a_gradient_that_is_not_finite_stops_too(text: Path) -> None:
    model = tiny_model()
    steps = run(model, PackedSequences(text, "train"))
    next(steps)
    weights = [parameter.clone() for parameter in model.parameters()]
    model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(StageError, match=r"a gradient norm of (inf|nan)"):
        next(steps)
    assert all(map(torch.equal, weights, model.parameters()))


def test_a_step_without_a_target_changes_nothing_and_is_counted(
    chats: Path, tokenizer: ByteLevelBPE
) -> None:
    sequences = NoTargets(chats, "train")
    model = tiny_model()
    weights = [parameter.clone() for parameter in model.parameters()]
    state = TrainState()
    steps = list(run(model, sequences, state=state))
    assert [(step.num_targets, step.loss, step.gradient_norm) for step in steps] == [(0, 0, 0)] * 6
    assert (state.skipped_steps, state.step, state.loss) == (6, 6, None)
    assert all(map(torch.equal, weights, model.parameters()))


def test_a_stop_ends_between_two_steps_and_leaves_no_thread(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm.training.batches.READ_TOKENS", 1)  # each step is a read of its own
    state = TrainState()
    done: list[Step] = []
    for step in run(
        tiny_model(),
        PackedSequences(text, "train"),
        state=state,
        is_stopping=lambda: len(done) == 3,
    ):
        assert "prefetch" in [thread.name for thread in threading.enumerate()]
        done.append(step)
    assert state.step == len(done) == 3
    assert "prefetch" not in [thread.name for thread in threading.enumerate()]


def test_what_fails_in_reading_ahead_is_raised_in_the_loop(text: Path) -> None:
    class Failing(NextToken):
        def make_batch(self, *_: Any) -> Any:
            raise DataError("cannot be read")

    objective = Failing(document_mask=False)
    with pytest.raises(DataError, match="cannot be read"):
        list(run(tiny_model(), PackedSequences(text, "train"), objective=objective))
    assert "prefetch" not in [thread.name for thread in threading.enumerate()]


def test_masking_documents_changes_what_is_learned(
    tmp_path: Path, tokenizer: ByteLevelBPE, corpus: list[str]
) -> None:
    short = [text[start : start + 40] for text in corpus[:40] for start in range(0, 400, 40)]
    sequences = PackedSequences(write_text_sequences(tmp_path, tokenizer, short), "train")
    plain = list(run(tiny_model(), sequences))
    masked = list(run(tiny_model(), sequences, replace(CONFIG, document_mask=True)))
    assert [step.loss for step in plain] != [step.loss for step in masked]
    assert [step.num_targets for step in plain] == [step.num_targets for step in masked]


@pytest.mark.parametrize("kind", ["text", "chats"])
@pytest.mark.parametrize("max_batch_size", [2, 3, 100])
def test_validation_equals_sums_by_hand(
    kind: str, max_batch_size: int, request: pytest.FixtureRequest, tokenizer: ByteLevelBPE
) -> None:
    sequences = PackedSequences(request.getfixturevalue(kind), "validation")
    model = tiny_model()
    found = check(model, sequences, tokenizer, max_batch_size=max_batch_size)
    nats, text_nats, num_targets, num_bytes = 0.0, 0.0, 0, 0
    for row in range(5):
        arrays = sequences.read([row])
        with torch.no_grad():
            log_probs = model(torch.from_numpy(arrays.tokens[:, :-1]))[0].log_softmax(-1)
        for position in range(SEQ_LEN):
            if arrays.mask[0, position + 1]:
                target = int(arrays.tokens[0, position + 1])
                cost = -float(log_probs[position, target])
                nats, num_targets = nats + cost, num_targets + 1
                if size := len(tokenizer.decode_bytes([target])):
                    text_nats, num_bytes = text_nats + cost, num_bytes + size
    assert found.loss == pytest.approx(nats / num_targets, rel=1e-5)
    bits_per_byte = text_nats / math.log(2) / num_bytes
    assert found.metrics == {"bits_per_byte": pytest.approx(bits_per_byte, rel=1e-5)}
    assert model.training


def test_validation_without_text_is_refused(chats: Path, tokenizer: ByteLevelBPE) -> None:
    sequences = NoTargets(chats, "validation")
    with pytest.raises(DataError, match="the first 5 validation sequences hold no text"):
        check(tiny_model(), sequences, tokenizer)
