"""Build the steps of a run: compute the key, return a verified artifact or build and publish it."""

import contextlib
import functools
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

from llm.artifact import Artifact, Json, load_artifact
from llm.config import RunConfig, flatten
from llm.errors import Interrupted
from llm.runtime.disk import refuse_full_disk
from llm.runtime.job import STARTING_MODEL, Job, is_finished
from tasks.launch import Progress, launch
from tasks.plan import PlannedStep, Selection, explain, key_parts, reusable, section_of
from tasks.stages import CLEAN, PACK, PipelineStep, step_name
from tasks.store import ArtifactStore, KeyParts, KeyRecord
from tasks.tracking.journal import (
    Dataset,
    ModelFinished,
    ModelStarted,
    PipelineStarted,
    StageCached,
    StageFinished,
    StageStarted,
)
from tasks.tracking.tracker import Tracker


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The result of one step, small enough to pass between tasks instead of data."""

    stage: str
    role: str
    key: str
    digest: str
    status: Literal["built", "cached"]
    reason: str
    seconds: float
    path: str
    """The artifact's folder."""
    summary: Mapping[str, Json] = field(default_factory=dict[str, Json])
    links: Mapping[str, str] = field(default_factory=dict[str, str])
    """Ids of the runs that built it: `mlflow_run_id`, `mlflow_model_run_id`, `prefect_run_id`."""

    @property
    def name(self) -> str:
        """The display name: `pack corpus`, `pretrain`."""
        return step_name(self.stage, self.role)


class Display(Protocol):
    """Shows the progress of a run. Called from several threads."""

    def started(self, name: str, reason: str) -> None:
        """A step is being built."""

    def waits(self, name: str) -> None:
        """The step waits for another run that builds the same artifact."""

    def progressed(self, name: str, progress: Progress) -> None:
        """A step made progress."""

    def restarted(self, name: str, why: str) -> None:
        """A step's process was killed or hung, and is restarted."""

    def finished(self, outcome: Outcome) -> None:
        """A step is built or was cached."""


