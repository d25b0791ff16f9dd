"""The documentation matches the code: included code, links, file names, packages, entries."""

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))
LOG = ROOT / "docs" / "log.md"
BLOCK = re.compile(r"^```.*?^```$", re.M | re.S)
LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)(?:#[^)]*)?\)")
FILE = re.compile(r"`((?:llm|tasks|flows|tests|benchmarks|configs|docs)/[\w./-]+\.\w+)`")


def page_name(page: Path) -> str:
    """Return the name of a page for the list of tests."""
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """Return a page without its code."""
    return re.sub(r"^    .*$", "", BLOCK.sub("", page.read_text(encoding="utf-8")), flags=re.M)


def test_docs_show_the_code_as_it_is() -> None:
    done = subprocess.run(
        [sys.executable, "docs/include.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + "run `python docs/include.py`"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_to_files(page: Path) -> None:
    missing = [
        link
        for link in LINK.findall(re.sub(r"`[^`]*`", "", prose(page)))
        if not (page.parent / link).exists()
    ]
    assert not missing


@pytest.mark.parametrize("page", [page for page in PAGES if page != LOG], ids=page_name)
def test_files_named_exist(page: Path) -> None:
    """The log may name files that are gone; a how-to may name new files."""
    text = prose(page)
    if page.parent.name == "howto":
        text = re.sub(r"^.*\(new\).*", "", text, flags=re.M)
    missing = [name for name in FILE.findall(text) if not (ROOT / name).exists()]
    assert not missing


def test_readme_lists_every_package() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text.partition("## What is where")[2].partition("\n## ")[0]
    packages = [
        folder.parent.relative_to(ROOT)
        for name in ("llm", "tasks", "flows")
        for folder in (ROOT / name).rglob("__init__.py")
    ]
    assert len(packages) > 10
    assert not [path for path in packages if f" {path.name}/ " not in tree]


@pytest.mark.parametrize("page", DECISIONS, ids=lambda page: page.stem)
def test_every_decision_has_a_number_and_a_status(page: Path) -> None:
    title, _, status, *_ = page.read_text(encoding="utf-8").splitlines()
    assert title.startswith(f"# {int(page.stem[:4])}. ")
    assert re.match(r"Status: (accepted, \d{4}-\d\d-\d\d|superseded by \[)", status)


def test_every_log_entry_has_a_verdict_and_a_date_newest_first() -> None:
    entries = LOG.read_text(encoding="utf-8").split("\n## ")[1:]
    dates: list[str] = []
    for entry in entries:
        title, _, date, *_ = entry.splitlines()
        assert len(title.split()) >= 5, title
        found = re.findall(r"\d{4}-\d\d-\d\d", date)
        assert found, title
        dates.append(found[-1])
    assert all(newer >= older for newer, older in pairwise(dates))
