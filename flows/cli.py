"""The command line, `fromscratch` or `python -m flows.cli`.

    run | sweep | tokenizers | up | down | chat | export | import | doctor

A run whose plan finds nothing to build imports neither prefect nor mlflow and needs no server.
"""

import argparse
import atexit
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

from flows.pipeline import language_model
from flows.services.processes import ServiceError
from llm.config import RunConfig, RuntimeConfig, load_config, recipe_names
from llm.errors import ArtifactError, ConfigError, FromscratchError, Interrupted
from llm.inference.chat import add_options, chat_with_options
from llm.models import MODELS, chat_models
from llm.runtime.disk import disk_full
from llm.runtime.failures import EXIT_INTERRUPTED
from tasks.plan import PlannedStep, Selection, make_plan
from tasks.preflight import find_problems, refuse_what_cannot_run
from tasks.stages import all_stages, in_order
from tasks.store import Store

if TYPE_CHECKING:
    from flows.result import RunResult
    from flows.running import RunningRun
    from flows.sweep import Member
    from tasks.cached import Outcome

EXIT_FAILED = 1
EXIT_BAD_SETTINGS = 2  # as argparse's own
EXIT_CTRL_C = 130  # 128 + SIGINT, as shells count


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 failed, 2 bad settings, 75 interrupted."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    overrides = [word for word in rest if "=" in word and not word.startswith("-")]
    if overrides != rest or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # `run quickstart --plan pack.seq_len=64`: argparse takes no positional so late
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
        if options.command not in (_run, _sweep):  # the others keep nothing to go on from
            print("stopped", file=sys.stderr)
            return EXIT_CTRL_C
        print("stopped; the same command goes on from where it was", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fromscratch",
        description="From raw text to a chat model in one cached, resumable flow.",
    )
    parser.add_argument(
        "--version", action="version", version=f"fromscratch {metadata.version('fromscratch')}"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)
    _add_sweep(commands)
    for name, command, text in (
        ("up", _up, "start Prefect server, worker and MLflow on 127.0.0.1"),
        ("down", _down, "stop what `up` started"),
    ):
        adding = commands.add_parser(name, help=text, description=text)
        if name == "down":
            adding.add_argument("--force", action="store_true", help="even while runs use them")
        _add_artifacts(adding)
        adding.set_defaults(command=command)
    _add_tokenizers(commands)
    chat = commands.add_parser("chat", help="chat with a model in the terminal")
    chat.add_argument("model", nargs="?", default="", help="its folder; default: the newest one")
    add_options(chat)
    _add_artifacts(chat)
    chat.set_defaults(command=_chat)
    _add_exchange(commands)
    doctor = commands.add_parser("doctor", help="say what is wrong with this machine")
    doctor.add_argument("--verify", action="store_true", help="hash every file of every artifact")
    _add_artifacts(doctor)
    doctor.set_defaults(command=_doctor)
    return parser


def _add_run(commands: Any) -> None:
    names = [stage.name for stage in all_stages()]
    run = commands.add_parser(
        "run",
        help="make a model by a recipe, doing only what is not done yet",
        epilog=f"recipes: {', '.join(recipe_names())}; stages: {', '.join(names)}",
    )
    run.add_argument("recipe", help="a name in configs/, or the path of a YAML file")
    run.add_argument("overrides", nargs="*", metavar="section.key=value")
    run.add_argument("--plan", action="store_true", help="say what would be built and why")
    run.add_argument("--only", metavar="STAGE", default="", help="build this stage alone")
    run.add_argument(
        "--from",
        metavar="STAGE",
        default="",
        dest="start_from",
        help="build this stage and all after it, even if cached",
    )
    for option, text in (
        ("--force", "build this stage even if cached"),
        ("--reuse", "take its newest artifact though its code changed"),
    ):
        run.add_argument(option, metavar="STAGE", action="append", default=[], help=text)
    run.add_argument("--json", action="store_true", help="end with one JSON object on stdout")
    run.set_defaults(command=_run)


