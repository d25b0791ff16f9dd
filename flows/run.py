"""The flow: builds the steps of the map as Prefect tasks, side by side where they can be."""

import contextlib
import logging
import os
import queue
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import httpx
from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.exceptions import CancelledRun, TerminationSignal
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run, task_run
from prefect.settings import PREFECT_API_URL, get_current_settings
from prefect.states import Cancelled, Completed, Failed
from prefect.tasks import Task

from flows.display import LiveDisplay
from flows.pipeline import language_model
from flows.prefect_link import PrefectLink
from flows.result import RunResult
from flows.running import RunFile, RunningRun
from flows.services.environments import served_artifacts
from flows.services.servers import addresses, environment
from flows.sweep import SWEEP
from llm.config import RunConfig, flatten, load_config
from llm.errors import FromscratchError, Interrupted, TransientError
from tasks.cached import Builder, Outcome
from tasks.plan import Selection, make_plan
from tasks.preflight import refuse_what_cannot_run
from tasks.stages import DOWNLOAD, PipelineStep, in_order
from tasks.store import Store
from tasks.tracking.journal import PipelineStarted, ReportFinished
from tasks.tracking.tracker import Tracker

NAME_CHARACTERS = 120  # of a flow run, as its page shows it on one line
DOWNLOAD_RETRY_SECONDS = [2.0, 10.0, 30.0]


def _flow_run_name() -> str:
    """Say what differs from a recipe, and which: `finetune.num_steps=200 quickstart`."""
    parameters = cast(Mapping[str, Any], flow_run.parameters or {})
    overrides = cast(list[str], parameters.get("overrides") or [])
    differing = " ".join(word for word in overrides if not word.startswith("runtime."))
    shown = textwrap.shorten(differing, NAME_CHARACTERS, placeholder=" ...")
    return f"{shown} {Path(str(parameters.get('recipe'))).stem}".strip()


@flow(name="pipeline", flow_run_name=_flow_run_name, persist_result=False, log_prints=False)
def pipeline(
    recipe: str = "quickstart",
    overrides: list[str] | None = None,
    only: str = "",
    start_from: str = "",
    force: list[str] | None = None,
    reuse: list[str] | None = None,
) -> State[RunResult]:
    """Make a language model by a recipe, or those of its stages that are not there yet.

    Args:
        recipe: a name in configs/, or the path of a YAML file.
        overrides: `section.key=value`, each.
        only: build this stage alone; what it needs must be there.
        start_from: build this stage and all that follow, even if cached.
        force: build these stages even if cached.
        reuse: take the newest artifacts of these stages though their code changed.
    """
    run_file = _run_file()
    _say_errors_once()
    try:
        config = load_config(recipe, overrides or [])
        selection = Selection(
            only=only, start_from=start_from, force=tuple(force or ()), reuse=tuple(reuse or ())
        )
        result = _run(config, selection)
    except (Interrupted, KeyboardInterrupt, TerminationSignal):
        return Cancelled(message="It was stopped; run it again to go on from where it was.")
    except FromscratchError as error:  # the message is all there is to say: no traceback
        return Failed(message=str(error), data=error)
    finally:
        if run_file is not None:
            run_file.ended()
    num_built = sum(outcome.status == "built" for outcome in result.outcomes)
    return Completed(message=f"{num_built} of {len(result.outcomes)} stages built", data=result)


def _run(config: RunConfig, selection: Selection) -> RunResult:
    """Plan, then build. Nothing is built where the plan finds something wrong."""
    store = Store(Path(config.runtime.artifacts_dir))
    plan = make_plan(in_order(language_model(config)), config, store, selection)
    refuse_what_cannot_run(plan, config, store)
    tracker = Tracker(config, store.root)
    status = "FAILED"
    link = PrefectLink(PREFECT_API_URL.value() or "", str(flow_run.id), served_artifacts())
    with link, LiveDisplay() as display:
        links = {"prefect_run_id": str(flow_run.id), "prefect_url": _prefect_url()}
        tags = [tag.partition(":") for tag in cast(list[str], flow_run.tags)]
        links |= {kind: name for kind, _, name in tags if kind == SWEEP}
        builder = Builder(
            config,
            store,
            tracker=tracker,
            display=display,
            selection=selection,
            should_stop=link.is_stopping,
            links=links,
        )
        try:
            project, settings = config.runtime.project, flatten(config)
            name = str(flow_run.name)
            tracker.log(PipelineStarted(project=project, name=name, settings=settings, links=links))
            outcomes = _build_all([item.step for item in plan], builder, link)
            _publish_report(outcomes[-1], tracker)
            status = "FINISHED"
        except BaseException as error:
            status = "FAILED" if isinstance(error, Exception) else "KILLED"
            raise
        finally:
            tracker.close(status)
            builder.finish()
    return RunResult(
        recipe=config.name,
        outcomes=[builder.outcomes[item.step] for item in plan],
        mlflow_run_id=tracker.pipeline_run_id,
        addresses=addresses(config.runtime, store.root) | _page_that_answers(),
    )


