"""Requirements are checked before the first stage, and all problems are reported at once."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from flows.cli import main
from flows.pipeline import language_model
from llm.recipes import load_config
from tasks import preflight
from tasks.plan import Selection, make_plan
from tasks.preflight import find_problems
from tasks.stages import in_order
from tasks.store import ArtifactStore
from tests import tiny

RECIPE = str(Path(__file__).with_name("defaults.yaml"))


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    """A tiny run of which nothing is built."""
    return [
        *tiny.SETTINGS,
        *tiny.write_sources(tmp_path),
        f"runtime.artifacts_dir={tmp_path / 'artifacts'}",
    ]


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without any library that is not always there, and without a GPU."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    preflight._ask_torch.cache_clear()


def problems(overrides: list[str]) -> list[str]:
    """Plan a run and look for what keeps it from being built."""
    config = load_config(RECIPE, overrides)
    store = ArtifactStore(Path(config.runtime.artifacts_dir))
    plan = make_plan(in_order(language_model(config)), config, store, Selection())
    return find_problems(plan, config, store)


def test_all_that_is_missing_is_said_at_once_by_setting_and_nothing_is_built(
    bare: None, settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "corpus.txt").rename(tmp_path / "corpus.txt.zst")
    overrides = [
        *settings,
        f"download.corpus.path={tmp_path / 'corpus.txt.zst'}",
        f"runtime.artifacts_dir={tmp_path / 'file' / 'artifacts'}",
        "clean.near_duplicates.unit=document",
        "train_tokenizer.kind=sentencepiece",
        "runtime.shard_runner=dask",
        "runtime.device=cuda",
    ]
    before = set(tmp_path.rglob("*"))
    assert main(["run", RECIPE, *overrides]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("error: 6 problem(s) on this machine")
    for setting, remedy in (
        ("runtime.artifacts_dir", "is a file"),
        ("clean.near_duplicates.unit", "pip install rensa"),
        ("train_tokenizer.kind", "fromscratch[sentencepiece]"),
        ("runtime.shard_runner", "fromscratch[dask]"),
        ("download.corpus.path", "pip install backports.zstd"),
        ("runtime.device", "use cpu or auto"),
    ):
        (line,) = [line for line in said if line.strip().startswith(f"{setting}:")]
        assert remedy in line
    assert set(tmp_path.rglob("*")) == before


def test_plan_is_shown_with_what_keeps_it_from_being_done(
    bare: None, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", RECIPE, *settings, "runtime.shard_runner=ray", "--plan"]) == 2
    shown = capsys.readouterr()
    assert "10 of 10 to build" in shown.out
    assert "runtime.shard_runner: found ray" in shown.err


@pytest.mark.parametrize("place", ["/proc/artifacts", "/sys/artifacts"])
def test_folder_that_cannot_be_written_is_named_by_its_own_setting(
    place: str, settings: list[str]
) -> None:
    """Where not even root may make a folder."""
    if not Path(place).parent.is_dir():
        pytest.skip(f"no {place}")
    (found,) = problems([*settings, f"runtime.artifacts_dir={place}"])
    assert found.startswith("runtime.artifacts_dir: ") and "cannot be written" in found


@pytest.mark.parametrize(
    ("override", "setting"),
    [
        ("download.chats.kind=hub", "download.chats.kind"),
        ("download.corpus.path=FOLDER/x.parquet", "download.corpus.path"),
        ("download.corpus.path=FOLDER/*.jsonl.zst", "download.corpus.path"),
    ],
)
def test_libraries_that_read_a_source_are_looked_for(
    override: str, setting: str, bare: None, settings: list[str], tmp_path: Path
) -> None:
    for name in ("x.parquet", "y.jsonl.zst"):
        (tmp_path / name).write_bytes(b"x")
    commit = "download.chats.hub_revision=" + "a" * 40
    override = override.replace("FOLDER", str(tmp_path))
    found = problems([*settings, override, commit, "download.chats.hub_name=a/b"])
    assert found and all(line.startswith(f"{setting}: found") for line in found)


def test_nothing_is_needed_of_what_is_cached(
    bare: None, settings: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    overrides = tiny.write_sources(tmp_path / "one")
    tiny.build(tmp_path / "artifacts", overrides, "clean corpus")
    config = load_config(
        RECIPE,
        [*settings, *overrides, "clean.near_duplicates.unit=none", "runtime.shard_runner=dask"],
    )
    store = ArtifactStore(Path(config.runtime.artifacts_dir))
    plan = make_plan(in_order(language_model(config)), config, store, Selection())
    cached = [item for item in plan if item.status == "cached"]
    assert cached and not find_problems(cached, config, store)
    assert find_problems(plan, config, store)


def test_torch_is_asked_only_where_gpus_are_asked_for(
    settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(runtime: str) -> list[str]:
        return ["asked"]

    monkeypatch.setattr(preflight, "_ask_torch", ask)
    monkeypatch.setattr(preflight, "GPU_DRIVERS", ())
    assert problems([*settings, "runtime.num_processes=2"]) == []
    assert problems([*settings, "runtime.device=cuda"]) == ["asked"]
    monkeypatch.setattr(preflight, "GPU_DRIVERS", (Path("/dev/null"),))
    assert problems([*settings, "runtime.num_processes=2"]) == ["asked"]
    assert problems([*settings, "runtime.num_processes=2", "runtime.device=cpu"]) == []


def test_command_that_is_refused_imports_neither_torch_nor_prefect(settings: list[str]) -> None:
    code = (
        "import sys\nfrom flows.cli import main\n"
        "print(main(sys.argv[1:]), *{name.split('.')[0] for name in sys.modules})\n"
    )
    command = ["run", RECIPE, *settings, "runtime.artifacts_dir=/proc/artifacts"]
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, check=True
    )
    answer, *loaded = done.stdout.split()
    assert answer == "2"
    assert not set(loaded) & {"torch", "prefect", "mlflow"}
