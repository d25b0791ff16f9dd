"""The code shown in docs/ is the code that runs."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_docs_show_the_code_as_it_is() -> None:
    done = subprocess.run(
        [sys.executable, "docs/include.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + "run `python docs/include.py`"
