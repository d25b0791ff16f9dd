"""An artifacts folder that is copied or moved takes MLflow's files along, also an older one's."""

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

from tasks.tracking.files import COLUMNS, correct_locations
from tests.tasks.mlflow_place import Place, finish_model, start_model, write_points


def make_model(place: Place, name: str = "tiny") -> str:
    """Tell MLflow of a trained model and return its run."""
    tracker = place.start(name)
    work = place.folder / f"work {name}"
    start_model(tracker, work)
    write_points(work, range(3))
    finish_model(tracker, work, place.folder / f"model of {name}")
    tracker.close()
    return tracker.model_run_id("pretrain")


def locations(place: Place) -> list[str]:
    """Every location of files in the database."""
    with closing(sqlite3.connect(place.folder / "mlflow.db")) as database:
        return [
            location
            for table, column in COLUMNS
            for (location,) in database.execute(f"SELECT {column} FROM {table}")
        ]


def make_absolute(place: Place) -> None:
    """Write the locations as earlier versions of this project did."""
    folder = (place.folder / "mlruns").as_uri()
    with closing(sqlite3.connect(place.folder / "mlflow.db")) as database, database:
        for table, column in COLUMNS:
            database.execute(
                f"UPDATE {table} SET {column} = ? || rtrim('/' || substr({column}, 19), '/')",
                (folder,),
            )


def listed(place: Place, run_id: str) -> set[str]:
    """The files of a run, as MLflow lists them."""
    return {file.path for file in place.client.list_artifacts(run_id)}


def copied(place: Place) -> Place:
    """A copy of an artifacts folder, as a new process sees it."""
    copy = place.folder.with_name(f"{place.folder.name}-copy")
    shutil.copytree(place.folder, copy)
    utils._artifact_repos_cache.clear()
    return Place(copy)


def moved(place: Place) -> Place:
    """An artifacts folder under another name, as a new process sees it."""
    target = place.folder.with_name(f"{place.folder.name}-moved")
    shutil.move(place.folder, target)
    utils._artifact_repos_cache.clear()
    return Place(target)


def files(folder: Path) -> dict[str, bytes]:
    """Every file in a folder."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_database_names_no_folder_of_this_machine(place: Place) -> None:
    make_model(place)
    found = locations(place)
    assert {location.partition(":/")[0] for location in found} == {"mlflow-artifacts"}
    assert any("/models/" in location for location in found), "logged models too"


@pytest.mark.parametrize("is_old", [False, True], ids=["relative", "absolute paths of before"])
def test_a_copy_shows_its_files_and_writes_into_itself(place: Place, is_old: bool) -> None:
    first = make_model(place)
    if is_old:
        make_absolute(place)
    copy = copied(place)
    before = files(place.folder)
    second = make_model(copy, "second")
    assert listed(copy, first) >= {"loss.png", "settings.json"}
    assert listed(copy, second) >= {"loss.png", "settings.json"}
    assert files(place.folder) == before, "the original is as it was"
    assert (copy.folder / "mlruns" / second / "artifacts" / "loss.png").is_file()


@pytest.mark.parametrize("is_old", [False, True], ids=["relative", "absolute paths of before"])
def test_a_moved_folder_shows_its_files(place: Place, is_old: bool) -> None:
    first = make_model(place)
    if is_old:
        make_absolute(place)
    after = moved(place)
    make_model(after, "second")
    assert listed(after, first) >= {"loss.png", "settings.json"}
    model_id = after.client.get_run(first).outputs.model_outputs[0].model_id
    files_of_model = after.client.list_logged_model_artifacts(model_id)
    assert "MLmodel" in {file.path for file in files_of_model}
    assert not place.folder.exists()


def test_a_killed_run_is_told_to_its_end_in_the_moved_folder(place: Place) -> None:
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from tests.tasks.mlflow_place import Place, start_model, write_points
place = Place(Path({str(place.folder)!r}))
tracker = place.start("first")
start_model(tracker, place.work)
write_points(place.work, range(5))
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    after = moved(place)
    after.start("second").close()
    (model,) = after.runs("models").values()
    assert (model.info.status, after.steps(model.info.run_id)) == ("KILLED", list(range(5)))
    (dataset,) = model.inputs.dataset_inputs
    assert json.loads(dataset.dataset.source) == {"uri": "work"}


def test_a_python_of_the_user_reads_the_files_without_a_server(place: Place) -> None:
    run_id = make_model(place)
    code = f"import mlflow; print(mlflow.artifacts.load_dict('runs:/{run_id}/settings.json'))"
    environment = {"PATH": os.environ["PATH"], "MLFLOW_TRACKING_URI": place.uri}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60
    )
    assert "'pretrain.num_steps': 2" in done.stdout, done.stderr


def test_files_that_are_elsewhere_stay_where_they_are(place: Place, tmp_path: Path) -> None:
    run_id = make_model(place)
    make_absolute(place)
    elsewhere = tmp_path.with_name(f"{tmp_path.name}-elsewhere") / "mlruns"
    shutil.move(place.folder / "mlruns" / run_id, elsewhere / run_id)
    with closing(sqlite3.connect(place.folder / "mlflow.db")) as database, database:
        uri = f"{elsewhere.as_uri()}/{run_id}/artifacts"
        database.execute("UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", (uri, run_id))
    assert correct_locations(place.folder) > 0
    assert correct_locations(place.folder) == 0, "once"
    assert place.client.get_run(run_id).info.artifact_uri == uri
    assert listed(place, run_id) >= {"loss.png"}


def test_locations_that_are_no_such_paths_are_left_alone(place: Place) -> None:
    make_model(place)
    wanted: dict[str, Any] = {"s3://mlruns/x": "1", "/data/runs": "2"}
    with closing(sqlite3.connect(place.folder / "mlflow.db")) as database, database:
        for location, experiment_id in wanted.items():
            update = "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?"
            database.execute(update, (location, experiment_id))
    correct_locations(place.folder)
    assert set(locations(place)) >= set(wanted)
