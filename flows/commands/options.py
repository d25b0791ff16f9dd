"""Options and exit codes that several commands share."""

import argparse
from pathlib import Path

EXIT_FAILED = 1
EXIT_BAD_SETTINGS = 2  # as argparse


def add_artifacts_option(parser: argparse.ArgumentParser) -> None:
    """Add `--artifacts FOLDER`."""
    parser.add_argument(
        "--artifacts",
        type=Path,
        default=Path("artifacts"),
        metavar="FOLDER",
        help="artifacts folder, as runtime.artifacts_dir of a run; default: artifacts",
    )
