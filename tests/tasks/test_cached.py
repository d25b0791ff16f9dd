"""Steps are built once, cached, resumed after a kill, and built by one of two runs."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llm.artifact import read_manifest
from llm.errors import DataError, Interrupted
from tasks.cached import log_cached_run
from tasks.store import ArtifactStore
from tasks.tracking.journal import StageFinished
from tests import tiny
from tests.tasks.tracked_folder import TrackedFolder, finish_model, start_model, write_points


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings that name a tiny corpus and tiny chats."""
    return tiny.write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def built(
    tmp_path_factory: pytest.TempPathFactory, sources: list[str]
) -> tuple[Path, dict[str, tiny.Outcome]]:
    """The whole tiny pipeline, built once."""
    artifacts = tmp_path_factory.mktemp("artifacts")
    return artifacts, dict(tiny.build(artifacts, sources))


def test_every_stage_is_built_and_leaves_a_whole_artifact(
    built: tuple[Path, dict[str, tiny.Outcome]],
) -> None:
    artifacts, outcomes = built
    assert len(outcomes) == 10
    for outcome in outcomes.values():
        assert outcome.status == "built" and outcome.seconds > 0
        manifest = read_manifest(Path(outcome.path))
        assert manifest.digest == outcome.digest
        assert Path(outcome.path) == artifacts / outcome.stage / outcome.digest
        assert manifest.settings and manifest.code and manifest.provenance
    assert not list((artifacts / "staging").iterdir())


def test_second_run_builds_nothing(
    built: tuple[Path, dict[str, tiny.Outcome]], sources: list[str]
) -> None:
    artifacts, outcomes = built
    again = tiny.build(artifacts, sources)
    assert {outcome.status for outcome in again.values()} == {"cached"}
    assert [o.digest for o in again.values()] == [o.digest for o in outcomes.values()]


def test_first_hit_after_a_build_hashes_nothing(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards share files with the artifact: to remove such a link changes the file's time."""
    shards = [*sources, "clean.shard_bytes=3000", "pack.shard_bytes=3000"]
    tiny.build(tmp_path, shards, "pack corpus")
    assert len(list(tmp_path.glob("pack/*/train/*"))) > 1
    monkeypatch.setattr("tasks.store.file_sha256", lambda path: pytest.fail(f"{path} is hashed"))
    again = tiny.build(tmp_path, shards, "pack corpus")
    assert {outcome.status for outcome in again.values()} == {"cached"}


@pytest.mark.slow
def test_another_folder_gives_the_same_digests(
    built: tuple[Path, dict[str, tiny.Outcome]], sources: list[str], tmp_path: Path
) -> None:
    _, outcomes = built
    again = tiny.build(tmp_path, [*sources, "runtime.log_every_steps=5"])
    assert {n: o.digest for n, o in again.items()} == {n: o.digest for n, o in outcomes.items()}


def test_deleted_input_is_rebuilt_with_the_same_bytes_and_reruns_nothing_after_it(
    sources: list[str], tmp_path: Path
) -> None:
    first = tiny.build(tmp_path, sources, "pack corpus")
    Path(first["train_tokenizer"].path).rename(tmp_path / "gone")
    again = tiny.build(tmp_path, sources, "pack corpus")
    assert again["train_tokenizer"].status == "built"
    assert "deleted" in again["train_tokenizer"].reason
    assert again["pack corpus"].status == "cached"


def test_finished_child_of_a_killed_parent_is_published_without_another_run(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ArtifactStore, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            tiny.build(tmp_path, sources, "download corpus")
    monkeypatch.setattr("tasks.cached.launch", killed)
    assert tiny.build(tmp_path, sources, "download corpus")["download corpus"].status == "built"


def test_two_runs_at_once_build_once(sources: list[str], tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom tests import tiny\n"
        "outcomes = tiny.build(Path(sys.argv[1]), sys.argv[2:], 'clean corpus')\n"
        "print(outcomes['clean corpus'].status)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path), *sources]
    root = Path(__file__).parents[2]
    runs = [
        subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    statuses = sorted(run.communicate(timeout=60)[0].strip() for run in runs)
    assert statuses == ["built", "cached"]


def test_bad_data_is_logged_as_a_failed_stage_and_nothing_is_published(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("")
    (tmp_path / "chats.jsonl").write_text("")
    overrides = [
        f"download.corpus.path={tmp_path / 'corpus.txt'}",
        f"download.chats.path={tmp_path / 'chats.jsonl'}",
    ]
    tracker = tiny.SilentTracker()
    with pytest.raises(DataError):
        tiny.build(tmp_path / "artifacts", overrides, "clean corpus", tracker=tracker)
    finished = [event for event in tracker.events if isinstance(event, StageFinished)]
    assert finished[-1].status == "FAILED"
    assert not list((tmp_path / "artifacts").glob("clean/*"))


def test_wholly_cached_member_of_a_sweep_is_logged_and_tagged(tracked: TrackedFolder) -> None:
    first = tracked.start("alone")
    start_model(first, tracked.work)
    write_points(tracked.work, range(3))
    digest = finish_model(first, tracked.work, tracked.path / "base")
    first.close()
    outcome = tiny.Outcome(
        stage="pretrain", role="", key="k", digest=digest, status="cached", reason="", seconds=0.0,
        path="",
    )  # fmt: skip
    store = ArtifactStore(tracked.path)
    log_cached_run(tracked.config, store, [outcome], "1 seed=1 tiny", {"sweep": "seeds"})
    member = tracked.runs("pipelines")["1 seed=1 tiny"]
    tagged = [member, tracked.runs("models")["base 3.2M alone"]]
    assert [run.data.tags["fromscratch.sweep"] for run in tagged] == ["seeds", "seeds"]
    assert member.data.tags["cached/pretrain"].startswith(digest)
    assert member.info.status == "FINISHED"


@pytest.mark.slow
def test_stopped_run_goes_on_from_its_checkpoint_with_the_same_digest(
    sources: list[str], tmp_path: Path
) -> None:
    stop = threading.Event()

    class StopAtStep(tiny.SilentDisplay):
        def progressed(self, name: str, progress: tiny.Progress) -> None:
            if name == "pretrain" and progress.done >= 1:
                stop.set()

    long = [*sources, "pretrain.num_steps=400", "runtime.checkpoint_every_steps=1000"]
    stopped, undisturbed = tmp_path / "stopped", tmp_path / "undisturbed"
    with pytest.raises(Interrupted):
        tiny.build(stopped, long, "pretrain", display=StopAtStep(), should_stop=stop.is_set)
    assert list((stopped / "staging").glob("pretrain-*/work/checkpoints/*"))
    found = tiny.build(stopped, long, "pretrain")["pretrain"]
    assert found.digest == tiny.build(undisturbed, long, "pretrain")["pretrain"].digest
