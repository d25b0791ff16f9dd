"""A run's events reach MLflow completely, in order and once, however the run ends."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from llm.artifact import Json
from llm.monitoring.metrics import write_num_parameters
from tasks.tracking.journal import ModelFinished, ReportFinished, StageCached
from tests.tasks.tracked_folder import (
    SAMPLES,
    TrackedFolder,
    finish_model,
    finish_stage,
    start_model,
    start_stage,
    wait_for,
    write_points,
)


def test_a_whole_run_is_logged(tracked: TrackedFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = tracked.start()
    start_stage(tracker, "pack", "corpus")
    summary: dict[str, Json] = {"rows": 3, "skipped": {"too long: 9%": 2}, "content": "text"}
    finish_stage(tracker, "pack", "corpus", seconds=2.5, digest="p" * 32, summary=summary)
    for stage in ("pretrain", "finetune"):
        start_model(tracker, tracked.path / f"{stage}-work", stage)
        write_points(tracked.path / f"{stage}-work", range(250))
        finish_model(tracker, tracked.path / f"{stage}-work", tracked.path / stage, stage)
    report = tracked.path / "report"
    report.mkdir()
    (report / "report.md").write_text("# Report")
    (report / "report.json").write_text("{}")
    (report / "samples.json").write_text(json.dumps(SAMPLES))
    metrics: dict[str, Json] = {"base/exact": 0.25, "chat/exact": 0.5, "baseline/xz": 2.0}
    tracker.log(ReportFinished(folder=str(report), models=["base", "chat"], metrics=metrics))
    tracker.close()

    pipelines = tracked.runs("pipelines")
    assert sorted(pipelines) == ["finetune", "lr=1 tiny", "pack corpus", "pretrain"]
    parent = pipelines["lr=1 tiny"]
    assert parent.info.run_id == tracker.pipeline_run_id
    assert parent.data.params["pretrain.model.d_model"] == "256"
    assert len(parent.data.params["evaluate.prompts"]) == 6000
    assert "10,000 characters" in parent.data.params["evaluate.prompts"]
    assert "http://127.0.0.1:4200/runs/1" in parent.data.tags["mlflow.note.content"]
    child = pipelines["pack corpus"]
    assert child.data.tags["mlflow.parentRunId"] == tracker.pipeline_run_id
    assert child.data.metrics == {"seconds": 2.5, "rows": 3, "skipped.too long_ 9_": 2}
    assert child.data.params == {
        "pack.seq_len": "256",
        "pack.packing": "concatenate",
        "pack.shard_bytes": "67108864",
        "pack.long_chats": "truncate_right",
        "pack.shares": "[]",
    }

    models = tracked.runs("models")
    assert sorted(models) == ["base lr=1 3.2M tiny", "chat lr=1 3.2M tiny"]
    base, chat = models["base lr=1 3.2M tiny"], models["chat lr=1 3.2M tiny"]
    assert base.info.run_id == tracker.model_run_id("pretrain")
    assert tracked.steps(base.info.run_id) == list(range(250))
    assert tracked.steps(base.info.run_id, "x-axis/tokens") == list(range(250))
    assert base.data.metrics["final/val_loss"] == 1.5
    assert base.data.metrics["eval/exact"] == 0.25
    assert chat.data.metrics["eval/exact"] == 0.5
    assert base.data.metrics["baseline/xz"] == chat.data.metrics["baseline/xz"] == 2.0
    assert [use.dataset.name for use in base.inputs.dataset_inputs] == ["pack corpus"]
    made = base.outputs.model_outputs[0].model_id
    assert [used.model_id for used in chat.inputs.model_inputs] == [made]
    files = {file.path for file in tracked.client.list_artifacts(base.info.run_id)}
    assert files >= {"loss.png", "report.md", "report.json", "samples.json", "settings.json"}
    assert files >= {"tokenizer.json", "model.json"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tracked.path / 'mlflow.db'}")
    table = tracked.client.load_table(
        base.info.experiment_id, "samples.json", [base.info.run_id, chat.info.run_id], ["run_id"]
    )
    answers = {(row.run_id, row.prompt): row.completion for row in table.itertuples()}
    assert answers[base.info.run_id, "2+2?"] == "five"
    assert answers[chat.info.run_id, "2+2?"] == "4"
    assert {run.info.status for run in [*pipelines.values(), *models.values()]} == {"FINISHED"}
    assert not list((tracked.path / "tracking").iterdir())


def test_a_cached_stage_is_a_tag_and_its_model_gets_the_new_report(tracked: TrackedFolder) -> None:
    first = tracked.start("first")
    start_model(first, tracked.work)
    write_points(tracked.work, range(3))
    digest = finish_model(first, tracked.work, tracked.path / "base")
    first.close()
    second = tracked.start("second")
    second.log(StageCached(stage="pretrain", role="", digest=digest))
    second.close()
    assert sorted(tracked.runs("pipelines")) == ["first", "pretrain", "second"]
    tags = tracked.runs("pipelines")["second"].data.tags
    built_in = tracked.runs("pipelines")["pretrain"].info.run_id
    assert tags["cached/pretrain"] == f"{digest} built in run {built_in}"
    assert second.model_run_id("pretrain") == first.model_run_id("pretrain")


def test_a_running_model_has_its_size_in_its_name(tracked: TrackedFolder) -> None:
    tracker = tracked.start()
    start_model(tracker, tracked.work)
    write_points(tracked.work, range(1))
    wait_for(lambda: tracker.model_run_id("pretrain"))
    assert list(tracked.runs("models")) == ["base lr=1 tiny"]
    write_num_parameters(tracked.work, 3_200_000)
    wait_for(lambda: list(tracked.runs("models")) == ["base lr=1 3.2M tiny"])
    tracker.close("KILLED")
    assert list(tracked.runs("models")) == ["base lr=1 3.2M tiny"]


def test_runs_of_a_sweep_are_tagged_with_it_also_a_model_that_was_cached(
    tracked: TrackedFolder,
) -> None:
    alone = tracked.start("alone")
    start_model(alone, tracked.work)
    write_points(tracked.work, range(3))
    digest = finish_model(alone, tracked.work, tracked.path / "base")
    alone.close()
    assert "fromscratch.sweep" not in tracked.runs("models")["base 3.2M alone"].data.tags
    member = tracked.start("1 seed=1 tiny", sweep="seeds")
    member.log(StageCached(stage="pretrain", role="", digest=digest))
    member.close()
    tagged = [tracked.runs("pipelines")["1 seed=1 tiny"], tracked.runs("models")["base 3.2M alone"]]
    assert [run.data.tags["fromscratch.sweep"] for run in tagged] == ["seeds", "seeds"]


def test_points_are_followed_while_training_goes_on(tracked: TrackedFolder) -> None:
    tracker = tracked.start()
    start_model(tracker, tracked.work)
    write_points(tracked.work, range(10))
    wait_for(lambda: tracker.model_run_id("pretrain"))
    run_id = tracker.model_run_id("pretrain")
    wait_for(lambda: len(tracked.steps(run_id)) == 10)
    with (tracked.work / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "tok')  # half a line: seen before it is whole
    time.sleep(0.3)
    with (tracked.work / "metrics.jsonl").open("a") as file:
        file.write('ens": 100, "seconds": 0.1, "metrics": {"train/loss": 1e999}}\n')
    wait_for(lambda: tracked.steps(run_id) == list(range(11)))
    tracker.close("FAILED")
    assert {run.info.status for run in tracked.runs("models").values()} == {"FAILED"}
    assert {run.info.status for run in tracked.runs("pipelines").values()} == {"FAILED"}
    last = tracked.client.get_metric_history(run_id, "train/loss")[-1]
    assert last.value != last.value, "infinity is a gap, not 1.8e308"


def test_a_resumed_training_goes_on_in_its_run_and_no_point_is_twice(
    tracked: TrackedFolder,
) -> None:
    first = tracked.start("first")
    start_model(first, tracked.work)
    write_points(tracked.work, range(20))
    first.log(ModelFinished(stage="pretrain", role="", status="KILLED"))
    first.close("KILLED")
    assert {run.info.status for run in tracked.runs("models").values()} == {"KILLED"}
    points = (tracked.work / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tracked.work / "metrics.jsonl").write_text("".join(points[:13]))  # its checkpoint
    second = tracked.start("second")
    start_model(second, tracked.work)
    write_points(tracked.work, range(13, 30))
    finish_model(second, tracked.work, tracked.path / "base")
    second.close()
    assert second.model_run_id("pretrain") == first.model_run_id("pretrain")
    (run,) = tracked.runs("models").values()
    assert tracked.steps(run.info.run_id) == list(range(30))
    assert run.info.status == "FINISHED"


def test_a_killed_run_is_logged_to_its_end_by_the_next(tracked: TrackedFolder) -> None:
    code = f"""
