"""The code digest follows what code does: not its comments, docstrings or layout."""

import ast
import gc
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from llm.runtime import code
from llm.runtime.code import (
    NOT_COVERED,
    NOT_COVERED_PACKAGES,
    PACKAGE_FOLDER,
    code_digests,
    imported_modules,
    is_covered,
    normalized_source,
)

SOURCE = b'''"""Module."""
import math
# a comment
def area(radius: float) -> float:
    """Docstring."""
    return math.pi * radius ** 2  # another
'''


@pytest.mark.parametrize(
    "edited",
    [
        SOURCE.replace(b"# a comment\n", b"\n\n# other words\n"),
        SOURCE.replace(b"Docstring.", b"Other words."),
        SOURCE.replace(b'    """Docstring."""\n', b""),
        SOURCE.replace(b"  # another", b""),
        SOURCE.replace(b"math.pi * radius ** 2", b"(math.pi\n        * radius**2)"),
    ],
)
def test_comments_docstrings_and_layout_do_not_count(edited: bytes) -> None:
    assert edited != SOURCE
    assert normalized_source(edited) == normalized_source(SOURCE)


@pytest.mark.parametrize(
    "edited",
    [SOURCE.replace(b"** 2", b"** 3"), SOURCE.replace(b"area", b"surface"), SOURCE + b"x = 1\n"],
)
def test_anything_that_runs_counts(edited: bytes) -> None:
    assert normalized_source(edited) != normalized_source(SOURCE)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small package in llm's place."""
    monkeypatch.setattr(code, "PACKAGE_FOLDER", tmp_path)
    files = {
        "__init__.py": '"""Package."""',
        "pack.py": "from llm.data import packed\nimport llm.errors\nimport llm.runtime.job\n",
        "data/__init__.py": '"""Room."""',
        "data/packed.py": "def read():\n    from llm.data.deep import X\n    return X\n",
        "data/deep.py": "import numpy\nfrom llm.data import packed\nX = 1\n",
        "data/other.py": "Y = 1\n",
        "errors.py": "E = 1\n",
        "runtime/__init__.py": '"""Package."""',
        "runtime/job.py": "J = 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    code_digests.cache_clear()
    yield tmp_path
    code_digests.cache_clear()


def _digests_of_pack() -> dict[str, str]:
    code_digests.cache_clear()
    return code_digests("pack")


def test_digest_covers_imports_in_functions_and_in_circles(package: Path) -> None:
    assert set(_digests_of_pack()) == {
        "llm.data", "llm.pack", "llm.data.packed", "llm.data.deep",
    }  # fmt: skip


def test_editing_a_deep_helper_changes_exactly_its_digest(package: Path) -> None:
    before = _digests_of_pack()
    (package / "data/deep.py").write_text("import numpy\nfrom llm.data import packed\nX = 2\n")
    after = _digests_of_pack()
    assert {name for name in before if before[name] != after[name]} == {"llm.data.deep"}


@pytest.mark.parametrize("module", ["data/other.py", "errors.py", "runtime/job.py"])
def test_editing_what_a_stage_does_not_use_changes_nothing(package: Path, module: str) -> None:
    before = _digests_of_pack()
    (package / module).write_text("Z = 3\n")
    assert _digests_of_pack() == before


def test_digests_are_taken_once_in_a_process(package: Path) -> None:
    before = code_digests("pack")
    (package / "pack.py").write_text("changed = True\n")
    assert code_digests("pack") is before


def test_tasks_that_start_together_may_ask_for_their_digests_together() -> None:
    """CPython 3.11 counts the depth of its parser once for all threads."""
    expected = code_digests("download")
    code_digests.cache_clear()
    code._digest_and_imports.cache_clear()
    threshold = gc.get_threshold()

    def let_others_run(phase: str, info: dict[str, int]) -> None:
        time.sleep(0)

    gc.callbacks.append(let_others_run)  # a collection in the middle of parsing
    gc.set_threshold(50)
    try:
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(code_digests, ["download"] * 4))
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(let_others_run)
    assert found == [expected] * 4


COVERED = Path(__file__).with_name("covered_modules.yaml")
STAGES = sorted(yaml.safe_load(COVERED.read_text()))


@pytest.mark.parametrize("stage", STAGES)
def test_the_modules_whose_change_rebuilds_a_stage_are_those_listed(stage: str) -> None:
    listed = yaml.safe_load(COVERED.read_text())[stage]
    assert sorted(code_digests(stage)) == listed


@pytest.mark.parametrize("stage", STAGES)
def test_no_module_that_could_decide_bytes_is_reached_through_the_wall_alone(stage: str) -> None:
    reached: set[str] = set()
    waiting = [f"llm.{stage}"]
    while waiting:
        module = waiting.pop()
        if (
            module in reached | NOT_COVERED
        ):  # config's values are in the key, whatever computed them
            continue
        if code.module_path(module) is not None:
            reached.add(module)
            waiting += imported_modules(module)
    assert {module for module in reached if is_covered(module)} == set(code_digests(stage))


def test_an_entry_in_the_table_of_peaks_retrains_nothing() -> None:
    assert "llm.monitoring.throughput" in imported_modules("llm.training.run")
    for stage in STAGES:
        assert not any(re.match(r"llm\.(runtime|monitoring)", m) for m in code_digests(stage))


def test_modules_out_of_the_digest_are_really_there() -> None:
    for name in NOT_COVERED:
        assert (PACKAGE_FOLDER / f"{name.split('.')[1]}.py").is_file()
    for name in NOT_COVERED_PACKAGES:
        assert (PACKAGE_FOLDER / name.split(".")[1] / "__init__.py").is_file()


def test_sections_hold_plain_fields_so_config_may_stay_out_of_the_digest() -> None:
    tree = ast.parse((PACKAGE_FOLDER / "config.py").read_bytes())
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
            kinds = {type(statement) for statement in node.body}
            assert kinds <= {ast.AnnAssign, ast.Expr, ast.Pass}, node.name
