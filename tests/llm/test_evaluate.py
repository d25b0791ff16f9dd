"""The evaluate stage: metrics of real sequences and models, confirmed by direct computation."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llm.artifact import ArtifactWriter, Json, load_artifact
from llm.config import ModelConfig, RuntimeConfig
from llm.data.chat import CHAT_FORMATS, Message, render_chat, render_prompt
from llm.data.packed import PackedSequences
from llm.data.packed_chats import read_chats
from llm.errors import ArtifactError, ConfigError, Interrupted
from llm.evaluate import evaluate
from llm.evaluation.instructions import (
    Instruction,
    answer_instructions,
    exact_match,
    exact_match_by_kind,
    one_of_each_kind,
    read_instructions,
)
from llm.evaluation.items import read_items
from llm.evaluation.report import Metric, Report
from llm.evaluation.tasks import TASKS, Evaluated, EvaluationData, EvaluationTask, TaskResult
from llm.model.loss import IGNORED, token_losses
from llm.model.transformer import Transformer
from llm.model.weights import save_model
from llm.pack import pack
from llm.runtime import job as job_module
from llm.runtime.job import PROGRESS, Job, StageFunction, write_job
from llm.tokenizer.base import Tokenizer
from llm.tokenizer.bpe import ByteLevelBPE
from tests.llm.conftest import document_id

SEQ_LEN = 48
SHAPE = ModelConfig(num_layers=2, d_model=32, num_heads=2, num_kv_heads=1, d_ff=48)
SETTINGS: Mapping[str, Json] = {
    "prompts": ["def ", "The "],
    "max_new_tokens": 8,
    "num_instructions": 5,
}
WORDS = ("red", "blue", "pink", "gray", "gold", "teal")

Chat = Sequence[Message]
MakeDocuments = Callable[..., Path]
RunStage = Callable[..., tuple[Path, Mapping[str, Json]]]
MakeRows = Callable[..., Path]


def chat_of(*contents: str) -> Chat:
    """A conversation, user first."""
    return [
        Message(role=role, content=content)
        for role, content in zip(("user", "assistant") * len(contents), contents, strict=False)
    ]


CHATS = [chat_of(f"say {word}", f" {word}") for word in WORDS]


@pytest.fixture
def make_rows(
    make_documents: MakeDocuments, tokenizer_folder: Path, run_stage: RunStage
) -> MakeRows:
    """Return a function that packs documents, the same for training and validation."""

    def make(name: str, documents: Sequence[object], packing: str = "concatenate") -> Path:
        folder, _ = run_stage(
            pack,
            {"seq_len": SEQ_LEN, "packing": packing},
            out=name,
            documents=make_documents(documents, documents),
            tokenizer=tokenizer_folder,
        )
        return folder

    return make


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products are slower on two threads, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def chat_model(tokenizer: ByteLevelBPE) -> Transformer:
    """A model overfitted on CHATS, so that it knows all answers."""
    return overfitted(tokenizer)


def overfitted(tokenizer: Tokenizer, seq_len: int = SEQ_LEN) -> Transformer:
    """Train on CHATS in the tokenizer's format until the answers are known."""
    rendered = [render_chat(chat, tokenizer) for chat in CHATS]
    width = max(len(chat.ids) for chat in rendered)
    tokens = torch.full((len(CHATS), width), tokenizer.pad_id)
    targets = torch.full((len(CHATS), width), IGNORED)
    for row, (ids, mask) in enumerate(rendered):
        tokens[row, : len(ids)] = torch.tensor(ids)
        targets[row, : len(ids)] = torch.where(torch.tensor(mask), torch.tensor(ids), IGNORED)
    model = new_model(tokenizer, 2, seq_len)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        loss = token_losses(model(tokens[:, :-1]), targets[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.fixture
def inputs(
    make_rows: MakeRows,
    corpus: list[str],
    tokenizer: ByteLevelBPE,
    tokenizer_folder: Path,
    chat_model: Transformer,
) -> dict[str, Path]:
    """The five inputs of the stage: an untrained base model and a chat model that answers."""
    text, chats = make_rows("text", corpus[2:6]), make_rows("chats", CHATS)
    base = new_model(tokenizer, seed=1)
    return {
        "base": write_model(text.parent / "base", base, tokenizer),
        "chat": write_model(text.parent / "chat", chat_model, tokenizer),
        "text_sequences": text,
        "chat_sequences": chats,
        "tokenizer": tokenizer_folder,
    }


@pytest.fixture
def run_evaluate(run_stage: RunStage) -> RunStage:
    """Run the stage; the models are the inputs in the order of the pipeline."""

    def run(
        function: StageFunction, settings: Mapping[str, Json], **inputs: object
    ) -> tuple[Path, Mapping[str, Json]]:
        models = [name for name in ("base", "chat", "aligned") if name in inputs]
        return run_stage(function, {**settings, "models": models}, **inputs)

    return run


@pytest.fixture
def three_models(
    inputs: dict[str, Path], chat_model: Transformer, tokenizer: ByteLevelBPE
) -> dict[str, Path]:
    """The inputs with a third model, equal to the chat model."""
    aligned = write_model(inputs["chat"].parent / "aligned", chat_model, tokenizer)
    return {**inputs, "aligned": aligned}


def new_model(tokenizer: Tokenizer, seed: int, seq_len: int = SEQ_LEN) -> Transformer:
    model = Transformer(SHAPE, tokenizer.vocab_size, seq_len)
    model.initialize(torch.Generator().manual_seed(seed))
    return model


def write_model(
    folder: Path, model: Transformer, tokenizer: ByteLevelBPE, document_mask: bool = True
) -> Path:
    writer = ArtifactWriter(folder)
    save_model(writer, model, tokenizer.to_files())
    writer.finish(
        stage="pretrain",
        summary={
            "content": "text" if folder.name == "base" else "chats",
            "num_steps": 1500,
            "num_tokens": 76800,
        },
        settings={"document_mask": document_mask},
    )
    return folder


def read_report(folder: Path) -> Report:
    return Report.from_json((folder / "report.json").read_bytes())


def test_the_report_holds_every_metric_and_the_chat_model_answers(
    inputs: dict[str, Path], run_evaluate: RunStage
) -> None:
    folder, summary = run_evaluate(evaluate, SETTINGS, **inputs)
    report = read_report(folder)
    assert summary == report.values()
    assert set(summary) == {
        *(f"{model}/{name}" for model in ("base", "chat") for name in MODEL_METRICS),
        *(f"baseline/{name}_bits_per_byte" for name in ("unigram", "gzip", "xz")),
        *(f"leak/{name}" for name in LEAK_METRICS),
        "data/validation_bytes",
        "data/validation_tokens",
    }
    assert summary["chat/exact_match"] == 1.0 and summary["base/exact_match"] == 0.0
    assert summary["leak/passed"] == 1.0 and summary["leak/largest_difference"] == 0.0
    answers = report.metrics["chat/answer_loss"]
    assert answers.value < 0.1 and answers.num_examples == len(CHATS)
    text = (folder / "report.md").read_text()
    assert "| context | 48 tokens |" in text
    assert "| base model, trained for | 1,500 steps on 76,800 tokens |" in text
    shown = json.loads((folder / "samples.json").read_bytes())
    num = len(shown) - len(SETTINGS["prompts"])
    assert [s["kind"] for s in shown] == ["instruction"] * num + ["continuation"] * 2
    assert all(sample["chat"] == sample["expected"] for sample in shown[:num])
    assert {sample["prompt"] for sample in shown[:num]} <= {f"say {word}" for word in WORDS}
    assert [sample["prompt"] for sample in shown[num:]] == SETTINGS["prompts"]


def test_a_third_model_is_measured_and_reported(
    three_models: dict[str, Path], run_evaluate: RunStage
) -> None:
    folder, summary = run_evaluate(evaluate, SETTINGS, **three_models)
    for name in MODEL_METRICS:
        assert summary[f"aligned/{name}"] == summary[f"chat/{name}"] != summary[f"base/{name}"]
    assert summary["leak/passed"] == 1.0
    report = read_report(folder)
    assert all(list(sample.completions) == ["aligned", "base", "chat"] for sample in report.samples)
    text = (folder / "report.md").read_text()
    assert text == report.to_markdown()
    assert "| instruction | expected | base model | chat model | aligned model |" in text
    assert "| aligned model | 1.000" in text
    shown = json.loads((folder / "samples.json").read_bytes())
    assert all(sample["aligned"] == sample["chat"] for sample in shown[:5])


def test_a_recipe_without_a_chat_model_is_measured(
    inputs: dict[str, Path], run_evaluate: RunStage
) -> None:
    del inputs["chat"]
    folder, summary = run_evaluate(evaluate, SETTINGS, **inputs)
    assert "base/exact_match" in summary and not any(name.startswith("chat/") for name in summary)
    assert "chat model" not in (folder / "report.md").read_text()


def test_a_task_added_to_the_table_is_measured_on_each_model(
    inputs: dict[str, Path], run_evaluate: RunStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count(evaluated: Evaluated, data: EvaluationData) -> TaskResult:
        value = float(evaluated.model.num_parameters() * len(data.prompts))
        metric = Metric(value=value, unit="parameters", num_examples=1)
        return TaskResult(metrics={"size": metric})

    added = EvaluationTask(measure=count, notes=lambda data: iter(["size is no quality"]))
    monkeypatch.setitem(TASKS, "size", added)
    folder, summary = run_evaluate(evaluate, SETTINGS, **inputs)
    num_parameters = Transformer(SHAPE, 600, SEQ_LEN).num_parameters()
    assert summary["base/size"] == summary["chat/size"] == 2 * num_parameters
    text = (folder / "report.md").read_text()
    assert "| `base/size` |" in text and "- size is no quality" in text


def test_items_make_the_metrics_of_the_report_and_models_are_compared_on_them(
    three_models: dict[str, Path], run_evaluate: RunStage
) -> None:
    folder, summary = run_evaluate(evaluate, SETTINGS, **three_models)
    report, items = read_report(folder), read_items(folder)
    assert list(items) == ["base", "chat", "aligned"]
    for model, of_model in items.items():
        assert set(of_model) == set(MODEL_METRICS)
        for name, found in of_model.items():
            assert found.value == pytest.approx(summary[f"{model}/{name}"], rel=1e-5)
            assert len(found.ids) == report.metrics[f"{model}/{name}"].num_examples
    known = {document_id(chat) for chat in CHATS}
    assert set(items["chat"]["answer_loss"].ids) == known, "as in the documents of clean"
    assert items["base"]["exact_match"].ids == items["chat"]["exact_match"].ids
    found = {(one.a, one.b): one.metrics for one in report.comparisons}
    assert list(found) == [("base", "chat"), ("base", "aligned"), ("chat", "aligned")]
    better = found["base", "chat"]["answer_loss"]
    assert (better.verdict, better.num_items) == ("not distinguishable", 6), "p = 2 / 64, 3 times"
    assert better.difference < better.interval[1] < 0
    same = found["chat", "aligned"]["bits_per_byte"]
    assert (same.difference, same.p_value, same.interval) == (0.0, 1.0, (0.0, 0.0))
    text = (folder / "report.md").read_text()
    assert "| chat | base | exact\\_match | 1.0000 | 0.0000 | +1.0000 |" in text


MODEL_METRICS = ("bits_per_byte", "answer_loss", "exact_match")
LEAK_METRICS = (
    "passed",
    "largest_difference",
    "cache_difference",
    "total_error",
    "repetition",
    "document_difference",
)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_models_and_baselines_are_measured_on_the_same_bytes(
    packing: str,
    inputs: dict[str, Path],
    make_rows: MakeRows,
    run_evaluate: RunStage,
    corpus: list[str],
) -> None:
    inputs["text_sequences"] = make_rows(packing, corpus[2:6], packing)
    report = read_report(run_evaluate(evaluate, SETTINGS, **inputs)[0])
    num_bytes = sum(len(text.encode()) for text in corpus[2:6])
    assert report.metrics["data/validation_bytes"].value == num_bytes
    assert report.metrics["baseline/gzip_bits_per_byte"].num_examples == num_bytes
    assert report.metrics["base/bits_per_byte"].num_examples == 4


@pytest.mark.parametrize("document_mask", [False, True])
def test_text_is_scored_as_the_base_model_was_trained(
    inputs: dict[str, Path],
    run_evaluate: RunStage,
    tokenizer: ByteLevelBPE,
    document_mask: bool,
) -> None:
    model = new_model(tokenizer, seed=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 5  # so that the attention mask matters
    write_model(inputs["base"], model, tokenizer, document_mask)
    rows = PackedSequences(inputs["text_sequences"], "validation")
    tokens, _, documents = map(torch.from_numpy, rows.read(np.arange(rows.num_sequences)))
    with torch.no_grad():
        logits = model(tokens[:, :-1], documents[:, :-1] if document_mask else None)
    sizes = torch.from_numpy(tokenizer.token_bytes)[tokens[:, 1:]]
    nats = token_losses(logits, tokens[:, 1:])[sizes > 0].double().sum()
    _, summary = run_evaluate(evaluate, SETTINGS, **inputs)
    expected = float(nats / math.log(2) / sizes.sum())
    assert summary["base/bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def test_two_runs_give_the_same_bytes_and_another_seed_other_samples(
    inputs: dict[str, Path], run_evaluate: RunStage
) -> None:
    first, second, other = (
        run_evaluate(evaluate, SETTINGS, seed=seed, out=name, **inputs)[0]
        for seed, name in ((1, "first"), (1, "second"), (2, "other"))
    )
    assert load_artifact(first).digest == load_artifact(second).digest
    ours, theirs = read_report(first), read_report(other)
    assert ours.samples[:3] == theirs.samples[:3], "answers are greedy"
    assert ours.samples[3:] != theirs.samples[3:]


def test_it_runs_as_a_process_of_its_own(inputs: dict[str, Path], tmp_path: Path) -> None:
    job = Job(
        stage="evaluate",
        settings={**SETTINGS, "models": ["base", "chat"]},
        inputs={name: str(folder) for name, folder in inputs.items()},
        out=tmp_path / "made",
        work=tmp_path / "made.work",
        runtime=RuntimeConfig(num_threads=1),
    )
    write_job(tmp_path / "job.json", job)
    command = [sys.executable, "-m", "llm.evaluate", str(tmp_path / "job.json")]
    root = Path(job_module.__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stderr) == (0, "")
    assert load_artifact(job.out).stage == "evaluate"
    progress = json.loads((job.work / PROGRESS).read_bytes())
    assert progress["done"] == progress["total"] > 0


def test_a_leak_is_reported_and_the_stage_goes_on(
    inputs: dict[str, Path], run_evaluate: RunStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden_states = Transformer.hidden_states

    def leaky(self: Transformer, *arguments: object, **named: object) -> torch.Tensor:
        x = hidden_states(self, *arguments, **named)  # type: ignore[arg-type]
        return x + 0.1 * x.mean(dim=1, keepdim=True)

    monkeypatch.setattr(Transformer, "hidden_states", leaky)
    folder, summary = run_evaluate(evaluate, SETTINGS, **inputs)
    assert summary["leak/passed"] == 0.0
    assert "LEAK TEST FAILED" in (folder / "report.md").read_text()


def test_without_single_questions_there_is_no_exact_match(
    inputs: dict[str, Path], make_rows: MakeRows, run_evaluate: RunStage
) -> None:
    inputs["chat_sequences"] = make_rows("several", [chat_of("hi", " hello", "bye", " see you")])
    folder, summary = run_evaluate(evaluate, SETTINGS, **inputs)
    assert not any("exact_match" in name for name in summary)
    assert "1 chats skipped: not ending with their only answer" in " ".join(
        read_report(folder).notes
    )


def test_a_prompt_longer_than_the_context_is_named(
    inputs: dict[str, Path], run_evaluate: RunStage
) -> None:
    settings = {**SETTINGS, "prompts": ["fine", "w x y z " * 50]}
    with pytest.raises(ConfigError, match=r"evaluate\.prompts\[1\]: \d+ tokens .* = 48"):
        run_evaluate(evaluate, settings, **inputs)


def test_a_model_of_another_vocabulary_is_refused(
    inputs: dict[str, Path], run_evaluate: RunStage, tokenizer: ByteLevelBPE
) -> None:
    other = Transformer(SHAPE, tokenizer.vocab_size - 1, SEQ_LEN)
    write_model(inputs["chat"], other, tokenizer)
    with pytest.raises(ArtifactError, match=r"chat: a model of 599 tokens.* have 600"):
        run_evaluate(evaluate, SETTINGS, **inputs)


def test_a_model_with_a_shorter_context_is_refused(
    inputs: dict[str, Path], run_evaluate: RunStage, tokenizer: ByteLevelBPE
) -> None:
    write_model(inputs["base"], Transformer(SHAPE, tokenizer.vocab_size, 16), tokenizer)
    with pytest.raises(ArtifactError, match="context of 16 tokens, but sequences of 48"):
        run_evaluate(evaluate, SETTINGS, **inputs)


def test_it_stops_when_asked(
    inputs: dict[str, Path], run_evaluate: RunStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_module, "_is_stopping", True)
    with pytest.raises(Interrupted):
        run_evaluate(evaluate, SETTINGS, **inputs)


@pytest.mark.parametrize("chat_format", CHAT_FORMATS)
def test_instructions_are_the_first_single_answers_and_skipped_chats_are_counted(
    chat_format: str,
    make_documents: MakeDocuments,
    run_stage: RunStage,
    tokenizer: ByteLevelBPE,
    tmp_path: Path,
) -> None:
    tokenizer = ByteLevelBPE.from_json(tokenizer.library_json())
    tokenizer.chat_format = chat_format
    for name, data in tokenizer.to_files().items():
        (tmp_path / name).write_bytes(data)
    system = Message(role="system", content="be brief")
    chats: list[Chat] = [
        *(chat_of(f"question {n}?\n", f"\n\nanswer {n}" * (n % 3)) for n in range(8)),
        [system, *chat_of("with a system? ### Response:\n", "yes")],
        chat_of("one", "1", "two", "2"),
        chat_of("answered?", "yes", "and now?"),
        chat_of("alone"),
        chat_of("a long answer", "word " * 120),
    ]
    documents = make_documents(chats, chats)
    settings = {"seq_len": 4 * SEQ_LEN}
    folder, _ = run_stage(pack, settings, documents=documents, tokenizer=tmp_path)
    rows = PackedSequences(folder, "validation")
    rendered = [render_chat(chat, tokenizer) for chat in chats]
    cut = [tuple(each[: rows.seq_len + 1] for each in one) for one in rendered]
    assert sorted(tuple(chat) for _, chat in read_chats(rows)) == sorted(cut)
    found = read_instructions(rows, tokenizer, limit=100)
    assert found.num_other_shapes == 4
    expected = {
        tuple(render_prompt(chat[:-1], tokenizer)): chat[-1]["content"] for chat in chats[:9]
    }
    assert {one.prompt_ids: one.expected for one in found.instructions} == expected
    prompts = {one.prompt for one in found.instructions}
    if chat_format == "turns":
        assert {"question 0?\n", "be brief\n\nwith a system? ### Response:\n"} <= prompts
    assert all(any(f"question {n}?" in prompt for prompt in prompts) for n in range(8))
    first = read_instructions(rows, tokenizer, limit=3)
    assert first.instructions == found.instructions[:3]


@pytest.mark.parametrize("chat_format", ["chatml", "llama3", "alpaca"])
def test_a_model_that_knows_the_answers_gives_them_and_stops_in_every_format(
    chat_format: str,
    make_documents: MakeDocuments,
    run_stage: RunStage,
    tokenizer: ByteLevelBPE,
    tmp_path: Path,
) -> None:
    tokenizer = ByteLevelBPE.from_json(tokenizer.library_json())
    tokenizer.chat_format = chat_format
    for name, data in tokenizer.to_files().items():
        (tmp_path / name).write_bytes(data)
    documents = make_documents(CHATS, CHATS)
    folder, _ = run_stage(pack, {"seq_len": 128}, documents=documents, tokenizer=tmp_path)
    held_out = read_instructions(PackedSequences(folder, "validation"), tokenizer, limit=100)
    model = overfitted(tokenizer, 128).eval()
    (answers,) = answer_instructions(model, tokenizer, held_out.instructions, max_new_tokens=16)
    assert sorted(answers) == sorted(f" {word}" for word in WORDS)
    assert exact_match(answers, held_out.instructions).value == 1


def test_exact_match_ignores_white_space_at_the_ends() -> None:
    wanted = Instruction(prompt_ids=(1,), prompt="?", expected=" a, b\n")
    answers = ["a, b", " a, b ", "a,b", "A, b", "a, b.", ""]
    found = exact_match(answers, [wanted] * 6)
    assert found.value == pytest.approx(2 / 6, rel=1e-5)
    assert found.num_examples == 6


@pytest.mark.parametrize(("num_right", "count"), [(0, 20), (7, 20), (20, 20), (1, 1)])
def test_the_error_of_a_share_is_half_of_wilsons_interval(num_right: int, count: int) -> None:
    wanted = Instruction(prompt_ids=(1,), prompt="?", expected="yes")
    answers = ["yes"] * num_right + ["no"] * (count - num_right)
    # the interval's ends solve |p - share| = sqrt(p (1 - p) / count): the score test at z = 1
    share = num_right / count
    a, b, c = 1 + 1 / count, -2 * share - 1 / count, share**2
    low, high = sorted(np.roots([a, b, c]).real)
    found = exact_match(answers, [replace(wanted)] * count)
    assert found.standard_error == pytest.approx((high - low) / 2, rel=1e-5, abs=1e-8)
    assert found.standard_error is not None and found.standard_error > 0


def test_exact_match_is_reported_by_kind_and_samples_show_each_kind() -> None:
    instructions = [
        Instruction(prompt_ids=(1,), prompt="?", expected=expected, kind=kind)
        for expected, kind in (("a", "name"), ("b", "name"), ("c", "default"), ("d", ""))
    ]
    by_kind = exact_match_by_kind(["a", "x", "c", "d"], instructions)
    assert {kind: metric.value for kind, metric in by_kind.items()} == {"name": 0.5, "default": 1.0}
    assert one_of_each_kind(instructions, 3) == [0, 2, 3]
    assert one_of_each_kind(instructions, 9) == [0, 2, 3, 1]


def test_only_the_most_frequent_kinds_have_a_metric() -> None:
    instructions = [
        Instruction(prompt_ids=(1,), prompt="?", expected="", kind=f"kind {number:02}")
        for number in range(30)
        for _ in range(1 + (number >= 25))
    ]
    by_kind = exact_match_by_kind([""] * len(instructions), instructions)
    expected = [*range(15), *range(25, 30)]
    assert list(by_kind) == [f"kind {number:02}" for number in expected]
