"""MLflow's files move with an artifacts folder that is copied or moved."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking._tracking_service import utils

from tasks.tracking.files import LOCATION_COLUMNS, correct_locations
from tests.tasks.tracked_folder import TrackedFolder, finish_model, start_model, write_points


def make_model(tracked: TrackedFolder, name: str = "tiny") -> str:
    """Log a trained model to MLflow and return its run."""
    tracker = tracked.start(name)
    work = tracked.path / f"work {name}"
    start_model(tracker, work)
    write_points(work, range(3))
    finish_model(tracker, work, tracked.path / f"model of {name}")
    tracker.close()
    return tracker.model_run_id("pretrain")


def locations(tracked: TrackedFolder) -> list[str]:
    """Every location of files in the database."""
    with closing(sqlite3.connect(tracked.path / "mlflow.db")) as database:
        return [
            location
            for table, column in LOCATION_COLUMNS
            for (location,) in database.execute(f"SELECT {column} FROM {table}")
        ]


def make_absolute(tracked: TrackedFolder) -> None:
    """Write the locations as earlier versions of this project did."""
    folder = (tracked.path / "mlruns").as_uri()
    with closing(sqlite3.connect(tracked.path / "mlflow.db")) as database, database:
        for table, column in LOCATION_COLUMNS:
            database.execute(
                f"UPDATE {table} SET {column} = ? || rtrim('/' || substr({column}, 19), '/')",
                (folder,),
            )


def listed(tracked: TrackedFolder, run_id: str) -> set[str]:
    """The files of a run, as MLflow lists them."""
    return {file.path for file in tracked.client.list_artifacts(run_id)}


def copied(tracked: TrackedFolder) -> TrackedFolder:
    """A copy of an artifacts folder, as a new process sees it."""
    copy = tracked.path.with_name(f"{tracked.path.name}-copy")
    shutil.copytree(tracked.path, copy)
    utils._artifact_repos_cache.clear()
    return TrackedFolder(copy)


def moved(tracked: TrackedFolder) -> TrackedFolder:
    """An artifacts folder under another name, as a new process sees it."""
    target = tracked.path.with_name(f"{tracked.path.name}-moved")
    shutil.move(tracked.path, target)
    utils._artifact_repos_cache.clear()
    return TrackedFolder(target)


def files(folder: Path) -> dict[str, bytes]:
    """Every file in a folder."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_database_names_no_folder_of_this_machine(tracked: TrackedFolder) -> None:
    make_model(tracked)
    found = locations(tracked)
    assert {location.partition(":/")[0] for location in found} == {"mlflow-artifacts"}
    assert any("/models/" in location for location in found), "logged models too"


@pytest.mark.parametrize("is_old", [False, True], ids=["relative", "absolute paths of before"])
def test_a_copy_shows_its_files_and_writes_into_itself(
    tracked: TrackedFolder, is_old: bool
) -> None:
    first = make_model(tracked)
    if is_old:
        make_absolute(tracked)
    copy = copied(tracked)
    before = files(tracked.path)
    second = make_model(copy, "second")
    assert listed(copy, first) >= {"loss.png", "settings.json"}
    assert listed(copy, second) >= {"loss.png", "settings.json"}
    assert files(tracked.path) == before, "the original is as it was"
    assert (copy.path / "mlruns" / second / "artifacts" / "loss.png").is_file()


@pytest.mark.parametrize("is_old", [False, True], ids=["relative", "absolute paths of before"])
def test_a_moved_folder_shows_its_files(tracked: TrackedFolder, is_old: bool) -> None:
    first = make_model(tracked)
    if is_old:
        make_absolute(tracked)
    after = moved(tracked)
    make_model(after, "second")
    assert listed(after, first) >= {"loss.png", "settings.json"}
    model_id = after.client.get_run(first).outputs.model_outputs[0].model_id
    files_of_model = after.client.list_logged_model_artifacts(model_id)
    assert "MLmodel" in {file.path for file in files_of_model}
    assert not tracked.path.exists()


def test_a_killed_run_is_logged_to_its_end_in_the_moved_folder(tracked: TrackedFolder) -> None:
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from tests.tasks.tracked_folder import TrackedFolder, start_model, write_points
tracked = TrackedFolder(Path({str(tracked.path)!r}))
tracker = tracked.start("first")
start_model(tracker, tracked.work)
write_points(tracked.work, range(5))
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    after = moved(tracked)
    after.start("second").close()
    (model,) = after.runs("models").values()
    assert (model.info.status, after.steps(model.info.run_id)) == ("KILLED", list(range(5)))
    (dataset,) = model.inputs.dataset_inputs
    assert json.loads(dataset.dataset.source) == {"uri": "work"}


def test_a_python_of_the_user_reads_the_files_without_a_server(tracked: TrackedFolder) -> None:
    run_id = make_model(tracked)
    code = f"import mlflow; print(mlflow.artifacts.load_dict('runs:/{run_id}/settings.json'))"
    environment = {"PATH": os.environ["PATH"], "MLFLOW_TRACKING_URI": tracked.uri}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60
    )
    assert "'pretrain.num_steps': 2" in done.stdout, done.stderr


def test_files_that_are_elsewhere_stay_where_they_are(
    tracked: TrackedFolder, tmp_path: Path
) -> None:
    run_id = make_model(tracked)
    make_absolute(tracked)
    elsewhere = tmp_path.with_name(f"{tmp_path.name}-elsewhere") / "mlruns"
    shutil.move(tracked.path / "mlruns" / run_id, elsewhere / run_id)
    with closing(sqlite3.connect(tracked.path / "mlflow.db")) as database, database:
        uri = f"{elsewhere.as_uri()}/{run_id}/artifacts"
        database.execute("UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", (uri, run_id))
    assert correct_locations(tracked.path) > 0
    assert correct_locations(tracked.path) == 0, "once"
    assert tracked.client.get_run(run_id).info.artifact_uri == uri
    assert listed(tracked, run_id) >= {"loss.png"}


def test_locations_that_are_no_such_paths_are_left_alone(tracked: TrackedFolder) -> None:
    make_model(tracked)
    wanted: dict[str, Any] = {"s3://mlruns/x": "1", "/data/runs": "2"}
    with closing(sqlite3.connect(tracked.path / "mlflow.db")) as database, database:
        for location, experiment_id in wanted.items():
            update = "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?"
            database.execute(update, (location, experiment_id))
    correct_locations(tracked.path)
    assert set(locations(tracked)) >= set(wanted)
