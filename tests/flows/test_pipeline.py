"""The pipeline is made from the recipe and the table of models, which all else reads."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from flows.pipeline import language_model
from flows.sweep import Member, Sweep, comparison, run_sweep
from llm.artifact import Json
from llm.config import RunConfig
from llm.errors import ConfigError
from llm.recipes import load_config
from tasks.cached import Outcome
from tasks.plan import Selection, key_parts, make_plan, section_of
from tasks.stages import in_order
from tasks.store import ArtifactStore, KeyParts
from tasks.tracking.journal import ReportFinished
from tests.tasks.tracked_folder import (
    SAMPLES,
    TrackedFolder,
    finish_model,
    start_model,
    write_points,
)


def test_the_stages_after_pretrain_are_the_recipe_s(tmp_path: Path) -> None:
    settings = ["stages_after_pretrain=[finetune,align]", "align.method=grpo"]
    config = load_config("quickstart", settings)
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
def test_other_stages_after_pretrain_are_refused(stages: str) -> None:
    with pytest.raises(ConfigError, match=r"stages_after_pretrain: found .*: finetune, align"):
        load_config("quickstart", [f"stages_after_pretrain={stages}"])


SEVERAL = [
    "stages_after_pretrain=[finetune,align]",
    "finetune.stages=[{name: mid, data: chats-maths, num_steps: 30}, {name: chat}]",
    "align.stages=[{name: liked, data: preferences}, {name: right, method: grpo, lora: {rank: 2}}]",
    "align.lora={rank: 4, alpha: 8}",
    "align.stages.1.num_steps=40",
    "download.more=[{name: chats-maths, kind: files, path: maths.jsonl}]",
]


def test_a_stage_may_train_several_times_each_on_its_own_data(tmp_path: Path) -> None:
    (tmp_path / "maths.jsonl").write_text("{}")
    path = f"download.more.0.path={tmp_path / 'maths.jsonl'}"
    config = load_config("quickstart", [*SEVERAL, path])
    steps = {step.name: step for step in in_order(language_model(config))}
    trained = ["pretrain", "finetune mid", "finetune chat", "align liked", "align right"]
    assert list(steps)[-6:] == [*trained, "evaluate"]
    data = ["pack corpus", "pack chats-maths", "pack chats", "pack preferences", "pack chats"]
    assert [steps[name].inputs["sequences"].name for name in trained] == data
    assert [steps[name].inputs["base"].name for name in trained[1:]] == trained[:-1]
    models = ["base", "mid", "chat", "liked", "right"]
    assert [steps["evaluate"].inputs[name].name for name in models] == trained
    assert section_of(steps["evaluate"], config)["models"] == models
    mid, chat = (section_of(steps[name], config) for name in trained[1:3])
    # the settings beside `stages` are those of each, but for its own
    assert (mid["num_steps"], chat["num_steps"]) == (30, config.finetune.num_steps)
    assert mid["precision"] == chat["precision"] == "bf16"
    liked, right = config.align.stages
    assert (liked.lora.rank, liked.lora.alpha) == (4, 8)
    assert (right.lora.rank, right.lora.alpha, right.num_steps) == (2, 8, 40)


def test_a_model_s_name_is_not_part_of_its_key(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    keys: list[KeyParts] = []
    for name in ("one", "two"):
        config = load_config("quickstart", [f"finetune.stages=[{{name: {name}}}]"])
        step = in_order(language_model(config))[-2]
        keys.append(key_parts(step, config, {}, store))
    assert keys[0] == keys[1]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("finetune.stages=[{data: chats}]", "finetune.stages.0.name: missing"),
        ("finetune.stages=[{name: base}]", "finetune.stages.0.name: found 'base', expected a name"),
        ("finetune.stages=[{name: a_b}]", "finetune.stages.0.name: found 'a_b'"),
        ("finetune.data=chat", "finetune.data: found 'chat', expected one of .*, did you mean"),
        ("finetune.data=preferences", "found preferences, which holds preferences; expected text"),
        ("align.data=chats", "align.data: found chats, which holds chats; expected preferences"),
        ("download.more=[{name: maths}]", "download.more.0.name: found 'maths', expected corpus-"),
        ("download.more=[{name: chats-a},{name: chats-a}]", "chats-a, chats-a, expected distinct"),
    ],
)
def test_names_and_datasets_are_checked_before_anything_runs(override: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_config("quickstart", ["stages_after_pretrain=[finetune,align]", override])


SAMPLED = [
    {"step": 0, "prompt": "?", "answer": answer, "reference": "a", "reward": reward}
    for answer, reward in (("a", 1.0), ("b", 0.0))
]


def test_three_models_are_tracked_beside_each_other(tmp_path: Path) -> None:
    tracked = TrackedFolder(tmp_path)
    tracker = tracked.start()
    for stage in ("pretrain", "finetune", "align"):
        work = tmp_path / f"{stage}-work"
        start_model(tracker, work, stage)
        write_points(work, range(2))
        lines = "".join(json.dumps(one) + "\n" for one in SAMPLED) if stage == "align" else ""
        finish_model(tracker, work, tmp_path / stage, stage, samples=lines)
    report = tmp_path / "report"
    report.mkdir()
    for name in ("report.md", "report.json"):
        (report / name).write_text("")
    (report / "samples.json").write_text(json.dumps([{**one, "aligned": "!"} for one in SAMPLES]))
    metrics: dict[str, Json] = {"chat/exact_match": 0.5, "aligned/exact_match": 0.75}
    models = ["base", "chat", "aligned"]
    tracker.log(ReportFinished(folder=str(report), models=models, metrics=metrics))
    tracker.close()
    runs = tracked.runs("models")
    chat, aligned = runs["chat lr=1 3.2M tiny"], runs["aligned lr=1 3.2M tiny"]
    assert aligned.data.metrics["eval/exact_match"] == 0.75
    assert "chat/exact_match" not in aligned.data.metrics
    file = tracked.client.download_artifacts(aligned.info.run_id, "sampled_answers.json")
    assert json.loads(Path(file).read_text())["data"] == [
        ["?", "a", 0, 1.0, "a"],
        ["?", "b", 0, 0.0, "a"],
    ]
    shown = json.loads(aligned.data.tags["mlflow.loggedArtifacts"])
    assert [one["path"] for one in shown] == ["sampled_answers.json", "samples.json"]
    [start] = aligned.inputs.model_inputs
    assert start.model_id == chat.outputs.model_outputs[0].model_id
    [made] = aligned.outputs.model_outputs
    assert tracked.client.get_logged_model(made.model_id).model_type == "aligned"


def test_each_model_of_the_recipe_has_a_column_in_sweeps() -> None:
    def run(config: RunConfig, member: Member, overrides: Sequence[str]) -> list[Outcome]:
        summary = {"base/bits_per_byte": 2.0, "aligned/bits_per_byte": 2.5}
        return [
            Outcome(
                stage="evaluate", role="", key="k", digest="d", status="built", reason="",
                seconds=1.0, path="", summary=summary,
            )
        ]  # fmt: skip

    members = run_sweep(
        Sweep(
            recipe="quickstart",
            members=[["seed=2", "stages_after_pretrain=[align]", "align.method=grpo"]],
        ),
        run,
        lambda line: None,
    )
    headings, rows = comparison(members)
    assert headings == ["member", "base bits/byte", "aligned bits/byte", "seconds"]
    assert rows[0][1:3] == ["2", "2.5"]