def _add_exchange(commands: Any) -> None:
    export = commands.add_parser("export", help="write a model for transformers or llama.cpp")
    export.add_argument("model", nargs="?", default="", help="its folder; default: the newest one")
    export.add_argument("--format", choices=("hf", "gguf"), default="hf", help="default: hf")
    export.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="a new folder")
    export.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of weights"
    )
    _add_artifacts(export)
    export.set_defaults(command=_export)
    importing = commands.add_parser("import", help="make a model of transformers one of ours")
    importing.add_argument("folder", type=Path, help="as `save_pretrained` writes it")
    importing.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="a new folder")
    importing.set_defaults(command=_import)


def _add_sweep(commands: Any) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="run one recipe over a grid and compare",
        epilog="one that fails stops no other; then the exit code is 1",
    )
    sweep.add_argument("name", help="a name in configs/sweeps/, or the path of a YAML file")
    sweep.add_argument("overrides", nargs="*", metavar="section.key=value", help="for every member")
    sweep.add_argument("--json", action="store_true", help="end with one JSON object on stdout")
    sweep.set_defaults(command=_sweep)


def _add_tokenizers(commands: Any) -> None:
    text = "compare tokenizers on one text: lengths, single bytes, round trips, speed"
    tokenizers = commands.add_parser("tokenizers", help=text, description=text)
    tokenizers.add_argument(
        "folders", nargs="*", type=Path, metavar="FOLDER", help="default: every one that was made"
    )
    tokenizers.add_argument(
        "--text",
        type=Path,
        metavar="PATH",
        help="a file, or a folder of clean's; default: validation documents of the newest corpus",
    )
    tokenizers.add_argument(
        "--to", type=Path, metavar="FOLDER", help="write all figures and a plot there"
    )
    _add_artifacts(tokenizers)
    tokenizers.set_defaults(command=_tokenizers)


def _add_artifacts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--artifacts",
        type=Path,
        default=Path("artifacts"),
        metavar="FOLDER",
        help="of all artifacts, as runtime.artifacts_dir of a run; default: artifacts",
    )


def _run(options: argparse.Namespace) -> int:
    started_at = time.monotonic()
    config = load_config(options.recipe, options.overrides)
    selection = Selection(
        only=options.only,
        start_from=options.start_from,
        force=tuple(options.force),
        reuse=tuple(options.reuse),
    )
    store = Store(Path(config.runtime.artifacts_dir))
    plan = make_plan(in_order(language_model(config)), config, store, selection)
    if options.plan:
        return _show_plan(config, plan, find_problems(plan, config, store), options.json)
    result = _result(options, config, plan, store)
    _show_result(result, time.monotonic() - started_at, options.json)
    return 0


def _result(
    options: argparse.Namespace, config: RunConfig, plan: Sequence[PlannedStep], store: Store
) -> "RunResult":
    """Run what the plan finds to do, if anything."""
    from flows.result import cached_result

    if all(item.status == "cached" and item.reason == "unchanged" for item in plan):
        result = cached_result(config, plan, store)
        if getattr(options, "sweep", ""):
            from tasks.cached import log_cached_run

            links = {"sweep": options.sweep}
            log_cached_run(config, store, result.outcomes, options.name, links)
        return result
    refuse_what_cannot_run(plan, config, store)
    return _run_flow(options, config, store)


def _sweep(options: argparse.Namespace) -> int:
    from flows.display import print_sweep
    from flows.sweep import load_sweep, run_sweep, short_name

    sweep = load_sweep(options.name, options.overrides)

    def run_member(
        config: RunConfig, member: "Member", overrides: Sequence[str]
    ) -> "Sequence[Outcome]":
        run_options = argparse.Namespace(
            recipe=sweep.recipe,
            overrides=list(overrides),
            only="",
            start_from="",
            force=[],
            reuse=[],
            name=f"{short_name(member)} {config.name}",
            sweep=Path(options.name).stem,
        )
        store = Store(Path(config.runtime.artifacts_dir))
        plan = make_plan(in_order(language_model(config)), config, store, Selection())
        return _result(run_options, config, plan, store).outcomes

    members = run_sweep(sweep, run_member, lambda line: print(f"\n{line}", file=sys.stderr))
    if options.json:
        print(json.dumps({"recipe": sweep.recipe, "members": list(map(asdict, members))}))
    else:
        print_sweep(members)
    return EXIT_FAILED if any(member.status == "failed" for member in members) else 0


