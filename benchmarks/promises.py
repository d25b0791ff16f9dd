"""Print the figures of the promises: how often each held of how many times it was tried.

    python -m benchmarks.promises            # all, about eight minutes on one core
    python -m benchmarks.promises 2 7        # some

2 is of kills inside the save of a checkpoint, 7 of numbers that are not finite on one of two ranks,
13 to 19 of hostile data. Kills of whole runs are benchmarks/kills.py's.

The cases are those of tests/chaos, which tries fewer of the random ones. Exits with 1 when a
promise is broken, and says which cases broke it.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.chaos.archives import ARCHIVE_CASES
from tests.chaos.checkpoint_saves import WIDTHS, full_disks, points, random_kills, torn_writes
from tests.chaos.counting import Case, Figure, try_all
from tests.chaos.downloads import DOWNLOAD_CASES
from tests.chaos.nasty_text import LONG_LINES, RANDOM_FILES, long_line, try_hub
from tests.chaos.no_code import try_to_run_code
from tests.chaos.poisoned_rank import POISONS, try_poisons
from tests.chaos.small_data import SMALL_DATA_CASES
from tests.chaos.tokenizer_promises import (
    TOKENIZERS,
    TRAININGS,
    try_control_tokens,
    try_round_trips,
    try_trainings,
)

SAVE_KILLS = 80
RANDOM_FILES_OF_A_KIND = 40
CONTROL_TRIES = 100_000
ROUND_TRIPS = 1_000_000
THREADS = (1, 2) * 5
SHOWN_FAILURES = 5


def checkpoint_saves(folder: Path) -> list[Figure]:
    """Kills at every failpoint of a save, then torn writes and full disks."""
    cases = random_kills(folder / "points", SAVE_KILLS, 1)
    found = points(folder / "wide", WIDTHS[-1])
    return [
        try_all("kills inside a save", cases, folder / "kills"),
        try_all("torn writes", torn_writes(found), folder / "torn"),
        try_all("full disks", full_disks(found), folder / "full"),
    ]


def poisoned_ranks(folder: Path) -> list[Figure]:
    """Loss or gradient not finite on one rank."""
    return [try_poisons(POISONS, folder)]


def downloads(folder: Path) -> list[Figure]:
    """Hostile servers."""
    return [try_all("downloads", DOWNLOAD_CASES, folder)]


def nasty_text(folder: Path) -> list[Figure]:
    """Random files of each kind, then lines of a gibibyte."""
    cases: dict[str, Case] = {
        f"{name} {seed}": lambda at, check=check, seed=seed: check(at, random.Random(seed))
        for name, check in RANDOM_FILES.items()
        for seed in range(RANDOM_FILES_OF_A_KIND)
    }
    for is_streamed in (False, True):
        cases[f"the hub, streamed {is_streamed}"] = lambda at, is_streamed=is_streamed: try_hub(
            at, random.Random(1), is_streamed=is_streamed
        )
    files = try_all("nasty files", cases, folder / "files")
    peaks: list[float] = []
    lines = Figure(name="lines of 1 GiB")
    for number, (name, content) in enumerate(LONG_LINES):
        place = folder / str(number)
        lines.count(
            f"{name} of {content}",
            lambda place=place, name=name, content=content: peaks.append(
                long_line(place, name, content)
            ),
        )
    lines.note = f"at most {max(peaks, default=0):.0f} MiB a process"
    return [files, lines]


def small_data(folder: Path) -> list[Figure]:
    """Too little or too long."""
    return [try_all("empty, tiny, over-long", SMALL_DATA_CASES, folder)]


def control_tokens(folder: Path) -> list[Figure]:
    """Every kind of tokenizer, as made, loaded and exported."""
    total = Figure(name="texts and chats", note=f"{len(TOKENIZERS)} kinds, made, loaded, exported")
    each = -(-CONTROL_TRIES // len(TOKENIZERS))
    for number, (kind, make) in enumerate(TOKENIZERS.items()):
        _add(total, kind, try_control_tokens(make, each, number, _new(folder / str(number))))
    return [total]


def round_trips(folder: Path) -> list[Figure]:
    """Every kind of tokenizer; then trainings in processes of their own."""
    total = Figure(name="round trips", note=f"{len(TOKENIZERS)} kinds")
    each = -(-ROUND_TRIPS // len(TOKENIZERS))
    for number, (kind, make) in enumerate(TOKENIZERS.items()):
        _add(total, kind, try_round_trips(make, each, number, _new(folder / str(number))))
    trainings = try_trainings(list(TRAININGS), THREADS, _new(folder / "trainings"))
    trainings.name = "trainings with one digest"
    trainings.note = f"{len(TRAININGS)} kinds, {len(THREADS)} times each, 1 and 2 threads"
    return [total, trainings]


def no_code(folder: Path) -> list[Figure]:
    """Hostile files under an audit hook."""
    return [try_to_run_code(folder, "all")]


def archives(folder: Path) -> list[Figure]:
    """Archives, addresses and links."""
    return [try_all("archives and paths", ARCHIVE_CASES, folder)]


PROMISES: dict[int, Callable[[Path], list[Figure]]] = {
    2: checkpoint_saves,
    7: poisoned_ranks,
    13: downloads,
    14: nasty_text,
    15: small_data,
    16: control_tokens,
    17: round_trips,
    18: no_code,
    19: archives,
}


def _add(total: Figure, kind: str, part: Figure) -> None:
    total.num_tried += part.num_tried
    total.failures += [f"{kind}: {failure}" for failure in part.failures]


def _new(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def main() -> int:
    """Print a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("numbers", nargs="*", type=int, metavar="2 ... 19")
    numbers: list[int] = parser.parse_args().numbers or list(PROMISES)
    if unknown := set(numbers) - PROMISES.keys():
        parser.error(f"no promise {min(unknown)}; there are {', '.join(map(str, PROMISES))}")
    is_broken = False
    for number in numbers:
        started_at = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            figures = PROMISES[number](Path(folder))
        for figure in figures:
            held = f"{figure.num_held:,}/{figure.num_tried:,}"
            print(f"{number}  {figure.name:<26} {held:>22}  {figure.note}", flush=True)
            for failure in figure.failures[:SHOWN_FAILURES]:
                print(f"      {failure}")
            is_broken |= bool(figure.failures) or not figure.num_tried
        print(f"    {time.monotonic() - started_at:.0f} s", flush=True)
    return 1 if is_broken else 0


if __name__ == "__main__":
    sys.exit(main())