class Builder:
    """Builds the steps of one run, each once, or takes them from the artifact store."""

    def __init__(
        self,
        config: RunConfig,
        store: ArtifactStore,
        *,
        tracker: Tracker,
        display: Display,
        selection: Selection | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        links: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare to build. `links` holds ids and URLs, such as that of the Prefect run."""
        self.config = config
        self.store = store
        self.tracker = tracker
        self.outcomes: dict[PipelineStep, Outcome] = {}
        self._display = display
        self._selection = selection or Selection()
        self._should_stop = should_stop
        self._links = dict(links or {})
        self._records: dict[PipelineStep, KeyRecord] = {}
        self._lock = threading.Lock()

    def build(
        self, step: PipelineStep, on_progress: Callable[[Progress], None] | None = None
    ) -> Outcome:
        """Build `step`, whose inputs this builder has built before, or find it in the store.

        Raises:
            Interrupted, StageError, DataError: as `launch`. DiskFullError: in the stage or here.
            ConfigError: before training: a prompt of `evaluate` exceeds the context.
        """
        inputs = {name: self.outcomes[dependency] for name, dependency in step.inputs.items()}
        digests = {name: outcome.digest for name, outcome in inputs.items()}
        parts = key_parts(step, self.config, digests, self.store)
        lock_name = f"{parts.stage}-{parts.key}"
        show_once = functools.cache(lambda: self._display.waits(step.name))

        def wait() -> None:
            show_once()
            self._raise_if_stopping(step)

        self._raise_if_stopping(step)
        with refuse_full_disk(self.store.root), self.store.lock(lock_name, on_wait=wait):
            outcome = self._from_store(step, parts)
            if outcome is None:
                outcome = self._build(step, parts, inputs, on_progress)
        with self._lock:
            self.outcomes[step] = outcome
        self._display.finished(outcome)
        return outcome

    def finish(self) -> None:
        """Add MLflow run ids to the records of new artifacts, after the tracker is closed."""
        for step, record in self._records.items():
            links = {**record.links, "mlflow_run_id": self.tracker.pipeline_run_id}
            if step.stage.is_training:
                links["mlflow_model_run_id"] = self.tracker.model_run_id(step.name)
            self.store.remember(replace(record, links=links))
            self.outcomes[step] = replace(self.outcomes[step], links=links)
        self.store.sweep()

    def _raise_if_stopping(self, step: PipelineStep) -> None:
        if self._should_stop():
            raise Interrupted(f"{step.name} was not started: the run was stopped")

    def _from_store(self, step: PipelineStep, parts: KeyParts) -> Outcome | None:
        if self._selection.is_forced(step.stage):
            return None
        hit = self.store.find(parts)
        reason = "unchanged"
        if hit is None and step.stage.name in self._selection.reuse:
            hit, reason = self._declare_reused(parts), "reused by --reuse"
        if hit is None:
            return None
        record, artifact = hit
        outcome = _outcome(step, parts, artifact, "cached", reason, 0.0, record.links)
        self.tracker.log(cached_event(outcome))
        return outcome

    def _declare_reused(self, parts: KeyParts) -> tuple[KeyRecord, Artifact] | None:
        """Record the newest artifact that differs in code or libraries alone under this key too."""
        old = reusable(parts, self.store)
        if old is None:
            return None
        self.store.remember(replace(old, key=parts.key, parts=parts, reused_from=old.key))
        return self.store.find(parts)

    def _build(
        self,
        step: PipelineStep,
        parts: KeyParts,
        inputs: Mapping[str, Outcome],
        on_progress: Callable[[Progress], None] | None,
    ) -> Outcome:
        is_forced = self._selection.is_forced(step.stage)
        reason = "requested (--force or --from)" if is_forced else explain(parts, self.store)
        if step.stage.is_training:
            _refuse_long_prompts(self.config, inputs)
        folder = self.store.staging(parts)
        job = self._job(step, parts, inputs, folder)
        self._display.started(step.name, reason)
        started_at = time.monotonic()
        stage, role = parts.stage, str(step.role)
        self.tracker.log(
            StageStarted(stage=stage, role=role, key=parts.key, tags={"reason": reason})
        )
        if step.stage.is_training:
            self._start_model_run(step, parts, job.work)

        def progressed(progress: Progress) -> None:
            self._display.progressed(step.name, progress)
            if on_progress is not None:
                on_progress(progress)

        try:
            if not is_finished(job.out):  # else an earlier run was killed before publishing
                launch(
                    job,
                    folder,
                    is_training=step.stage.is_training,
                    on_progress=progressed,
                    should_stop=self._should_stop,
                    on_restart=lambda why: self._display.restarted(step.name, why),
                )
            # Shards share files with the artifact by hard links: removing them later would change
            # the stamps that `publish` takes.
            for name in ("checkpoints", "shards"):
                shutil.rmtree(job.work / name, ignore_errors=True)
            artifact = self.store.publish(parts, job.out)
        except BaseException as error:
            seconds = time.monotonic() - started_at
            status = "FAILED" if isinstance(error, Exception) else "KILLED"
            self.tracker.log(StageFinished(stage=stage, role=role, seconds=seconds, status=status))
            if step.stage.is_training:
                self.tracker.log(ModelFinished(stage=stage, role=role, status=status))
            raise
        seconds = time.monotonic() - started_at
        return self._remember(step, parts, artifact, reason, seconds)

    def _remember(
        self,
        step: PipelineStep,
        parts: KeyParts,
        artifact: Artifact,
        reason: str,
        seconds: float,
    ) -> Outcome:
        """Write the key's record and log the end of the stage."""
        record = KeyRecord(
            key=parts.key,
            parts=parts,
            digest=artifact.digest,
            seconds=round(seconds, 3),
            made_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            links=self._links,
        )
        self.store.remember(record)
        self._records[step] = record
        stage, content, summary = parts.stage, artifact.digest, artifact.summary
        role = str(step.role)
        self.tracker.log(
            StageFinished(stage=stage, role=role, seconds=seconds, digest=content, summary=summary)
        )
        if step.stage.is_training:
            folder = str(artifact.path)
            self.tracker.log(
                ModelFinished(
                    stage=stage, role=role, digest=content, folder=folder, summary=summary
                )
            )
        return _outcome(step, parts, artifact, "built", reason, seconds, self._links)

    def _job(
        self, step: PipelineStep, parts: KeyParts, inputs: Mapping[str, Outcome], folder: Path
    ) -> Job:
        return Job(
            stage=parts.stage,
            role=str(step.role),
            settings=section_of(step, self.config),
            seed=self.config.seed,
            inputs={name: outcome.path for name, outcome in inputs.items()},
            input_digests=parts.inputs,
            code=parts.code,
            runtime=self.config.runtime,
            out=folder / "out",
            work=folder / "work",
        )

    def _start_model_run(self, step: PipelineStep, parts: KeyParts, work: Path) -> None:
        """Log the start of training: the settings of all stages up to it, and its data."""
        with contextlib.suppress(OSError):  # `launch` reports it
            work.mkdir(parents=True, exist_ok=True)
        dependencies = _all_inputs(step)
        sections = {dependency.stage.name for dependency in dependencies} | {parts.stage}
        settings = {
            key: value
            for key, value in flatten(self.config).items()
            if key.split(".")[0] in sections | {"name", "seed"}
        }
        data = [self.outcomes[known] for known in dependencies if known.stage in (CLEAN, PACK)]
        self.tracker.log(
            ModelStarted(
                stage=parts.stage,
                role=str(step.role),
                key=parts.key,
                settings=settings,
                datasets=[Dataset(name=o.name, digest=o.digest, path=o.path) for o in data],
                work_folder=str(work),
                links=self._links,
            )
        )


def cached_outcome(item: PlannedStep, store: ArtifactStore) -> Outcome:
    """Return the outcome of a step that a plan found cached."""
    record = item.record
    if record is None:
        raise ValueError(f"{item.step.name} is not cached")
    artifact = load_artifact(store.folder(record.parts.stage, record.digest))
    return _outcome(item.step, record.parts, artifact, "cached", item.reason, 0.0, record.links)


def cached_event(outcome: Outcome) -> StageCached:
    """Return the tracking event of a cached step."""
    return StageCached(
        stage=outcome.stage,
        role=outcome.role,
        digest=outcome.digest,
        run_id=outcome.links.get("mlflow_run_id", ""),
    )


def log_cached_run(
    config: RunConfig,
    store: ArtifactStore,
    outcomes: Sequence[Outcome],
    name: str,
    links: Mapping[str, str],
) -> None:
    """Log a run whose steps are all cached, so that a sweep lists and tags it like its others."""
    tracker = Tracker(config, store.root)
    project, settings = config.runtime.project, flatten(config)
    tracker.log(PipelineStarted(project=project, name=name, settings=settings, links=links))
    for outcome in outcomes:
        tracker.log(cached_event(outcome))
    tracker.close()


def _refuse_long_prompts(config: RunConfig, inputs: Mapping[str, Outcome]) -> None:
    """Raise before training, rather than after, for prompts that evaluation cannot use."""
    from llm.evaluation.prompts import encode_prompts  # imports numpy and tokenizers
    from llm.tokenizer.load import load_tokenizer

    folder = inputs["tokenizer" if "tokenizer" in inputs else STARTING_MODEL].path
    encode_prompts(config.evaluate.prompts, load_tokenizer(Path(folder)), config.pack.seq_len)


def _all_inputs(step: PipelineStep) -> Sequence[PipelineStep]:
    found: dict[PipelineStep, None] = {}
    for dependency in step.inputs.values():
        found |= dict.fromkeys(_all_inputs(dependency)) | {dependency: None}
    return list(found)


def _outcome(
    step: PipelineStep,
    parts: KeyParts,
    artifact: Artifact,
    status: Literal["built", "cached"],
    reason: str,
    seconds: float,
    links: Mapping[str, str],
) -> Outcome:
    return Outcome(
        stage=parts.stage,
        role=str(step.role),
        key=parts.key,
        digest=artifact.digest,
        status=status,
        reason=reason,
        seconds=round(seconds, 3),
        path=str(artifact.path),
        summary=artifact.summary,
        links=links,
    )
