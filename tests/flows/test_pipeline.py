"""The pipeline is made from the recipe and the table of models; a model added there is in all."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from flows.pipeline import language_model
from flows.sweep import Member, Sweep, comparison, run_sweep
from llm.artifact import Json
from llm.config import FinetuneConfig, RunConfig, load_config
from llm.errors import ConfigError
from llm.models import MODELS, PipelineModel, chat_models
from tasks.cached import Outcome
from tasks.plan import Selection, make_plan
from tasks.stages import in_order
from tasks.store import ArtifactStore
from tasks.tracking.journal import ReportFinished
from tests.tasks.tracked_folder import (
    SAMPLES,
    TrackedFolder,
    finish_model,
    start_model,
    write_points,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class WithAlign(RunConfig):
    """Settings with a section for one more training stage."""

    align: FinetuneConfig = field(default_factory=FinetuneConfig)


@pytest.fixture
def align(monkeypatch: pytest.MonkeyPatch) -> PipelineModel:
    """One more model, with a section of the recipe, trained from the chat model."""
    monkeypatch.setattr("llm.config.RunConfig", WithAlign)
    added = PipelineModel(stage="align", name="aligned", data="chats")
    monkeypatch.setitem(MODELS, added.stage, added)
    return added


def test_the_stages_after_pretrain_are_the_recipe_s(align: PipelineModel, tmp_path: Path) -> None:
    config = load_config("quickstart", ["stages_after_pretrain=[finetune,align]"])
    steps = in_order(language_model(config))
    names = [step.name for step in steps]
    assert names[-4:] == ["pretrain", "finetune", "align", "evaluate"]
    *_, finetune, made, report = steps
    assert made.inputs == {"base": finetune, "sequences": finetune.inputs["sequences"]}
    assert [report.inputs[name].name for name in ("base", "chat", "aligned")] == names[-4:-1]
    plan = make_plan(steps, config, ArtifactStore(tmp_path), Selection(start_from="align"))
    assert [item.status for item in plan] == ["build"] * len(steps)

    alone = in_order(language_model(load_config("quickstart", ["stages_after_pretrain=[]"])))
    assert [step.name for step in alone[-2:]] == ["pretrain", "evaluate"]
    assert alone[-1].inputs.keys() == {"base", "text_sequences", "chat_sequences", "tokenizer"}


@pytest.mark.parametrize(
    "stages", ["[align,finetune]", "[finetune,finetune]", "[dpo]", "[pretrain]"]
)
def test_other_stages_after_pretrain_are_refused(align: PipelineModel, stages: str) -> None:
    with pytest.raises(ConfigError, match=r"stages_after_pretrain: found .*: finetune, align"):
        load_config("quickstart", [f"stages_after_pretrain={stages}"])


def test_an_added_model_is_tracked_like_the_others(align: PipelineModel, tmp_path: Path) -> None:
    tracked = TrackedFolder(tmp_path)
    tracker = tracked.start()
    for stage in ("pretrain", "finetune", "align"):
        work = tmp_path / f"{stage}-work"
        start_model(tracker, work, stage)
        write_points(work, range(2))
        finish_model(tracker, work, tmp_path / stage, stage)
    report = tmp_path / "report"
    report.mkdir()
    for name in ("report.md", "report.json"):
        (report / name).write_text("")
    (report / "samples.json").write_text(json.dumps([{**one, "aligned": "!"} for one in SAMPLES]))
    metrics: dict[str, Json] = {"chat/exact_match": 0.5, "aligned/exact_match": 0.75}
    tracker.log(ReportFinished(folder=str(report), metrics=metrics))
    tracker.close()
    runs = tracked.runs("models")
    chat, aligned = runs["chat lr=1 3.2M tiny"], runs["aligned lr=1 3.2M tiny"]
    assert aligned.data.metrics["eval/exact_match"] == 0.75
    assert "chat/exact_match" not in aligned.data.metrics
    [start] = aligned.inputs.model_inputs
    assert start.model_id == chat.outputs.model_outputs[0].model_id
    [made] = aligned.outputs.model_outputs
    assert tracked.client.get_logged_model(made.model_id).model_type == "aligned"


def test_an_added_model_has_a_column_in_sweeps_and_answers_in_chat(align: PipelineModel) -> None:
    def run(config: RunConfig, member: Member, overrides: list[str]) -> list[Outcome]:
        summary = {"base/bits_per_byte": 2.0, "aligned/bits_per_byte": 2.5}
        return [
            Outcome(
                stage="evaluate", role="", key="k", digest="d", status="built", reason="",
                seconds=1.0, path="", summary=summary,
            )
        ]  # fmt: skip

    members = run_sweep(Sweep(recipe="quickstart", members=[["seed=2"]]), run, lambda line: None)
    headings, rows = comparison(members)
    assert headings == ["member", "base bits/byte", "aligned bits/byte", "seconds"]
    assert rows[0][1:3] == ["2", "2.5"]
    assert chat_models()[-1] is align
