"""Plan a run: for every step, whether it is cached or why it has to be built."""

import dataclasses
import itertools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from llm.artifact import Json, canonical
from llm.config import (
    AlignConfig,
    CleanConfig,
    FinetuneConfig,
    RunConfig,
    ShareConfig,
    SourceConfig,
    flatten,
    mixture_of,
)
from llm.data.sources.detected_format import detected_format
from llm.data.sources.fingerprint import fingerprint
from llm.errors import ArtifactError, ConfigError
from llm.models import MODELS, Training, trainings
from llm.runtime.code import code_digests
from llm.tokenizer.kinds import TOKENIZER_KINDS
from llm.training.rewards import source_digests
from tasks.stages import (
    CLEAN,
    DOWNLOAD,
    EVALUATE,
    PACK,
    TRAIN_TOKENIZER,
    PipelineStep,
    Stage,
    all_stages,
)
from tasks.store import ArtifactStore, KeyParts, KeyRecord, library_versions

LOCATIONS = ("path", "url")  # not in the key, which has the fingerprint of the source's bytes
TUNING = {"finetune": FinetuneConfig, "align": AlignConfig}
"""Stages with one or several trainings, and the settings of one."""
UNKNOWN = ""  # digest of an input that is not built yet


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Stage names given with `--only`, `--from`, `--force` and `--reuse`."""

    only: str = ""
    """Build this stage alone; its inputs must exist."""
    start_from: str = ""
    """Build this stage and all later ones, even if cached."""
    force: Collection[str] = ()
    """Build these stages even if cached."""
    reuse: Collection[str] = ()
    """Use the newest artifacts of these stages although code or libraries changed."""

    def __post_init__(self) -> None:
        """Raise ConfigError for unknown stages."""
        known = [stage.name for stage in all_stages()]
        given = {"--only": [self.only], "--from": [self.start_from]}
        given |= {"--force": list(self.force), "--reuse": list(self.reuse)}
        problems = [
            f"{option} {name}: no such stage; the stages are {', '.join(known)}"
            for option, names in given.items()
            for name in names
            if name and name not in known
        ]
        if problems:
            raise ConfigError("\n".join(problems))

    def is_forced(self, stage: Stage) -> bool:
        """Tell whether a stage is built even if cached."""
        later = itertools.dropwhile(lambda known: known.name != self.start_from, all_stages())
        return stage.name in self.force or stage in later

    def takes(self, steps: Sequence[PipelineStep]) -> list[PipelineStep]:
        """Return the steps of a run: all, or with `--only` one stage and its dependencies."""
        if not self.only:
            return list(steps)
        needed: dict[PipelineStep, None] = {}
        for step in steps:
            if step.stage.name == self.only:
                _add_with_inputs(step, needed)
        return [step for step in steps if step in needed]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedStep:
    """One step of a plan. `digest` is its artifact's, or UNKNOWN before it is built."""

    step: PipelineStep
    status: Literal["cached", "build"]
    reason: str
    digest: str = UNKNOWN
    record: KeyRecord | None = None
    note: str = ""
    """A remark: built with another torch, declared by --reuse, the format of local records."""


def make_plan(
    steps: Sequence[PipelineStep], config: RunConfig, store: ArtifactStore, selection: Selection
) -> list[PlannedStep]:
    """Decide for every step whether it is cached or has to be built. Changes nothing on disk.

    Raises:
        ArtifactError: `--only` names a stage whose inputs are not all built.
        DataError: a source's files are missing, or its records have no known format.
    """
    planned: dict[PipelineStep, PlannedStep] = {}
    for step in selection.takes(steps):
        planned[step] = _plan_step(step, config, store, selection, planned)
    if selection.only:
        missing = [
            f"  {item.step.name}: {item.reason}"
            for item in planned.values()
            if item.status == "build" and item.step.stage.name != selection.only
        ]
        if missing:
            raise ArtifactError(
                f"--only {selection.only}: its inputs are not all built, run without --only first\n"
                + "\n".join(missing)
            )
    return list(planned.values())


