"""The Prefect flow `pipeline`: one task per step, in parallel where inputs allow."""

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
from flows.live_runs import LiveRun, LiveRunFile
from flows.pipeline import language_model
from flows.prefect_link import PrefectLink
from flows.result import RunResult
from flows.services.addresses import addresses
from flows.services.environments import served_artifacts
from flows.services.registry import running_prefect_environment
from flows.sweep import SWEEP
from llm.config import RunConfig, flatten
from llm.errors import FromscratchError, Interrupted, TransientError
from llm.models import Training, trainings
from llm.recipes import load_config
from tasks.cached import Builder, Outcome
from tasks.plan import Selection, make_plan
from tasks.preflight import refuse_what_cannot_run
from tasks.stages import DOWNLOAD, PipelineStep, in_order
from tasks.store import ArtifactStore
from tasks.tracking.journal import PipelineStarted, ReportFinished
from tasks.tracking.tracker import Tracker

MAX_NAME_CHARACTERS = 120  # one line on the flow run's page
DOWNLOAD_RETRY_SECONDS = [2.0, 10.0, 30.0]


def _flow_run_name() -> str:
    """Return overrides and recipe: `finetune.num_steps=200 quickstart`."""
    parameters = cast(Mapping[str, Any], flow_run.parameters or {})
    overrides = cast(list[str], parameters.get("overrides") or [])
    differing = " ".join(word for word in overrides if not word.startswith("runtime."))
    shown = textwrap.shorten(differing, MAX_NAME_CHARACTERS, placeholder=" ...")
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
    """Build a language model from a recipe. Stages that are cached are not built again.

    Args:
        recipe: name of a recipe in configs/, or path of a YAML file.
        overrides: settings that replace the recipe's, each `section.key=value`.
        only: build this stage alone; its inputs must be cached.
        start_from: build this stage and all later ones, even if cached.
        force: build these stages even if cached.
        reuse: use the newest artifacts of these stages even if their code changed.
    """
    run_file = _create_run_file()
    _suppress_known_tracebacks()
    try:
        config = load_config(recipe, overrides or [])
        selection = Selection(
            only=only, start_from=start_from, force=tuple(force or ()), reuse=tuple(reuse or ())
        )
        result = _run(config, selection)
    except (Interrupted, KeyboardInterrupt, TerminationSignal):
        return Cancelled(message="Stopped; run it again to resume.")
    except FromscratchError as error:  # meant for the user, hence no traceback
        return Failed(message=str(error), data=error)
    finally:
        if run_file is not None:
            run_file.end()
    num_built = sum(outcome.status == "built" for outcome in result.outcomes)
    return Completed(message=f"{num_built} of {len(result.outcomes)} stages built", data=result)


def _run(config: RunConfig, selection: Selection) -> RunResult:
    """Plan, check the plan, then build."""
    store = ArtifactStore(Path(config.runtime.artifacts_dir))
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
            _publish_report(outcomes[-1], tracker, trainings(config))
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
        addresses=addresses(config.runtime, store.root) | _run_page(),
    )


def _build_all(steps: list[PipelineStep], builder: Builder, link: PrefectLink) -> list[Outcome]:
    """Submit every step at once; each starts when its inputs are built.

    Raises:
        Interrupted: the run was canceled or received a signal. Every stage has saved and stopped.
    """
    futures: dict[PipelineStep, PrefectFuture[Any]] = {}
    for step in steps:
        inputs = {name: futures[dependency] for name, dependency in step.inputs.items()}
        futures[step] = _as_task(step, builder, link).submit(inputs)
    _wait_for_all(list(futures.values()), link)
    for future in futures.values():
        if future.state.is_failed() or future.state.is_crashed():
            future.result()  # raises the stage's error
    if not all(future.state.is_completed() for future in futures.values()):
        raise Interrupted("a stage was stopped")
    return [builder.outcomes[step] for step in steps]


def _wait_for_all(futures: Sequence[PrefectFuture[Any]], link: PrefectLink) -> None:
    """Return when every step has ended. A failed step or a signal stops the others."""
    ended: queue.SimpleQueue[PrefectFuture[Any]] = queue.SimpleQueue()
    for future in futures:
        future.add_done_callback(ended.put)
    num_running = len(futures)
    while num_running:
        try:
            future = ended.get()
        except (KeyboardInterrupt, TerminationSignal):
            link.stop()  # a second signal changes nothing: the stages are saving
        else:
            num_running -= 1
            future.wait()  # returns at once; saves a request for its state to Prefect's server
            if not future.state.is_completed():
                link.stop()


def _as_task(step: PipelineStep, builder: Builder, link: PrefectLink) -> Task[..., Any]:
    """Return the Prefect task of a step. Results are kept by the store, not by Prefect."""

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
    """Retry network failures, never bad settings or bad data."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, TransientError)


def _publish_report(last: Outcome, tracker: Tracker, models: Sequence[Training]) -> None:
    """Publish the report in Prefect and MLflow, if the run built it."""
    if last.stage != "evaluate":
        return
    names = [model.model_name for model in models]
    tracker.log(ReportFinished(folder=last.path, models=names, metrics=last.summary))
    report = (Path(last.path) / "report.md").read_text(encoding="utf-8")
    with contextlib.suppress(httpx.HTTPError):
        create_markdown_artifact(report, key="report", description="Evaluation report")


def _create_run_file() -> LiveRunFile | None:
    """Register this run as live, for `up`, `down` and later runs."""
    artifacts_dir = served_artifacts()
    if artifacts_dir is None:
        return None
    is_of_worker = "PREFECT__FLOW_RUN_ID" in os.environ
    run_id, name = str(flow_run.id), str(flow_run.name)
    run = LiveRun(id=run_id, name=name, pid=os.getpid(), is_of_worker=is_of_worker)
    return LiveRunFile(artifacts_dir, run)


def _suppress_known_tracebacks() -> None:
    """Keep tracebacks of user errors and cancellation out of Prefect's logs, which have the whole
    message in the final state.
    """
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_is_unexpected)


def _is_unexpected(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, FromscratchError | CancelledRun)


def _prefect_url() -> str:
    ui = get_current_settings().ui_url or ""
    return f"{ui}/runs/flow-run/{flow_run.id}" if ui else ""


def _run_page() -> dict[str, str]:
    """Return the address of the run's page, unless its server is a temporary one."""
    artifacts_dir = served_artifacts()
    is_lasting = artifacts_dir is None or running_prefect_environment(artifacts_dir)
    return {"Prefect": _prefect_url()} if is_lasting and _prefect_url() else {}