def _run_flow(options: argparse.Namespace, config: RunConfig, store: Store) -> "RunResult":
    """Run the Prefect flow, on the server that is up or on one that dies with this process."""
    # the terminal is the display's; Prefect's own lines still reach its server
    signal.signal(signal.SIGTERM, _stop)
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    _use_prefect_server(store.root)
    import httpx
    from prefect import tags

    from flows.run import pipeline
    from flows.sweep import SWEEP

    flow, of_sweep = cast(Any, pipeline), list[str]()
    if getattr(options, SWEEP, ""):
        flow = flow.with_options(flow_run_name=lambda: options.name)
        of_sweep = [f"{SWEEP}:{options.sweep}"]
    try:
        with tags(*of_sweep):
            state = flow(
                recipe=options.recipe,
                overrides=options.overrides,
                only=options.only,
                start_from=options.start_from,
                force=options.force,
                reuse=options.reuse,
                return_state=True,
            )
    except httpx.HTTPError as error:
        raise ServiceError(
            f"Prefect's server went away and could not be brought back ({error!r}); every stage"
            " that finished is kept, and the same command goes on from there"
        ) from error
    if state.is_cancelled():
        raise Interrupted(state.message)
    return state.result()


def _stop(number: int, frame: FrameType | None) -> None:
    """Be told to stop: by whoever sent the signal, or by Prefect after it has ended its run."""
    raise Interrupted("asked to stop")


def _use_prefect_server(artifacts: Path) -> None:
    """Point Prefect's client at the server that is up, or at one started for this run alone."""
    from flows.services.servers import environment
    from flows.services.temporary_server import TemporaryPrefectServer

    found = environment(artifacts)
    wanted = os.environ.get("PREFECT_API_URL", "")
    if wanted and wanted != found.get("PREFECT_API_URL"):
        return  # a server of the user's own
    if found:
        os.environ.update(found)
        return
    server = TemporaryPrefectServer(artifacts)
    # registered before prefect is imported, so it comes after prefect's own last messages
    atexit.register(server.stop)
    os.environ.update(server.environment)
    importlib.import_module("prefect")  # 2 s, while the server starts
    server.wait_ready()


def _show_plan(
    config: RunConfig, plan: Sequence[PlannedStep], problems: Sequence[str], is_json: bool
) -> int:
    """Print the plan and what keeps it from being done here, which is bad settings."""
    if is_json:
        stages = [
            {
                "stage": item.step.stage.name,
                "role": str(item.step.role),
                "status": item.status,
                "reason": item.reason,
                "digest": item.digest,
            }
            for item in plan
        ]
        print(json.dumps({"recipe": config.name, "stages": stages, "problems": list(problems)}))
    else:
        from flows.display import print_plan

        print_plan(plan)
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
    return EXIT_BAD_SETTINGS if problems else 0


