"""Include code of the project in docs/*.md.

A block ```python file=llm/model/loss.py symbol=token_losses holds that function or class without
its docstring. `python docs/include.py` updates all blocks; with `--check` it exits with 1 if one is
outdated.
"""

import ast
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(
    r"^```python file=(?P<file>\S+) symbol=(?P<symbol>\S+)\n(?P<code>.*?)^```$", re.M | re.S
)


def source_of(file: Path, symbol: str) -> str:
    """Return the source of a function, class or `Class.method`, without its docstring."""
    if not file.is_file():
        raise SystemExit(f"{file}: does not exist")
    text = file.read_text(encoding="utf-8")
    body: list[ast.stmt] = ast.parse(text).body
    node: ast.stmt | None = None
    for name in symbol.split("."):
        node = next((each for each in body if getattr(each, "name", None) == name), None)
        if node is None:
            raise SystemExit(f"{file}: has no {symbol}")
        body = getattr(node, "body", [])
    assert node is not None
    lines = text.splitlines()
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    wanted = lines[first - 1 : node.end_lineno]
    if ast.get_docstring(node, clean=False) is not None:  # type: ignore[arg-type]
        docstring = body[0]
        del wanted[docstring.lineno - first : (docstring.end_lineno or 0) - first + 1]
    return textwrap.dedent("\n".join(wanted)) + "\n"


def updated(text: str) -> str:
    """Return a page with every included block taken from the source."""

    def block(match: re.Match[str]) -> str:
        code = source_of(ROOT / match["file"], match["symbol"])
        return f"```python file={match['file']} symbol={match['symbol']}\n{code}```"

    return BLOCK.sub(block, text)


def main() -> int:
    """Update or check every page."""
    stale = [
        page
        for page in sorted((ROOT / "docs").rglob("*.md"))
        if updated(page.read_text()) != page.read_text()
    ]
    for page in stale:
        print(f"{page.relative_to(ROOT)}: shows outdated code")
        if "--check" not in sys.argv:
            page.write_text(updated(page.read_text()))
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
