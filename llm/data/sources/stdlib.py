"""Documents of the running Python's standard library, a source that needs no network.

Three kinds: the language reference (`pydoc_data/topics.py`), a reference page per module from its
docstrings, and the modules' source without those docstrings. No text is in two documents, so that
validation text is not memorized from a duplicate in training. Modules are parsed, never imported.
"""

import ast
import hashlib
import io
import os
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm.errors import DataError

MAX_DOCUMENT_BYTES = 16_384
"""Whole documents are split into train and validation: about a thousand give a fair sample."""
MIN_DUPLICATE_BYTES = 200
"""Docstrings and definitions of at least this size appear once, however often they are repeated."""
MIN_TABLE_BYTES = 8_192
"""Module-level literals of at least this size are generated tables (HTML entities, aliases)."""

TOPICS = "pydoc_data/topics.py"
LEFT_OUT_FOLDERS = frozenset(
    ("test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled", "__pycache__")
)
KEPT_ENCODINGS = frozenset(("__init__.py", "idna.py", "punycode.py"))
"""The other modules in `encodings` are character tables and the same 20 lines around them."""

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Line = tuple[int, str]
"""(preference for a cut before this line, 2 best and 0 worst; the line with its end)"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Module:
    """One module of the library, parsed."""

    name: str
    """As imported: `json.decoder`."""
    path: str
    """Below the library's folder: `json/decoder.py`."""
    source: str
    tree: ast.Module


class SeenTexts:
    """Remembers texts by hash, to find duplicates."""

    def __init__(self, min_bytes: int) -> None:
        """Treat every text shorter than `min_bytes` as new."""
        self._min_bytes = min_bytes
        self._seen: set[bytes] = set()

    def is_new(self, text: str) -> bool:
        """Return whether `text`, stripped, occurs for the first time."""
        data = text.strip().encode()
        if len(data) < self._min_bytes:
            return True
        key = hashlib.sha256(data).digest()[:16]
        is_new = key not in self._seen
        self._seen.add(key)
        return is_new


def library_files() -> list[tuple[str, Path]]:
    """List the library's modules as (path below its folder, path), sorted.

    Raises:
        DataError: this Python comes without its library's source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: list[tuple[str, Path]] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [
            name for name in folders if name not in LEFT_OUT_FOLDERS and name[:7] != "config-"
        ]
        found += [
            (Path(folder, name).relative_to(root).as_posix(), Path(folder, name))
            for name in names
            if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    found = [
        (name, path)
        for name, path in found
        if not name.startswith("encodings/") or path.name in KEPT_ENCODINGS
    ]
    if not found:
        raise DataError(
            f"{root}: no .py files, so this Python has no standard library source; use another"
            " Python, or set download.corpus.kind to files or url"
        )
    return sorted(found)


def read_modules() -> Iterator[Module]:
    """Parse every module of the library, the reference topics left out."""
    for name, path in library_files():
        if name == TOPICS:
            continue
        with tokenize.open(path) as file:
            source = file.read()
        dotted = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library's own invalid escapes
            yield Module(name=dotted, path=name, source=source, tree=ast.parse(source))


def corpus_documents() -> Iterator[str]:
    """Yield the documents: reference topics, then each module's page and its source."""
    for name, path in library_files():
        if name == TOPICS:
            yield from topic_documents(ast.parse(path.read_bytes()))
    docstrings, sources = SeenTexts(MIN_DUPLICATE_BYTES), SeenTexts(MIN_DUPLICATE_BYTES)
    for module in read_modules():
        yield from page_documents(module, docstrings)
        yield from source_documents(module, sources)


def topic_documents(tree: ast.Module) -> Iterator[str]:
    """Yield the topics of the language reference, each paragraph in the longest topic only.

    Topics contain one another: `compound` contains `if`, `while` and `for`.
    """
    tables = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    topics: dict[str, str] = ast.literal_eval(tables[0]) if tables else {}
    seen = SeenTexts(40)  # titles and single words may repeat
    for _, text in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        paragraphs = [part for part in text.split("\n\n") if seen.is_new(part)]
        yield from cut_lines(_prose_lines("\n\n".join(paragraphs)), MAX_DOCUMENT_BYTES)


def page_documents(module: Module, seen: SeenTexts) -> Iterator[str]:
    """Yield the reference page of a module as pydoc shows it, in as few documents as fit."""
    title = f"Help on module {module.name}:\n\n"
    docstring = ast.get_docstring(module.tree)
    lines = [*_prose_lines(docstring), (0, "\n")] if docstring and seen.is_new(docstring) else []
    lines += _page_lines(module.tree.body, "", seen)
    for part in cut_lines(lines, MAX_DOCUMENT_BYTES - len(title.encode())):
        yield title + part


