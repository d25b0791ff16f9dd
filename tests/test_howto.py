"""The how-tos work: a copy of the packages is edited as each page says, and its commands run.

A block `new=PATH` becomes a file, a block `diff file=PATH` is applied, other `python` and `sh`
blocks run in the copy, and a `text` block lists lines that the block before it prints. A section
with a line `Files touched: N` has blocks for exactly N files.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "howto").glob("*.md"))
BLOCK = re.compile(
    r"^```(?P<language>\w+)(?: (?P<key>\w+)=(?P<value>\S+))?\n(?P<body>.*?)^```$", re.M | re.S
)
COPIED = ("llm", "tasks", "flows", "configs")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    language: str
    key: str | None
    value: str | None
    body: str


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a page in order."""
    return [Block(**match.groupdict()) for match in BLOCK.finditer(text)]


def apply_diff(path: Path, diff: str) -> None:
    """Apply hunks separated by `@@`; the old lines of each must occur exactly once in the file."""
    text = path.read_text(encoding="utf-8")
    for hunk in re.split(r"^@@.*\n", diff, flags=re.M):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        if lines:
            assert text.count(old) == 1, f"{path}: {text.count(old)} times, expected once:\n{old}"
            text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")


def run(block: Block, copy: Path) -> str:
    """Run one block in the copy and return what it printed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_"))}
    environment |= {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    if block.language == "sh":
        body = block.body.replace("fromscratch ", f"{sys.executable} -m flows.cli ")
        command = ["sh", "-e", "-c", body]
    else:
        command = [sys.executable, "-c", block.body]
    done = subprocess.run(
        command, cwd=copy, env=environment, capture_output=True, text=True, timeout=240
    )
    expected = int(block.value or 0) if block.key == "exit" else 0
    assert done.returncode == expected, (
        f"{block.body}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_works(page: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / "prefect.yaml", tmp_path)
    for name in COPIED:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    printed = ""
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.key == "new" and block.value:
            path = tmp_path / block.value
            assert not path.exists(), f"{path} exists"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.body, encoding="utf-8")
        elif block.key == "file" and block.value:
            assert block.language == "diff"
            apply_diff(tmp_path / block.value, block.body)
        elif block.language == "text":
            for line in block.body.splitlines():
                assert " ".join(line.split()) in " ".join(printed.split()), printed
        else:
            assert block.language in ("python", "sh"), block
            printed = run(block, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_section_counts_its_files(page: Path) -> None:
    num_sections = 0
    for section in re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.M):
        files = {block.value for block in blocks(section) if block.key in ("new", "file")}
        stated = re.search(r"^Files touched: (\d+)", section, re.M)
        assert bool(files) == bool(stated), section.splitlines()[0]
        if stated:
            num_sections += 1
            assert len(files) == int(stated[1]), sorted(map(str, files))
    assert num_sections