def section_of(step: PipelineStep, config: RunConfig) -> dict[str, Json]:
    """Return a step's settings as plain JSON: its section of the recipe, or its source."""
    if step.stage is DOWNLOAD:
        return _fields(SourceConfig, source_of(step, config))
    if step.stage.name in TUNING:
        return _fields(TUNING[step.stage.name], training_of(step, config).settings)
    settings = _clean(config) if step.stage is CLEAN else getattr(config, step.stage.name)
    section = cast(dict[str, Json], canonical(settings, step.stage.name))
    if step.stage is PACK:
        sources = mixture_of(config.download, step.role.name).sources
        section["shares"] = [_fields(ShareConfig, source) for source in sources]
    if step.stage is EVALUATE:
        section["models"] = [training.model_name for training in trainings(config)]
    return section


def training_of(step: PipelineStep, config: RunConfig) -> Training:
    """Return the training of a step."""
    [found] = [
        training
        for training in trainings(config)
        if (training.stage, training.role) == (step.stage.name, step.role.name)
    ]
    return found


def source_of(step: PipelineStep, config: RunConfig) -> SourceConfig:
    """Return the source of a download step."""
    mixture = mixture_of(config.download, step.role.name)
    return mixture if step.role.source is None else mixture.sources[step.role.source]


def key_parts(
    step: PipelineStep, config: RunConfig, input_digests: Mapping[str, str], store: ArtifactStore
) -> KeyParts:
    """Return the key parts of `step`. The input of a download is its source's fingerprint."""
    stage = step.stage
    settings = section_of(step, config)
    inputs = dict(input_digests)
    if stage is DOWNLOAD:
        source = source_of(step, config)
        settings = {name: value for name, value in settings.items() if name not in LOCATIONS}
        inputs = {"source": fingerprint(source, str(step.role), store.root / "sources.json")}
    libraries = list(stage.libraries)
    if stage is TRAIN_TOKENIZER:
        del settings["path"]  # the sha256 of the files counts instead
    library = TOKENIZER_KINDS[config.train_tokenizer.kind].library
    if "tokenizers" in libraries and library:
        libraries.append(library)
    return KeyParts(
        stage=stage.name,
        role="" if stage.is_training else str(step.role),  # a model's name decides no bytes
        settings=settings,
        seed=config.seed if stage.has_seed else None,
        inputs=inputs,
        libraries=library_versions(libraries) | _own_code(step, config),
        code=code_digests(stage.name),
    )


def _own_code(step: PipelineStep, config: RunConfig) -> dict[str, str]:
    """Return the digests of the user's modules that a step calls, by name."""
    if step.stage.name not in TUNING:
        return {}
    settings = training_of(step, config).settings
    if not isinstance(settings, AlignConfig) or settings.method != "grpo":
        return {}
    return source_digests(settings.grpo.rewards)


def explain(parts: KeyParts, store: ArtifactStore) -> str:
    """Return why `parts` is not cached: the differences to the most similar built artifact."""
    record = store.record(parts.stage, parts.key)
    if record is not None:
        return store.damage(record) or "its artifact was damaged and set aside"
    nearest: list[str] | None = None
    for record in store.records(parts.stage):
        if record.parts.role == parts.role:
            found = list(key_differences(record.parts, parts))
            if nearest is None or len(found) < len(nearest):
                nearest = found
    return "never built" if nearest is None else "; ".join(nearest)


def key_differences(before: KeyParts, now: KeyParts) -> Iterator[str]:
    """Yield each difference between the parts of two keys, for people."""
    prefix = f"{now.stage}.{now.role}" if now.stage == "download" else now.stage
    old, new = flatten(before.settings, prefix), flatten(now.settings, prefix)
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            yield f"{name}: {_shown(old.get(name))} -> {_shown(new.get(name))}"
    if before.seed != now.seed:
        yield f"seed: {before.seed} -> {now.seed}"
    for name in sorted(before.inputs.keys() | now.inputs.keys()):
        was, is_now = before.inputs.get(name, ""), now.inputs.get(name, "")
        if is_now == UNKNOWN:
            yield f"input {name} has to be built"
        elif was != is_now:
            yield f"input {name}: {was[:8] or 'none'} -> {is_now[:8]}"
    for name in sorted(before.libraries.keys() | now.libraries.keys()):
        if before.libraries.get(name) != now.libraries.get(name):
            yield f"{name} {before.libraries.get(name)} -> {now.libraries.get(name)}"
    changed = sorted(
        name
        for name in before.code.keys() | now.code.keys()
        if before.code.get(name) != now.code.get(name)
    )
    if changed:
        yield f"code changed in {', '.join(changed)}"