def source_documents(module: Module, seen: SeenTexts) -> Iterator[str]:
    """Yield a module's source without docstrings and tables, cut between its definitions."""
    title = f"# {module.path}\n"
    text = _without_docstrings(module)
    levels = [0] * len(text)
    for node in module.tree.body:
        start, end = _first_line(node, text), node.end_lineno or node.lineno
        levels[start] = 2
        source = "".join(text[start:end])
        is_definition = isinstance(node, Definition)
        if (is_definition and not seen.is_new(source)) or (
            not is_definition and len(source) >= MIN_TABLE_BYTES and _is_table(node)
        ):
            text[start:end] = [""] * (end - start)
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                levels[_first_line(member, text)] = 1
    lines = list(zip(levels, text, strict=True))
    for part in cut_lines(lines, MAX_DOCUMENT_BYTES - len(title.encode())):
        yield title + part


def cut_lines(lines: Sequence[Line], max_bytes: int) -> Iterator[str]:
    """Cut `lines` into texts of at most `max_bytes`, unless one line is longer.

    Each cut is before the last line of the highest level that fits. Blank lines at both ends are
    removed, empty texts left out.
    """
    sizes = [len(text.encode()) for _, text in lines]
    start = 0
    while start < len(lines):
        end, size_bytes = start + 1, sizes[start]
        while end < len(lines) and size_bytes + sizes[end] <= max_bytes:
            size_bytes += sizes[end]
            end += 1
        if end < len(lines):
            end = max(range(start + 1, end + 1), key=lambda index: (lines[index][0], index))
        if text := "".join(text for _, text in lines[start:end]).strip("\n"):
            yield text + "\n"
        start = end


def definitions(body: Sequence[ast.stmt]) -> Iterator[Definition]:
    """Yield the functions and classes of a body, also those under `if`, `try` and `with`."""
    for node in body:
        if isinstance(node, Definition):
            yield node
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from definitions(node.body)
            yield from definitions([] if isinstance(node, ast.With) else node.orelse)
            for handler in node.handlers if isinstance(node, ast.Try) else []:
                yield from definitions(handler.body)


def signature(node: Definition) -> str:
    """Return `def split(self, path, maxsplit=-1)` or `class Path(PurePath)` on one line."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, [*node.bases, *node.keywords]))
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    return f"{keyword} {node.name}({ast.unparse(node.args)})"


def _page_lines(body: Sequence[ast.stmt], indent: str, seen: SeenTexts) -> Iterator[Line]:
    for node in definitions(body):
        inner = (
            list(_page_lines(node.body, indent + "    ", seen))
            if isinstance(node, ast.ClassDef)
            else []
        )
        docstring = ast.get_docstring(node)
        if docstring and not seen.is_new(docstring):
            docstring = ""
        if not docstring and not inner:
            continue
        yield (1 if indent else 2), f"{indent}{signature(node)}\n"
        for level, line in _prose_lines(docstring or ""):
            yield level, f"{indent}    {line}" if line.strip() else line
        yield 0, "\n"
        yield from inner


def _prose_lines(text: str) -> list[Line]:
    lines = _split_lines(text.strip("\n"))
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += "\n"
    before = ["x", *lines]
    return [(int(not before[index].strip()), line) for index, line in enumerate(lines)]


def _split_lines(text: str) -> list[str]:
    """Split after each line feed, as Python's grammar does; `splitlines` knows ten other ends."""
    return io.StringIO(text).readlines()


def _without_docstrings(module: Module) -> list[str]:
    """Return the source's lines without docstrings; `pass` where a body had nothing else.

    Lines keep their numbers: a removed one is empty, without a line end.
    """
    lines = [line.encode() for line in _split_lines(module.source)]
    for node in ast.walk(module.tree):
        if not isinstance(node, Definition | ast.Module) or ast.get_docstring(node, False) is None:
            continue
        string = node.body[0]
        first, last = string.lineno - 1, (string.end_lineno or string.lineno) - 1
        before, after = lines[first][: string.col_offset], lines[last][string.end_col_offset :]
        is_alone = not before.strip() and not after.strip()
        is_needed = len(node.body) == 1 and not isinstance(node, ast.Module)
        lines[first : last + 1] = [b""] * (last + 1 - first)
        if is_needed or not is_alone:
            lines[first] = before + b"pass" + after
        elif last + 1 < len(lines) and not lines[last + 1].strip():
            lines[last + 1] = b""
    return [line.decode() for line in lines]


def _first_line(node: ast.stmt, lines: Sequence[str]) -> int:
    """Return the index of a statement's first line, with its decorators and comments."""
    first = node.lineno - 1
    if isinstance(node, Definition):
        first = min([first, *(decorator.lineno - 1 for decorator in node.decorator_list)])
    while first > 0 and lines[first - 1].lstrip().startswith("#"):
        first -= 1
    return first


def _is_table(node: ast.stmt) -> bool:
    if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
        return False
    try:
        ast.literal_eval(node.value)
    except ValueError:
        return False
    return True
