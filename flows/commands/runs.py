"""The commands `run` and `sweep`."""

import argparse
import atexit
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

from flows.commands.options import EXIT_BAD_SETTINGS, EXIT_FAILED
from flows.pipeline import language_model
from flows.services.processes import ServiceError
from llm.config import RunConfig
from llm.errors import Interrupted
from llm.recipes import load_config, recipe_names
from tasks.plan import PlannedStep, Selection, make_plan
from tasks.preflight import find_problems, refuse_what_cannot_run
from tasks.stages import all_stages, in_order
from tasks.store import ArtifactStore

if TYPE_CHECKING:
    from flows.result import RunResult
    from flows.sweep import Member
    from tasks.cached import Outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRequest:
    """The arguments of one run, or of a sweep's member, which has a name and names its sweep."""

    recipe: str
    overrides: Sequence[str]
    selection: Selection
    name: str = ""
    sweep: str = ""


def add_run_commands(commands: Any) -> None:
    """Add `run` and `sweep` to the subparsers."""
    stages = ", ".join(stage.name for stage in all_stages())
    run = commands.add_parser(
        "run",
        help="build a model from a recipe, reusing everything that is cached",
        epilog=f"recipes: {', '.join(recipe_names())}; stages: {stages}",
    )
    run.add_argument("recipe", help="name of a recipe in configs/, or path of a YAML file")
    run.add_argument("overrides", nargs="*", metavar="section.key=value", help="change a setting")
    run.add_argument("--plan", action="store_true", help="print what would be built and why")
    run.add_argument("--only", metavar="STAGE", default="", help="build this stage alone")
    text = "build this stage and all later ones, even if cached"
    run.add_argument("--from", metavar="STAGE", default="", dest="start_from", help=text)
    for option, text in (
        ("--force", "build this stage even if cached"),
        ("--reuse", "use its newest artifact even if its code changed"),
    ):
        run.add_argument(option, metavar="STAGE", action="append", default=[], help=text)
    run.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    run.set_defaults(command=_run)
    sweep = commands.add_parser(
        "sweep",
        help="run a recipe over a grid of settings and compare the results",
        epilog="a failed member does not stop the others; the exit code is then 1",
    )
    sweep.add_argument("name", help="name of a sweep in configs/sweeps/, or path of a YAML file")
    sweep.add_argument("overrides", nargs="*", metavar="section.key=value", help="for all members")
    sweep.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    sweep.set_defaults(command=_sweep)


def _run(options: argparse.Namespace) -> int:
    started_at = time.monotonic()
    config = load_config(options.recipe, options.overrides)
    selection = Selection(
        only=options.only,
        start_from=options.start_from,
        force=tuple(options.force),
        reuse=tuple(options.reuse),
    )
    store = ArtifactStore(Path(config.runtime.artifacts_dir))
    plan = make_plan(in_order(language_model(config)), config, store, selection)
    if options.plan:
        return _show_plan(config, plan, find_problems(plan, config, store), options.json)
    request = RunRequest(recipe=options.recipe, overrides=options.overrides, selection=selection)
    result = _execute(request, config, plan, store)
    _show_result(result, time.monotonic() - started_at, options.json)
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from flows.display import print_sweep
    from flows.sweep import load_sweep, run_sweep, short_name

    sweep = load_sweep(options.name, options.overrides)

    def run_member(
        config: RunConfig, member: "Member", overrides: Sequence[str]
    ) -> "Sequence[Outcome]":
        request = RunRequest(
            recipe=sweep.recipe,
            overrides=overrides,
            selection=Selection(),
            name=f"{short_name(member)} {config.name}",
            sweep=Path(options.name).stem,
        )
        store = ArtifactStore(Path(config.runtime.artifacts_dir))
        plan = make_plan(in_order(language_model(config)), config, store, request.selection)
        return _execute(request, config, plan, store).outcomes

    members = run_sweep(sweep, run_member, lambda line: print(f"\n{line}", file=sys.stderr))
    if options.json:
        print(json.dumps({"recipe": sweep.recipe, "members": list(map(asdict, members))}))
    else:
        print_sweep(members)
    return EXIT_FAILED if any(member.status == "failed" for member in members) else 0


def _execute(
    request: RunRequest, config: RunConfig, plan: Sequence[PlannedStep], store: ArtifactStore
) -> "RunResult":
    """Run the flow, unless every step of the plan is cached."""
    from flows.result import cached_result

    if all(item.status == "cached" and item.reason == "unchanged" for item in plan):
        result = cached_result(config, plan, store)
        if request.sweep:
            from tasks.cached import log_cached_run

            links = {"sweep": request.sweep}
            log_cached_run(config, store, result.outcomes, request.name, links)
        return result
    refuse_what_cannot_run(plan, config, store)
    return _run_flow(request, store)


def _run_flow(request: RunRequest, store: ArtifactStore) -> "RunResult":
    """Run the Prefect flow, on the running server or on a temporary one."""
    # Prefect's log lines would break the live display; its server still receives them
    signal.signal(signal.SIGTERM, _interrupt)
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    _use_prefect_server(store.root)
    import httpx
    from prefect import tags

    from flows.run import pipeline
    from flows.sweep import SWEEP

    flow = cast(Any, pipeline)
    if request.name:
        flow = flow.with_options(flow_run_name=lambda: request.name)
    try:
        with tags(*[f"{SWEEP}:{request.sweep}"] if request.sweep else []):
            state = flow(
                recipe=request.recipe,
                overrides=list(request.overrides),
                only=request.selection.only,
                start_from=request.selection.start_from,
                force=list(request.selection.force),
                reuse=list(request.selection.reuse),
                return_state=True,
            )
    except httpx.HTTPError as error:
        raise ServiceError(
            f"the Prefect server has died and could not be restarted ({error!r}); finished stages"
            " are kept, run the same command to resume"
        ) from error
    if state.is_cancelled():
        raise Interrupted(state.message)
    return state.result()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Handle SIGTERM, sent by the user or by Prefect after it has ended its run."""
    raise Interrupted("received SIGTERM")


def _use_prefect_server(artifacts: Path) -> None:
    """Point Prefect's client to the running server, or to a temporary one started for this run."""
    from flows.services.registry import running_prefect_environment
    from flows.services.temporary_server import TemporaryPrefectServer

    found = running_prefect_environment(artifacts)
    wanted = os.environ.get("PREFECT_API_URL", "")
    if wanted and wanted != found.get("PREFECT_API_URL"):
        return  # the user's own server
    if found:
        os.environ.update(found)
        return
    server = TemporaryPrefectServer(artifacts)
    # registered before prefect is imported: exit handlers run in reverse order, prefect's first
    atexit.register(server.stop)
    os.environ.update(server.environment)
    importlib.import_module("prefect")  # 2 s, while the server starts
    server.wait_ready()


def _show_plan(
    config: RunConfig, plan: Sequence[PlannedStep], problems: Sequence[str], is_json: bool
) -> int:
    """Print the plan and its problems; return the exit code, 2 if there are any."""
    if is_json:
        names = ("status", "reason", "digest")
        stages = [
            {"stage": item.step.stage.name, "role": str(item.step.role)}
            | {name: getattr(item, name) for name in names}
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
        names = ("stage", "role", "digest", "status", "reason", "seconds", "path")
        answer = {
            "recipe": result.recipe,
            "seconds": round(seconds, 3),
            "stages": [{name: getattr(each, name) for name in names} for each in outcomes],
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
