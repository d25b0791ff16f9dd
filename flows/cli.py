"""The command line, `fromscratch` or `python -m flows.cli`.

    run | sweep | compare | up | down | tokenizers | chat | export | merge | import | doctor

A run whose steps are all cached imports neither prefect nor mlflow and needs no server.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from flows.commands.compare import add_compare_command
from flows.commands.models import add_model_commands
from flows.commands.options import EXIT_BAD_SETTINGS, EXIT_FAILED
from flows.commands.runs import add_run_commands
from flows.commands.servers import add_doctor_command, add_server_commands
from llm.errors import ConfigError, FromscratchError, Interrupted
from llm.runtime.disk import disk_full
from llm.runtime.failures import EXIT_INTERRUPTED

EXIT_CTRL_C = 130  # 128 + SIGINT, as shells


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 failed, 2 bad settings, 75 interrupted."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    if overrides != rest or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # `run quickstart --plan pack.seq_len=64`: argparse takes no positionals after options
        options.overrides += rest
    try:
        return options.command(options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_SETTINGS
    except FromscratchError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except OSError as error:
        if (full := disk_full(error, Path(error.filename or "."))) is None:
            raise
        print(f"error: {full}", file=sys.stderr)
        return EXIT_FAILED
    except (Interrupted, KeyboardInterrupt):
        if hasattr(options, "overrides"):  # `run` and `sweep` keep what is built and saved
            print("stopped; run the same command to resume", file=sys.stderr)
            return EXIT_INTERRUPTED
        print("stopped", file=sys.stderr)
        return EXIT_CTRL_C


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fromscratch",
        description="From raw text to a chat model in one cached, resumable flow.",
    )
    parser.add_argument(
        "--version", action="version", version=f"fromscratch {metadata.version('fromscratch')}"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_run_commands(commands)
    add_compare_command(commands)
    add_server_commands(commands)
    add_model_commands(commands)
    add_doctor_command(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
