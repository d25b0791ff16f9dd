"""Code digests: a hash of a stage's code, blind to comments, docstrings and layout.

Covered are the stage's module and the project modules it imports, transitively, also inside
functions. Never covered are packages that decide no bytes of an artifact, and modules that only
they import; `llm.config` and `llm.settings`, whose values are in the cache key themselves;
`llm.consistency`, which only refuses settings; and `llm.errors`, whose messages are for people.
"""

import ast
import hashlib
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from llm.artifact import DIGEST_HEX_CHARACTERS

PACKAGE_FOLDER = Path(__file__).parents[1]
NOT_COVERED = frozenset({"llm.config", "llm.consistency", "llm.errors", "llm.settings"})
NOT_COVERED_PACKAGES = frozenset({"llm.runtime", "llm.monitoring"})

# CPython 3.11 counts the depth of `ast.parse` once for all threads, and raises a SystemError when
# two threads parse; Prefect tasks submitted together ask for their digests together
_parsing = threading.Lock()


@cache
def code_digests(stage: str) -> dict[str, str]:
    """Return `{"llm.pack": digest, "llm.data.packed": digest, ...}` for a stage's modules."""
    # cached, since results belong to the code that the run began with, whatever is edited meanwhile
    found: dict[str, str] = {}
    waiting = [f"llm.{stage}"]
    while waiting:
        module = waiting.pop()
        if module in found or not is_covered(module):
            continue
        path = module_path(module)
        if path is None:
            continue
        found[module], imports = _digest_and_imports(path.read_bytes())
        waiting += imports
    return dict(sorted(found.items()))


def is_covered(module: str) -> bool:
    """Tell whether a project module is part of code digests."""
    package = ".".join(module.split(".")[:2])
    return module not in NOT_COVERED and package not in NOT_COVERED_PACKAGES


def module_path(module: str) -> Path | None:
    """Return the source file of a project module; None for other names, such as a class."""
    stem = PACKAGE_FOLDER.joinpath(*module.split(".")[1:])
    for path in (stem.with_suffix(".py"), stem / "__init__.py"):
        if path.is_file() and module.split(".")[0] == "llm":
            return path
    return None


def imported_modules(module: str) -> tuple[str, ...]:
    """Return the names that a project module imports from this project."""
    path = module_path(module)
    return () if path is None else _digest_and_imports(path.read_bytes())[1]


def normalized_source(source: bytes) -> str:
    """Return the code as `ast.unparse` writes it: no comments, docstrings or layout."""
    tree = _parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            strings = [statement for statement in node.body if _is_string(statement)]
            node.body = [statement for statement in node.body if statement not in strings] or [
                ast.Pass()
            ]
    return ast.unparse(tree)


@cache
def _digest_and_imports(source: bytes) -> tuple[str, tuple[str, ...]]:
    text = normalized_source(source)
    digest = hashlib.sha256(text.encode()).hexdigest()[:DIGEST_HEX_CHARACTERS]
    return digest, tuple(_imports(_parse(text.encode())))


def _parse(source: bytes) -> ast.Module:
    with _parsing:
        return ast.parse(source)


def _imports(tree: ast.Module) -> Iterator[str]:
    """Yield every project module named by an import statement anywhere in `tree`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "llm")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "llm":
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _is_string(statement: ast.stmt) -> bool:
    # a docstring or the text under a field: does nothing
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