def _show_result(result: "RunResult", seconds: float, is_json: bool) -> None:
    outcomes = result.outcomes
    last = outcomes[-1]
    metrics = {
        name: value
        for name, value in (last.summary.items() if last.stage == "evaluate" else ())
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    if is_json:
        stages = [
            {
                "stage": outcome.stage,
                "role": outcome.role,
                "digest": outcome.digest,
                "status": outcome.status,
                "reason": outcome.reason,
                "seconds": outcome.seconds,
                "path": outcome.path,
            }
            for outcome in outcomes
        ]
        answer = {
            "recipe": result.recipe,
            "seconds": round(seconds, 3),
            "stages": stages,
            "metrics": metrics,
            "mlflow_run_id": result.mlflow_run_id,
        }
        print(json.dumps(answer))
        return
    from flows.display import print_outcomes

    samples = Path(last.path) / "samples.json"
    shown = json.loads(samples.read_bytes()) if samples.is_file() else []
    answers = [sample for sample in shown if sample.get("expected")] or shown
    print_outcomes(outcomes, metrics, answers, result.addresses, seconds)


def _up(options: argparse.Namespace) -> int:
    from flows.services.servers import addresses, up

    artifacts_dir = options.artifacts.absolute()
    up(artifacts_dir)
    for name, address in reversed(addresses(RuntimeConfig(), artifacts_dir).items()):
        print(f"{name:<8} {address}")
    return 0


def _down(options: argparse.Namespace) -> int:
    from flows.running import running_runs
    from flows.services.servers import down

    artifacts_dir = options.artifacts.absolute()
    runs = running_runs(artifacts_dir)
    if runs and not options.force:
        _confirm_down(runs)
    stopped = down(artifacts_dir)
    print(f"stopped: {', '.join(stopped)}" if stopped else "nothing was running")
    return 0


def _confirm_down(runs: "Sequence[RunningRun]") -> None:
    """Ask whether to stop the servers of these runs; without a terminal, refuse."""
    ends = {True: "will save and be cancelled", False: "will go on with a server of its own"}
    lines = [f"  {run.name} (process {run.pid}): {ends[run.is_of_worker]}" for run in runs]
    said = "\n".join(["runs are using these servers:", *lines])
    if not sys.stdin.isatty():
        raise ServiceError(f"{said}\nnothing was stopped; `fromscratch down --force` stops them")
    print(said, file=sys.stderr)
    print("stop the servers? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ServiceError("nothing was stopped")


def _chat(options: argparse.Namespace) -> int:
    folder = _model_folder(options)
    if not options.model and not sys.stdin.isatty():  # at a terminal the chat prints it
        print(f"model: {folder}", file=sys.stderr)
    chat_with_options(folder, options)
    return 0


def _export(options: argparse.Namespace) -> int:
    folder = _model_folder(options)
    if options.format == "gguf":
        from llm.exchange.gguf import export_gguf as export
    else:
        from llm.exchange.folders import export_model as export
    export(folder, options.to, dtype=options.dtype)
    print(options.to)
    return 0


def _import(options: argparse.Namespace) -> int:
    from llm.exchange.folders import import_model

    import_model(options.folder, options.to)
    print(options.to)
    return 0


def _model_folder(options: argparse.Namespace) -> Path:
    """Return the folder of the named model, or of the newest chat model.

    Raises:
        ArtifactError: it is not there.
    """
    if not options.model:
        return _newest_chat_model(options.artifacts)
    folder = Path(options.model)
    if not folder.is_dir():
        raise ArtifactError(
            f"{folder}: no such folder; expected that of a model, artifacts/STAGE/DIGEST with a"
            f" STAGE of {', '.join(MODELS)}, or nothing for the newest chat model"
        )
    return folder


def _newest_chat_model(artifacts: Path) -> Path:
    store = Store(artifacts)
    for record in store.records(*(model.stage for model in chat_models())):
        folder = store.folder(record.parts.stage, record.digest)
        if folder.is_dir():
            return folder
    raise ArtifactError(
        f"{store.root}: no chat model there; make one with `fromscratch run quickstart`,"
        " or name its folder: `fromscratch chat FOLDER`"
    )


def _tokenizers(options: argparse.Namespace) -> int:
    from flows import compare_tokenizers as comparing
    from flows.display import print_tokenizers

    store = Store(options.artifacts)
    texts = comparing.read_texts(options.text or comparing.find_text(store))
    folders = options.folders or comparing.find_tokenizers(store)
    measured = comparing.measure_tokenizers(comparing.name_tokenizers(folders), texts)
    print_tokenizers(measured)
    if options.to:
        comparing.write_report(measured, options.to)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from flows.doctor import examine

    return examine(options.artifacts, is_thorough=options.verify)


if __name__ == "__main__":
    sys.exit(main())
