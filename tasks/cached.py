"""How a step becomes a cached, tracked artifact: key -> verified hit, or build and publish."""

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
from tasks.stages import PipelineStep
from tasks.store import KeyParts, KeyRecord, Store
from tasks.tracking.tracker import Dataset, Tracker


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of one step: small, so that it can pass between tasks in place of data."""

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
    """Ids of the runs that made it: `mlflow_run_id`, `mlflow_model_run_id`, `prefect_run_id`."""

    @property
    def name(self) -> str:
        """What people call it: `pack corpus`, `pretrain`."""
        return f"{self.stage} {self.role}".strip()


class Display(Protocol):
    """Shows a person how a run goes. Called from several threads."""

    def started(self, name: str, reason: str) -> None:
        """A step is being built, for this reason."""

    def waits(self, name: str) -> None:
        """Another run is building the same artifact; this one waits for it."""

    def progressed(self, name: str, progress: Progress) -> None:
        """A step went on."""

    def restarted(self, name: str, why: str) -> None:
        """A step's process was killed or hung, and is started again."""

    def finished(self, outcome: Outcome) -> None:
        """A step is built or was cached."""


class Builder:
    """Builds the steps of one run, each once, or takes them from the store."""

    def __init__(
        self,
        config: RunConfig,
        store: Store,
        *,
        tracker: Tracker,
        display: Display,
        selection: Selection | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        links: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare to build with one resolved recipe. `links` names the Prefect run, say."""
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
        """Return the outcome of `step`, whose inputs were built by this builder before.

        Raises:
            Interrupted, StageError, DataError: as `launch` does. DiskFullError: here or there.
            ConfigError: before a training, a prompt of `evaluate` that is longer than the context.
        """
        inputs = {name: self.outcomes[made_first] for name, made_first in step.inputs.items()}
        digests = {name: outcome.digest for name, outcome in inputs.items()}
        parts = key_parts(step, self.config, digests, self.store)
        lock_name = f"{parts.stage}-{parts.key}"
        say_once = _once(lambda: self._display.waits(step.name))

        def wait() -> None:
            say_once()
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
        """After the tracker is closed: note in which runs the new artifacts are to be seen."""
        for step, record in self._records.items():
            links = {**record.links, "mlflow_run_id": self.tracker.pipeline_run_id}
            if step.stage.is_training:
                links["mlflow_model_run_id"] = self.tracker.model_run_id(step.stage.name)
            self.store.remember(replace(record, links=links))
            self.outcomes[step] = replace(self.outcomes[step], links=links)
        self.store.sweep()

    def _raise_if_stopping(self, step: PipelineStep) -> None:
        if self._should_stop():
            raise Interrupted(f"{step.name} was not begun: the run was stopped")

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
        outcome = _outcome(parts, artifact, "cached", reason, 0.0, record.links)
        run_id = record.links.get("mlflow_run_id", "")
        self.tracker.stage_cached(parts.stage, parts.role, artifact.digest, run_id)
        return outcome

    def _declare_reused(self, parts: KeyParts) -> tuple[KeyRecord, Artifact] | None:
        """File the newest artifact that differs in code alone under this key too, saying so."""
        old = reusable(parts, self.store)
        if old is None:
            return None
        self.store.remember(
            KeyRecord(
                key=parts.key,
                parts=parts,
                digest=old.digest,
                seconds=old.seconds,
                made_at=old.made_at,
                reused_from=old.key,
                links=old.links,
            )
        )
        return self.store.find(parts)

    def _build(
        self,
        step: PipelineStep,
        parts: KeyParts,
        inputs: Mapping[str, Outcome],
        on_progress: Callable[[Progress], None] | None,
    ) -> Outcome:
        is_forced = self._selection.is_forced(step.stage)
        reason = "asked for (--force or --from)" if is_forced else explain(parts, self.store)
        if step.stage.is_training:
            _refuse_long_prompts(self.config, inputs)
        folder = self.store.staging(parts)
        job = self._job(step, parts, inputs, folder)
        self._display.started(step.name, reason)
        started_at = time.monotonic()
        self.tracker.stage_started(parts.stage, parts.role, parts.key, {"reason": reason})
        if step.stage.is_training:
            self._start_model_run(step, parts, job.work)

        def progressed(progress: Progress) -> None:
            self._display.progressed(step.name, progress)
            if on_progress is not None:
                on_progress(progress)

        try:
            if not is_finished(job.out):  # a parent killed before it could publish leaves one
                launch(
                    job,
                    folder,
                    is_training=step.stage.is_training,
                    on_progress=progressed,
                    should_stop=self._should_stop,
                    on_restart=lambda why: self._display.restarted(step.name, why),
                )
            # They share files with the artifact, whose stamps are taken when it is published.
            for name in ("checkpoints", "shards"):
                shutil.rmtree(job.work / name, ignore_errors=True)
            artifact = self.store.publish(parts, job.out)
        except BaseException as error:
            seconds = time.monotonic() - started_at
            status = "FAILED" if isinstance(error, Exception) else "KILLED"
            self.tracker.stage_finished(parts.stage, parts.role, "", seconds, {}, status)
            if step.stage.is_training:
                self.tracker.model_interrupted(parts.stage, status)
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
        """Write the key's record and tell the tracker."""
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
        self.tracker.stage_finished(
            parts.stage, parts.role, artifact.digest, seconds, artifact.summary, "FINISHED"
        )
        if step.stage.is_training:
            self.tracker.model_finished(
                parts.stage, artifact.digest, artifact.path, artifact.summary, "FINISHED"
            )
        return _outcome(parts, artifact, "built", reason, seconds, self._links)

    def _job(
        self, step: PipelineStep, parts: KeyParts, inputs: Mapping[str, Outcome], folder: Path
    ) -> Job:
        return Job(
            stage=parts.stage,
            role=parts.role,
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
        """Begin the model's run: every setting from the corpus on, and its data."""
        made_from = _all_inputs(step)
        sections = {made_first.stage.name for made_first in made_from} | {parts.stage}
        settings = {
            key: value
            for key, value in flatten(self.config).items()
            if key.split(".")[0] in sections | {"name", "seed"}
        }
        datasets: list[Dataset] = []
        for made_first in made_from:
            if made_first.stage.name in ("clean", "pack"):
                outcome = self.outcomes[made_first]
                datasets.append(
                    Dataset(
                        name=made_first.name,
                        digest=outcome.digest,
                        path=outcome.path,
                        context="training",
                    )
                )
        self.tracker.model_started(
            parts.stage, parts.key, settings, datasets, work, dict(self._links)
        )


def cached_outcome(item: PlannedStep, store: Store) -> Outcome:
    """Return the outcome of a step that a plan found cached."""
    record = item.record
    if record is None:
        raise ValueError(f"{item.step.name} is not cached")
    artifact = load_artifact(store.folder(record.parts.stage, record.digest))
    return _outcome(record.parts, artifact, "cached", item.reason, 0.0, record.links)


def _refuse_long_prompts(config: RunConfig, inputs: Mapping[str, Outcome]) -> None:
    """Raise now, rather than after a training, for prompts that the evaluation could not use."""
    from llm.evaluation.prompts import encode_prompts  # brings numpy and tokenizers
    from llm.tokenizer.load import load_tokenizer

    folder = inputs["tokenizer" if "tokenizer" in inputs else STARTING_MODEL].path
    encode_prompts(config.evaluate.prompts, load_tokenizer(Path(folder)), config.pack.seq_len)


def _all_inputs(step: PipelineStep) -> Sequence[PipelineStep]:
    found: dict[PipelineStep, None] = {}
    for made_first in step.inputs.values():
        found |= dict.fromkeys(_all_inputs(made_first)) | {made_first: None}
    return list(found)


def _outcome(
    parts: KeyParts,
    artifact: Artifact,
    status: Literal["built", "cached"],
    reason: str,
    seconds: float,
    links: Mapping[str, str],
) -> Outcome:
    return Outcome(
        stage=parts.stage,
        role=parts.role,
        key=parts.key,
        digest=artifact.digest,
        status=status,
        reason=reason,
        seconds=round(seconds, 3),
        path=str(artifact.path),
        summary=artifact.summary,
        links=links,
    )


def _once(function: Callable[[], None]) -> Callable[[], None]:
    """Return a function that calls `function` the first time only."""
    calls: list[None] = []

    def call() -> None:
        if not calls:
            calls.append(None)
            function()

    return call
