"""What a run would do, and why, before anything is done: every step cached or to build."""

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from llm.artifact import Json, canonical
from llm.config import CleanConfig, MixtureConfig, RunConfig, ShareConfig, SourceConfig, flatten
from llm.data.sources.fingerprint import fingerprint
from llm.errors import ArtifactError, ConfigError
from llm.models import MODELS
from llm.runtime.code import code_digests
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
from tasks.store import KeyParts, KeyRecord, Store, library_versions

PLACES = ("path", "url")  # where a source's bytes lie; the bytes count, by its fingerprint
UNKNOWN = ""  # digest of an input that is yet to be built


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What the user asked for beyond the recipe: stage names of `--only`, `--from` and so on."""

    only: str = ""
    """Build this stage alone; what it needs must be there."""
    start_from: str = ""
    """Build this stage and all that follow, even if cached."""
    force: Collection[str] = ()
    """Build these even if cached."""
    reuse: Collection[str] = ()
    """Take the newest artifact of these as if changed code had made it."""

    def __post_init__(self) -> None:
        """Refuse names that are no stage."""
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
        """Tell whether a stage is built even if it is cached."""
        names = [known.name for known in all_stages()]
        comes_later = bool(self.start_from) and names.index(stage.name) >= names.index(
            self.start_from
        )
        return stage.name in self.force or comes_later

    def takes(self, steps: Sequence[PipelineStep]) -> list[PipelineStep]:
        """Return the steps of a run: all, or with `--only` one stage and what it needs."""
        if not self.only:
            return list(steps)
        needed: dict[PipelineStep, None] = {}
        for step in steps:
            if step.stage.name == self.only:
                _add_with_inputs(step, needed)
        return [step for step in steps if step in needed]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedStep:
    """One step of a plan. `digest` is that of its artifact, or UNKNOWN before it is built."""

    step: PipelineStep
    status: Literal["cached", "build"]
    reason: str
    digest: str = UNKNOWN
    record: KeyRecord | None = None
    note: str = ""
    """What a hit does not say: made by another torch, declared by --reuse."""


def make_plan(
    steps: Sequence[PipelineStep], config: RunConfig, store: Store, selection: Selection
) -> list[PlannedStep]:
    """Say of every step whether it is cached, or why it is to be built. Changes nothing on disk.

    Raises:
        ArtifactError: `--only` names a stage whose inputs are not all there.
        DataError: a source's files are not there.
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
    """Return a step's settings as plain JSON: its section, or its part of `download`."""
    if step.stage is DOWNLOAD:
        return _fields(SourceConfig, source_of(step, config))
    settings = _clean(config) if step.stage is CLEAN else getattr(config, step.stage.name)
    section = cast(dict[str, Json], canonical(settings, step.stage.name))
    if step.stage is PACK:
        mixture: MixtureConfig = getattr(config.download, step.role)
        section["shares"] = [_fields(ShareConfig, source) for source in mixture.sources]
    return section


def source_of(step: PipelineStep, config: RunConfig) -> SourceConfig:
    """Return the source of a download, by its place: `corpus`, or `chats.sources.1`."""
    role, _, index = step.role.partition(".sources.")
    mixture: MixtureConfig = getattr(config.download, role)
    return mixture.sources[int(index)] if index else mixture


def key_parts(
    step: PipelineStep, config: RunConfig, input_digests: Mapping[str, str], store: Store
) -> KeyParts:
    """Return all that decides the bytes of `step`. A download's input is what its source gives."""
    stage = step.stage
    settings = section_of(step, config)
    inputs = dict(input_digests)
    if stage is DOWNLOAD:
        source = source_of(step, config)
        settings = {name: value for name, value in settings.items() if name not in PLACES}
        inputs = {"source": fingerprint(source, step.role, store.root / "sources.json")}
    libraries = list(stage.libraries)
    if stage is TRAIN_TOKENIZER:
        del settings["path"]  # its files have one sha256 wherever they lie
    if "tokenizers" in libraries and config.train_tokenizer.kind == "sentencepiece":
        libraries.append("sentencepiece")
    return KeyParts(
        stage=stage.name,
        role=step.role,
        settings=settings,
        seed=config.seed if stage.has_seed else None,
        inputs=inputs,
        libraries=library_versions(libraries),
        code=code_digests(stage.name),
    )