def _build_all(steps: list[PipelineStep], builder: Builder, link: PrefectLink) -> list[Outcome]:
    """Submit every step at once; each starts when its inputs are built.

    Raises:
        Interrupted: the run was cancelled, or a signal came. Every stage has stopped and saved.
    """
    futures: dict[PipelineStep, PrefectFuture[Any]] = {}
    for step in steps:
        inputs = {name: futures[dependency] for name, dependency in step.inputs.items()}
        futures[step] = _as_task(step, builder, link).submit(inputs)
    _wait_for_all(list(futures.values()), link)
    for future in futures.values():
        if future.state.is_failed() or future.state.is_crashed():
            future.result()  # raises what the stage raised
    if not all(future.state.is_completed() for future in futures.values()):
        raise Interrupted("a stage was stopped")
    return [builder.outcomes[step] for step in steps]


def _wait_for_all(futures: Sequence[PrefectFuture[Any]], link: PrefectLink) -> None:
    """Return when every step has ended. One that fails stops the others; so does a signal."""
    ended: queue.SimpleQueue[PrefectFuture[Any]] = queue.SimpleQueue()
    for future in futures:
        future.add_done_callback(ended.put)
    left = len(futures)
    while left:
        try:
            future = ended.get()
        except (KeyboardInterrupt, TerminationSignal):
            link.stop()  # and a second signal changes nothing: the stages are saving
        else:
            left -= 1
            future.wait()  # it has ended; without this Prefect's server would be asked how
            if not future.state.is_completed():
                link.stop()


def _as_task(step: PipelineStep, builder: Builder, link: PrefectLink) -> Task[..., Any]:
    """Return the Prefect task of a step. Prefect keeps no result of it: the store does."""

    def build(inputs: Mapping[str, Mapping[str, str]]) -> State[Any] | Mapping[str, str]:
        task_run_id = str(task_run.id)
        try:
            outcome = builder.build(
                step, lambda progress: link.progressed(step.name, task_run_id, progress)
            )
        except Interrupted as stop:
            return Cancelled(message=str(stop))
        reference = {"stage": outcome.stage, "key": outcome.key, "digest": outcome.digest}
        if outcome.status == "cached":
            return Completed(name="Cached", message=f"digest {outcome.digest}", data=reference)
        link.finished(step.name)
        return reference

    is_download = step.stage is DOWNLOAD
    return Task(
        fn=build,
        name=step.stage.name,
        task_run_name=step.name,
        description=f"python -m llm.{step.stage.name}",
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=len(DOWNLOAD_RETRY_SECONDS) if is_download else 0,
        retry_delay_seconds=DOWNLOAD_RETRY_SECONDS if is_download else None,
        retry_condition_fn=_is_transient if is_download else None,
    )


def _is_transient(task_: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Retry what a network may cure, and never a bad setting or bad data."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, TransientError)


def _publish_report(last: Outcome, tracker: Tracker) -> None:
    """Show the report in Prefect and MLflow, when the run came that far."""
    if last.stage != "evaluate":
        return
    tracker.log(ReportFinished(folder=last.path, metrics=last.summary))
    report = (Path(last.path) / "report.md").read_text(encoding="utf-8")
    with contextlib.suppress(httpx.HTTPError):
        create_markdown_artifact(report, key="report", description="Evaluation report")


def _run_file() -> RunFile | None:
    """Say to `up`, `down` and later runs that this one is alive."""
    artifacts_dir = served_artifacts()
    if artifacts_dir is None:
        return None
    is_of_worker = "PREFECT__FLOW_RUN_ID" in os.environ
    return RunFile(
        artifacts_dir,
        RunningRun(
            id=str(flow_run.id),
            name=str(flow_run.name),
            pid=os.getpid(),
            is_of_worker=is_of_worker,
        ),
    )


def _say_errors_once() -> None:
    """Have Prefect log no traceback for an error that is the user's, or for being cancelled: the
    state it logs has the whole message.
    """
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, FromscratchError | CancelledRun)


def _prefect_url() -> str:
    ui = get_current_settings().ui_url or ""
    return f"{ui}/runs/flow-run/{flow_run.id}" if ui else ""


def _page_that_answers() -> dict[str, str]:
    """Return the run's own page, unless its server lasts only as long as the run."""
    artifacts_dir = served_artifacts()
    is_lasting = artifacts_dir is None or environment(artifacts_dir)
    return {"Prefect": _prefect_url()} if is_lasting and _prefect_url() else {}