import os, signal, sys, time
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from tests.tasks.tracked_folder import TrackedFolder, start_model, write_points
tracked = TrackedFolder(Path({str(tracked.path)!r}))
tracker = tracked.start("first")
start_model(tracker, tracked.work)
write_points(tracked.work, range(5))
if sys.argv[1] == "late":
    while not tracker.model_run_id("pretrain"): time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""
    for moment, num_models in (("early", 1), ("late", 2)):
        killed = subprocess.run([sys.executable, "-c", code, moment], timeout=60)
        assert killed.returncode == -signal.SIGKILL
        tracked.start(f"after {moment}").close()
        models = tracked.client.search_runs(
            [tracked.client.get_experiment_by_name("fromscratch/models").experiment_id]
        )
        assert [model.info.status for model in models] == ["KILLED"] * num_models
        assert tracked.steps(models[0].info.run_id) == list(range(5))
        (tracked.work / "tracking.json").unlink()
        (tracked.work / "metrics.jsonl").unlink()
    by_status = {
        run.info.run_name: run.info.status
        for run in tracked.client.search_runs(
            [tracked.client.get_experiment_by_name("fromscratch/pipelines").experiment_id]
        )
    }
    assert by_status == {
        "first": "KILLED",
        "pretrain": "KILLED",
        "after early": "FINISHED",
        "after late": "FINISHED",
    }


