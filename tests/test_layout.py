"""The layout holds: who may import whom, and what importing costs."""

import ast
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
STAGES = (
    "download", "clean", "train_tokenizer", "pack", "pretrain", "finetune", "align",
    "evaluate",
)  # fmt: skip
MODULES = sorted(
    path for package in ("llm", "tasks", "flows") for path in (ROOT / package).rglob("*.py")
)


def imports(path: Path) -> set[str]:
    """Every module a file imports, at the top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
            assert node.level == 0, f"{path}: imports are absolute"
    return found


def packages(path: Path) -> set[str]:
    """The top-level packages a file imports."""
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_from_flows_to_tasks_to_llm(path: Path) -> None:
    forbidden = {
        "llm": {"tasks", "flows", "prefect", "mlflow", "pydantic", "rich"},
        "tasks": {"flows", "torch"},
        "flows": set[str](),
    }[path.relative_to(ROOT).parts[0]]
    assert not packages(path) & forbidden
    if path.parent.name == "llm" and path.stem in STAGES:
        others = {f"llm.{stage}" for stage in STAGES} - {f"llm.{path.stem}"}
        assert not imports(path) & others, "a stage never imports another stage"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_pickled(path: Path) -> None:
    assert not packages(path) & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    text = path.read_text(encoding="utf-8")
    assert "torch.load(" not in text and "torch.save(" not in text


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_re_export_nothing_and_modules_say_what_they_are(path: Path) -> None:
    tree = ast.parse(path.read_bytes())
    assert ast.get_docstring(tree), f"{path}: no docstring"
    if path.name == "__init__.py":
        assert len(tree.body) == 1, f"{path}: a package holds a docstring only"


def test_every_package_is_in_the_wheel() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"]) - {"llm.configs"}
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in MODULES
        if path.name == "__init__.py"
    }
    assert listed == found


def test_llm_dependencies_are_the_same_in_both_lists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    alone = project["dependency-groups"]["llm"]
    assert project["project"]["dependencies"][: len(alone)] == alone


@pytest.mark.parametrize("folder", ["", "flows", "tasks", "llm"])
def test_no_module_hides_a_library(folder: str) -> None:
    """A folder that comes first on sys.path, as that of a script does, hides no other's module."""
    taken = set(sys.stdlib_module_names) | set(metadata.packages_distributions())
    ours = {path.stem for path in (ROOT / folder).glob("*.py")}
    ours |= {path.parent.name for path in (ROOT / folder).glob("*/__init__.py")}
    assert ours - {"__init__"}
    assert not ours & (taken - {"llm", "tasks", "flows"})


def test_deployments_name_the_flow_as_a_module() -> None:
    """The folder of a file that is an entrypoint would come first on the flow's sys.path."""
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    assert {deployment["entrypoint"] for deployment in deployments} == {"flows.run.pipeline"}


def test_every_recipe_has_a_deployment() -> None:
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    recipes = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert {deployment["name"] for deployment in deployments} == recipes | {"stage"}


# each imported by the one function that needs it, whose error says what to install
OPTIONAL = {"backports", "datasets", "gguf", "huggingface_hub", "pyarrow", "rensa"}


def test_llm_dependencies_are_all_that_llm_imports_but_optional_libraries() -> None:
    names = {"yaml": "pyyaml"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    alone = {line.split(">")[0] for line in project["dependency-groups"]["llm"]}
    outside: set[str] = set()
    for path in MODULES:
        if path.relative_to(ROOT).parts[0] == "llm":
            outside |= packages(path) - set(sys.stdlib_module_names) - {"llm", "__future__"}
    optional = {"datasets", "huggingface_hub", "pyarrow", "backports", "gguf", "rensa"}
    assert {names.get(name, name) for name in outside} - optional <= alone


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("flows.cli", {"prefect", "mlflow", "torch", "numpy", "datasets"}),
        ("tasks.plan", {"prefect", "mlflow", "torch", "numpy", "datasets"}),
        ("tasks.preflight", {"prefect", "mlflow", "torch", "numpy", "datasets"}),
        ("tasks.cached", {"prefect", "mlflow", "torch"}),
        ("llm.download", {"prefect", "mlflow", "torch", "datasets"}),
        ("llm.clean", {"prefect", "mlflow", "torch", "datasets"}),
        ("llm.pack", {"prefect", "mlflow", "torch"}),
    ],
)
def test_importing_brings_in_nothing_heavy(module: str, unwanted: set[str]) -> None:
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not set(loaded) & unwanted


@pytest.mark.parametrize(
    "path", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_a_test_that_may_run_once_more_says_why(path: Path) -> None:
    tree = ast.parse(path.read_bytes())
    marks = [node for node in ast.walk(tree) if getattr(node, "attr", "") == "flaky"]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.func in marks]
    assert len(calls) == len(marks), "flaky(reason=...), not flaky"
    for call in calls:
        reasons = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        assert not call.args and set(reasons) == {"reason"}, "once more, and no oftener"
        assert len(reasons["reason"].split()) >= 4
