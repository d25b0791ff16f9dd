"""The flow: builds the steps of the map as Prefect tasks, side by side where they can be."""

import contextlib
import re
import textwrap
import threading
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, cast

import httpx
from prefect import flow
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, TaskRun
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.settings import get_current_settings
from prefect.states import Completed
from prefect.tasks import Task

from flows.display import LiveDisplay
from flows.pipeline import language_model
from flows.result import RunResult
from flows.services import addresses
from flows.sweep import SWEEP
from llm.config import flatten, load_config
from tasks.cached import Builder, Outcome
from tasks.launch import Progress, TransientError
from tasks.plan import Selection
from tasks.stages import DOWNLOAD, Step, in_order
from tasks.store import Store
from tasks.tracking import Tracker

SECONDS_BETWEEN_CANCEL_LOOKS = 3.0
SECONDS_BETWEEN_PROGRESS_ARTIFACTS = 2.0
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
) -> RunResult:
    """Make a language model by a recipe, or those of its stages that are not there yet.

    Args:
        recipe: a name in configs/, or the path of a YAML file.
        overrides: `section.key=value`, each.
        only: build this stage alone; what it needs must be there.
        start_from: build this stage and all that follow, even if cached.
        force: build these stages even if cached.
        reuse: take the newest artifacts of these stages though their code changed.
    """
    config = load_config(recipe, overrides or [])
    selection = Selection(
        only=only, start_from=start_from, force=tuple(force or ()), reuse=tuple(reuse or ())
    )
    store = Store(Path(config.runtime.artifacts_dir))
    tracker = Tracker(config, store.root)
    status = "FAILED"
    with _stop_event() as stop, LiveDisplay() as display:
        links = {"prefect_run_id": str(flow_run.id), "prefect_url": _prefect_url()}
        tags = [tag.partition(":") for tag in cast(list[str], flow_run.tags)]
        links |= {kind: name for kind, _, name in tags if kind == SWEEP}
        builder = Builder(
            config,
            store,
            tracker=tracker,
            display=display,
            selection=selection,
            should_stop=stop.is_set,
            links=links,
        )
        try:
            tracker.start_pipeline(flow_run.name, flatten(config), links)
            steps = selection.takes(in_order(language_model(config)))
            outcomes = _build_all(steps, builder)
            _publish_report(outcomes[-1], tracker)
            status = "FINISHED"
        except BaseException as error:
            status = "FAILED" if isinstance(error, Exception) else "KILLED"
            raise
        finally:
            stop.set()
            tracker.close(status)
            builder.finish()
    return RunResult(
        recipe=config.name,
        outcomes=[builder.outcomes[step] for step in steps],
        mlflow_run_id=tracker.pipeline_run_id,
        addresses=addresses(config.runtime, store.root) | {"Prefect": _prefect_url()},
    )


def _build_all(steps: list[Step], builder: Builder) -> list[Outcome]:
    """Submit every step at once; each starts when its inputs are built."""
    futures: dict[Step, PrefectFuture[Any]] = {}
    for step in steps:
        inputs = {name: futures[made_first] for name, made_first in step.inputs.items()}
        futures[step] = _as_task(step, builder).submit(inputs)
    for future in futures.values():
        future.result()
    return [builder.outcomes[step] for step in steps]


def _as_task(step: Step, builder: Builder) -> Task[..., Any]:
    """Return the Prefect task of a step. Prefect keeps no result of it: the store does."""

    def build(inputs: Mapping[str, Mapping[str, str]]) -> State[Any] | Mapping[str, str]:
        outcome = builder.build(step, _progress_artifact(step))
        reference = {"stage": outcome.stage, "key": outcome.key, "digest": outcome.digest}
        if outcome.status == "cached":
            return Completed(name="Cached", message=f"digest {outcome.digest}", data=reference)
        return reference

    is_download = step.stage is DOWNLOAD
    return Task(
        fn=build,
        name=step.stage.name,
        task_run_name=step.name,
        description=f"python -m llm.{step.stage.name}",
        tags={step.stage.name},
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


def _progress_artifact(step: Step) -> Callable[[Progress], None]:
    """Return a function that keeps a Prefect progress artifact of `step`, for those that last."""
    artifact_id: list[Any] = []
    next_at = [time.monotonic() + SECONDS_BETWEEN_PROGRESS_ARTIFACTS]

    def update(progress: Progress) -> None:
        if not progress.total or time.monotonic() < next_at[0]:
            return
        next_at[0] = time.monotonic() + SECONDS_BETWEEN_PROGRESS_ARTIFACTS
        percent = 100 * progress.done / progress.total
        text = f"{step.name}: {progress.done:,} of {progress.total:,} {progress.unit}"
        with contextlib.suppress(httpx.HTTPError):  # a server that is away must not end a training
            if artifact_id:
                update_progress_artifact(artifact_id[0], percent, description=text)
            else:
                key = re.sub(r"[^a-z0-9-]", "-", f"progress-{step.name}")
                artifact_id.append(create_progress_artifact(percent, key, text))

    return update


def _publish_report(last: Outcome, tracker: Tracker) -> None:
    """Show the report in Prefect and MLflow, when the run came that far."""
    if last.stage != "evaluate":
        return
    folder = Path(last.path)
    tracker.report_finished(folder, last.summary)
    report = (folder / "report.md").read_text(encoding="utf-8")
    with contextlib.suppress(httpx.HTTPError):
        create_markdown_artifact(report, key="report", description="Evaluation report")


@contextlib.contextmanager
def _stop_event() -> Generator[threading.Event]:
    """Yield an event that is set when the run ends or someone cancels it in Prefect."""
    stop = threading.Event()
    flow_run_id = flow_run.id

    def watch() -> None:
        with get_client(sync_client=True) as client:
            while not stop.wait(SECONDS_BETWEEN_CANCEL_LOOKS):
                with contextlib.suppress(httpx.HTTPError):
                    state = client.read_flow_run(flow_run_id).state
                    if state is not None and (state.is_cancelling() or state.is_cancelled()):
                        stop.set()

    watcher = threading.Thread(target=watch, name="cancel-watch", daemon=True)
    watcher.start()
    try:
        yield stop
    finally:
        stop.set()
        watcher.join()


def _prefect_url() -> str:
    ui = get_current_settings().ui_url or ""
    return f"{ui}/runs/flow-run/{flow_run.id}" if ui else ""