def test_sending_a_journal_twice_changes_nothing(tracked: TrackedFolder) -> None:
    tracker = tracked.start()
    start_model(tracker, tracked.work)
    write_points(tracked.work, range(30))
    finish_model(tracker, tracked.work, tracked.path / "base")
    (journal,) = (tracked.path / "tracking").glob("*.journal")
    copy = journal.read_bytes()
    tracker.close("FAILED")

    def everything() -> Any:
        every = [*tracked.runs("pipelines").values(), *tracked.runs("models").values()]
        points = {
            (run.info.run_id, key): [
                (point.step, point.timestamp, point.value)
                for point in tracked.client.get_metric_history(run.info.run_id, key)
            ]
            for run in every
            for key in run.data.metrics
        }
        logged = tracked.client.search_logged_models([every[-1].info.experiment_id])
        shown = [(run.info.run_name, run.data.tags, run.data.params) for run in every]
        return points, shown, [model.model_id for model in logged]

    before = everything()
    journal.write_bytes(copy)
    again = tracked.start("again")
    again.close()
    tracked.client.delete_run(again.pipeline_run_id)
    assert everything() == before


def test_a_refused_event_is_a_warning_and_the_rest_is_logged(
    tracked: TrackedFolder, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = tracked.start()
    finish_stage(tracker, "pack", "never started", digest="d" * 32)
    start_stage(tracker, "clean", "corpus")
    finish_stage(tracker, "clean", "corpus", digest="d" * 32)
    tracker.close()
    assert "could not log StageFinished to MLflow" in caplog.text
    assert tracked.runs("pipelines")["clean corpus"].info.status == "FINISHED"


def test_a_run_deleted_while_training_is_one_warning_and_ends_nothing(
    tracked: TrackedFolder, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = tracked.start()
    start_model(tracker, tracked.work)
    write_points(tracked.work, range(1))
    wait_for(lambda: tracker.model_run_id("pretrain"))
    wait_for(lambda: tracked.steps(tracker.model_run_id("pretrain")))
    tracked.client.delete_run(tracker.model_run_id("pretrain"))
    for step in range(1, 20):
        write_points(tracked.work, range(step, step + 1))
        time.sleep(0.03)
    finish_model(tracker, tracked.work, tracked.path / "base")
    tracker.close()
    assert caplog.text.count("could not log metrics to MLflow") == 1
    assert {run.info.status for run in tracked.runs("pipelines").values()} == {"FINISHED"}


def test_a_forced_second_training_gets_its_own_run(tracked: TrackedFolder) -> None:
    for name in ("first", "second"):
        tracker = tracked.start(name)
        start_model(tracker, tracked.work)
        write_points(tracked.work, range(3))
        finish_model(tracker, tracked.work, tracked.path / name)
        tracker.close()
    found = {name: tracked.steps(run.info.run_id) for name, run in tracked.runs("models").items()}
    assert found == {"base 3.2M first": [0, 1, 2], "base 3.2M second": [0, 1, 2]}


def test_two_runs_at_once_make_one_pair_of_experiments(tracked: TrackedFolder) -> None:
    trackers = [tracked.start(f"run {number}") for number in range(3)]
    threads = [threading.Thread(target=tracker.close) for tracker in trackers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(tracked.runs("pipelines")) == ["run 0", "run 1", "run 2"]
    names = [found.name for found in tracked.client.search_experiments()]
    assert sorted(names) == ["Default", "fromscratch/models", "fromscratch/pipelines"]


def test_importing_tracking_imports_no_mlflow() -> None:
    code = "import sys, tasks.tracking.tracker; print('mlflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout.strip() == b"False"


def test_nothing_of_mlflow_reaches_the_terminal(tracked: TrackedFolder) -> None:
    (tracked.path / "mlflow.db").unlink()  # making one is when it says most
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from tests.tasks.tracked_folder import TrackedFolder, finish_model, start_model, write_points
tracked = TrackedFolder(Path({str(tracked.path)!r}))
tracker = tracked.start()
start_model(tracker, tracked.work)
write_points(tracked.work, range(5))
finish_model(tracker, tracked.work, tracked.path / "base")
tracker.close()
"""
    environment = {name: text for name, text in os.environ.items() if "MLFLOW" not in name}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, env=environment, timeout=60
    )
    assert (done.stdout, done.stderr) == (b"", b"")
    assert sorted(tracked.runs("models")) == ["base lr=1 3.2M tiny"]