def explain(parts: KeyParts, store: Store) -> str:
    """Say why nothing is cached for `parts`: how they differ from the nearest that was built."""
    record = store.record(parts.stage, parts.key)
    if record is not None:
        return store.damage(record) or "its artifact was damaged and set aside"
    nearest: list[str] | None = None
    for record in store.records(parts.stage):
        if record.parts.role == parts.role:
            found = list(differences(record.parts, parts))
            if nearest is None or len(found) < len(nearest):
                nearest = found
    return "never built" if nearest is None else "; ".join(nearest)


def differences(before: KeyParts, now: KeyParts) -> Iterator[str]:
    """Yield each difference between two keys' parts in the user's words."""
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
            yield f"input {name} is to be built"
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


def reusable(parts: KeyParts, store: Store) -> KeyRecord | None:
    """Return the newest record that differs from `parts` in code or library versions only."""
    for record in store.records(parts.stage):
        old = record.parts
        if (old.role, old.settings, old.seed, old.inputs) == (
            parts.role,
            parts.settings,
            parts.seed,
            parts.inputs,
        ) and store.find(old):
            return record
    return None


def _plan_step(
    step: PipelineStep,
    config: RunConfig,
    store: Store,
    selection: Selection,
    planned: Mapping[PipelineStep, PlannedStep],
) -> PlannedStep:
    inputs = {name: planned[made_first].digest for name, made_first in step.inputs.items()}
    parts = key_parts(step, config, inputs, store)
    if UNKNOWN in inputs.values():
        return PlannedStep(step=step, status="build", reason=_first_reason(parts, store))
    if selection.is_forced(step.stage):
        return PlannedStep(step=step, status="build", reason="asked for (--force or --from)")
    record = store.record(parts.stage, parts.key)
    if record is not None and not store.damage(record):
        return PlannedStep(
            step=step,
            status="cached",
            reason="unchanged",
            digest=record.digest,
            record=record,
            note=_note(record, store),
        )
    if step.stage.name in selection.reuse and (record := reusable(parts, store)) is not None:
        reason = f"reused from {record.key[:8]} by --reuse"
        return PlannedStep(
            step=step, status="cached", reason=reason, digest=record.digest, record=record
        )
    return PlannedStep(step=step, status="build", reason=explain(parts, store))


def _first_reason(parts: KeyParts, store: Store) -> str:
    """Explain a step some of whose inputs are yet to be built."""
    unknown = [name for name, content in parts.inputs.items() if content == UNKNOWN]
    reason = explain(parts, store)
    return f"input {', '.join(unknown)} is to be built" if reason == "never built" else reason


def _note(record: KeyRecord, store: Store) -> str:
    """Say what is worth knowing of a hit."""
    notes = ["declared unchanged by --reuse"] if record.reused_from else []
    manifest = store.folder(record.parts.stage, record.digest) / "manifest.json"
    versions = json.loads(manifest.read_bytes())["provenance"].get("versions", {})
    if record.parts.stage in (*MODELS, EVALUATE.name) and "torch" in versions:
        now = library_versions(["torch"])["torch"]
        if versions["torch"] != now:
            notes.append(f"made with torch {versions['torch']}, here is {now}")
    return "; ".join(notes)


def _clean(config: RunConfig) -> CleanConfig:
    """Return the section `clean`, the prompts of `evaluate` among what is kept out of training."""
    decontamination = config.clean.decontamination
    if decontamination.action == "none":
        return config.clean
    prompts = [  # a word has a character: what is shorter than an n-gram cannot be found
        prompt for prompt in config.evaluate.prompts if len(prompt) >= decontamination.ngram_words
    ]
    decontamination = dataclasses.replace(decontamination, texts=(*decontamination.texts, *prompts))
    return dataclasses.replace(config.clean, decontamination=decontamination)


def _fields(kind: type, section: object) -> dict[str, Json]:
    """Return those settings of a section that `kind` has."""
    names = [known.name for known in dataclasses.fields(kind)]
    return {name: canonical(getattr(section, name), name) for name in names}


def _shown(value: object) -> str:
    return "none" if value is None else str(value)


def _add_with_inputs(step: PipelineStep, found: dict[PipelineStep, None]) -> None:
    for made_first in step.inputs.values():
        _add_with_inputs(made_first, found)
    found.setdefault(step)
