"""Every command of the README works, on a tiny corpus in an empty folder."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
MAKE = re.compile(r"^make\b")


def commands() -> list[str]:
    """Return every command in a block marked `sh`, in order."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def small(command: str, sources: Path) -> str:
    """Return the command on the same recipe with a tiny corpus, model and number of steps."""
    command = command.replace(".venv/bin/", "")
    if command.startswith("prefect deployment run"):
        overrides = [*tiny.SETTINGS, *tiny.write_sources(sources), "seed=2"]
        return f"{command} --watch --params {shlex.quote(json.dumps({'overrides': overrides}))}"
    if not command.startswith("fromscratch run"):
        return command
    given = {word.split("=")[0] for word in command.split() if "=" in word}
    settings = [*tiny.SETTINGS, *tiny.write_sources(sources)]
    kept = [setting for setting in settings if setting.split("=")[0] not in given]
    return " ".join([command, *kept])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder like a fresh clone; services that the commands start are stopped."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("configs", "prefect.yaml", "README.md", "flows", "tasks", "llm"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "sources").mkdir()
    run("fromscratch run quickstart", folder)
    yield folder
    run("fromscratch down --force", folder)
    shutil.rmtree(folder, ignore_errors=True)


def run(command: str, folder: Path) -> str:
    """Run one command in `folder` and return its output."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
    environment |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONWARNINGS": "default"}
    if command.startswith("prefect"):
        environment["PREFECT_API_URL"] = prefect_api(folder)
    done = subprocess.run(
        ["sh", "-c", small(command, folder / "sources")],
        cwd=folder,
        env=environment,
        input="What is the name of the function `def f(x)`?\n",
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def prefect_api(folder: Path) -> str:
    """Return the API address that `fromscratch up` prints, which may differ from the README's."""
    found = re.search(r"http://127\.0\.0\.1:\d+", run("fromscratch up", folder))
    assert found is not None
    return f"{found[0]}/api"


def test_readme_has_its_commands() -> None:
    found = commands()
    assert found[:2] == ["make run", "make test"]
    assert any(command.startswith("fromscratch run") for command in found)


@pytest.mark.parametrize("command", [c for c in commands() if MAKE.match(c)])
def test_make_target_is_there(command: str) -> None:
    done = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in dict.fromkeys(commands()) if not MAKE.match(c)])
def test_command_works(command: str, folder: Path) -> None:
    printed = run(command, folder)
    if "--plan" in command:
        assert "to build" in printed
    if command.startswith("prefect deployment run"):
        assert "Completed" in printed
    if "--json" in command:
        assert '"mlflow_run_id"' in printed
