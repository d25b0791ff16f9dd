"""The commands `up`, `down` and `doctor`."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from flows.commands.options import add_artifacts_option
from flows.services.processes import ServiceError
from llm.config import RuntimeConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flows.live_runs import LiveRun


def add_server_commands(commands: Any) -> None:
    """Add `up` and `down` to the subparsers."""
    for name, command, text in (
        ("up", _up, "start the Prefect server, its worker and MLflow on 127.0.0.1"),
        ("down", _down, "stop the services that `up` started"),
    ):
        parser = commands.add_parser(name, help=text, description=text)
        if name == "down":
            parser.add_argument("--force", action="store_true", help="even while runs use them")
        add_artifacts_option(parser)
        parser.set_defaults(command=command)


def add_doctor_command(commands: Any) -> None:
    """Add `doctor` to the subparsers."""
    doctor = commands.add_parser("doctor", help="check this machine, the servers and the artifacts")
    doctor.add_argument("--verify", action="store_true", help="hash every file of every artifact")
    add_artifacts_option(doctor)
    doctor.set_defaults(command=_doctor)


def _up(options: argparse.Namespace) -> int:
    from flows.services.addresses import addresses
    from flows.services.servers import up

    artifacts_dir = options.artifacts.absolute()
    up(artifacts_dir)
    for name, address in reversed(addresses(RuntimeConfig(), artifacts_dir).items()):
        print(f"{name:<8} {address}")
    return 0


def _down(options: argparse.Namespace) -> int:
    from flows.live_runs import live_runs
    from flows.services.servers import down

    artifacts_dir = options.artifacts.absolute()
    runs = live_runs(artifacts_dir)
    if runs and not options.force:
        _confirm_down(runs)
    stopped = down(artifacts_dir)
    print(f"stopped: {', '.join(stopped)}" if stopped else "no services were running")
    return 0


def _confirm_down(runs: "Sequence[LiveRun]") -> None:
    """Ask whether to stop the servers of these runs; without a terminal, refuse."""
    effects = {True: "will save and be canceled", False: "will continue with its own server"}
    lines = [f"  {run.name} (process {run.pid}): {effects[run.is_of_worker]}" for run in runs]
    text = "\n".join(["runs are using these servers:", *lines])
    if not sys.stdin.isatty():
        raise ServiceError(f"{text}\nnothing was stopped; `fromscratch down --force` stops them")
    print(text, file=sys.stderr)
    print("stop the servers? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ServiceError("nothing was stopped")


def _doctor(options: argparse.Namespace) -> int:
    from flows.doctor import examine

    return examine(options.artifacts, is_thorough=options.verify)