def reusable(parts: KeyParts, store: ArtifactStore) -> KeyRecord | None:
    """Return the newest record that differs from `parts` in code or library versions only."""
    wanted = dataclasses.replace(parts, code={}, libraries={})
    for record in store.records(parts.stage):
        found = dataclasses.replace(record.parts, code={}, libraries={})
        if found == wanted and store.find(record.parts):
            return record
    return None


def _plan_step(
    step: PipelineStep,
    config: RunConfig,
    store: ArtifactStore,
    selection: Selection,
    planned: Mapping[PipelineStep, PlannedStep],
) -> PlannedStep:
    inputs = {name: planned[dependency].digest for name, dependency in step.inputs.items()}
    parts = key_parts(step, config, inputs, store)
    found = None
    if step.stage is DOWNLOAD:
        found = detected_format(source_of(step, config), str(step.role))
    note = f"format {found}" if found else ""
    if UNKNOWN in inputs.values():
        return PlannedStep(step=step, status="build", reason=_first_reason(parts, store))
    if selection.is_forced(step.stage):
        reason = "requested (--force or --from)"
        return PlannedStep(step=step, status="build", reason=reason, note=note)
    record = store.record(parts.stage, parts.key)
    if record is not None and not store.damage(record):
        return PlannedStep(
            step=step,
            status="cached",
            reason="unchanged",
            digest=record.digest,
            record=record,
            note="; ".join(filter(None, (note, _note(record, store)))),
        )
    if step.stage.name in selection.reuse and (record := reusable(parts, store)) is not None:
        reason = f"reused from {record.key[:8]} by --reuse"
        return PlannedStep(
            step=step, status="cached", reason=reason, digest=record.digest, record=record
        )
    return PlannedStep(step=step, status="build", reason=explain(parts, store), note=note)


def _first_reason(parts: KeyParts, store: ArtifactStore) -> str:
    """Return why a step with inputs that are not built yet has to be built."""
    unknown = [name for name, content in parts.inputs.items() if content == UNKNOWN]
    reason = explain(parts, store)
    return f"input {', '.join(unknown)} has to be built" if reason == "never built" else reason


def _note(record: KeyRecord, store: ArtifactStore) -> str:
    """Return a remark on a cached step, or an empty string."""
    notes = ["declared unchanged by --reuse"] if record.reused_from else []
    manifest = store.folder(record.parts.stage, record.digest) / "manifest.json"
    versions = json.loads(manifest.read_bytes())["provenance"].get("versions", {})
    if record.parts.stage in (*MODELS, EVALUATE.name) and "torch" in versions:
        now = library_versions(["torch"])["torch"]
        if versions["torch"] != now:
            notes.append(f"built with torch {versions['torch']}, installed is {now}")
    return "; ".join(notes)


def _clean(config: RunConfig) -> CleanConfig:
    """Return the section `clean` with the prompts of `evaluate` added to its decontamination."""
    decontamination = config.clean.decontamination
    if decontamination.action == "none":
        return config.clean
    prompts = [  # fewer characters than an n-gram has words cannot match
        prompt for prompt in config.evaluate.prompts if len(prompt) >= decontamination.ngram_words
    ]
    decontamination = dataclasses.replace(decontamination, texts=(*decontamination.texts, *prompts))
    return dataclasses.replace(config.clean, decontamination=decontamination)


def _fields(kind: type, section: object) -> dict[str, Json]:
    """Return the settings of a section that are fields of `kind`."""
    names = [known.name for known in dataclasses.fields(kind)]
    return {name: canonical(getattr(section, name), name) for name in names}


def _shown(value: object) -> str:
    return "none" if value is None else str(value)


def _add_with_inputs(step: PipelineStep, found: dict[PipelineStep, None]) -> None:
    for dependency in step.inputs.values():
        _add_with_inputs(dependency, found)
    found.setdefault(step)
