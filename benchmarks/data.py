"""Measure the data stages: a row for each measure, with its target.

    python benchmarks/data.py                              # every measure, as large as its target
    python benchmarks/data.py clean --megabytes 200 --baseline ../before
    python benchmarks/data.py memory --megabytes 400 --scratch FOLDER

Text is the running Python's standard library, varied so that no document is there twice.
`--baseline` names a checkout to run the same stage in, in turn with this one.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from data_clean import measure_clean, measure_near_duplicates
from data_loader import measure_loader
from data_memory import measure_cost, measure_memory
from data_pack import measure_pack
from data_stages import Figure
from data_tokenizers import measure_encode, measure_train

MEASURES: Mapping[str, tuple[Callable[[argparse.Namespace, Path], Iterator[Figure]], int]] = {
    "clean": (measure_clean, 200),
    "near_duplicates": (measure_near_duplicates, 0),
    "train": (measure_train, 500),
    "encode": (measure_encode, 200),
    "pack": (measure_pack, 0),
    "loader": (measure_loader, 400),
    "memory": (measure_memory, 4000),
    "cost": (measure_cost, 400),
}
"""What measures, and on how many megabytes where none are asked for."""


def main() -> None:
    """Print the rows of the measures asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("measures", nargs="*", choices=[[], *MEASURES], default=[])
    parser.add_argument("--megabytes", type=int, help="default: as in the target")
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--baseline", type=Path)
    parser.add_argument("--scratch", type=Path, help="folder for what is made on the way")
    asked = parser.parse_args()
    for name in asked.measures or MEASURES:
        measure, megabytes = MEASURES[name]
        options = copy.copy(asked)
        options.megabytes = asked.megabytes or megabytes
        with tempfile.TemporaryDirectory(dir=asked.scratch) as folder:
            for figure in measure(options, Path(folder)):
                print(f"{figure.measure:<56} {figure.value:<40} {figure.target}", flush=True)


if __name__ == "__main__":
    main()
