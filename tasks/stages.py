"""Stages and pipeline steps as values, walked alike by planning and by running.

A step knows its inputs, and nothing of where or how it runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llm.config import CleanConfig, DownloadConfig, mixture_of
from llm.models import MODELS, Training, model_name
from llm.role import Role
from llm.runtime.job import STARTING_MODEL


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage: `llm.<name>`, a section of the recipe, and what else decides its bytes."""

    name: str
    has_seed: bool = False
    """Whether the run's seed decides its bytes."""
    libraries: Sequence[str] = ()
    """Libraries whose version decides its bytes. torch is provenance only: its numbers differ by
    machine anyway.
    """
    is_training: bool = False
    """Whether it reports curves; it counts as hung when they stop."""


DOWNLOAD = Stage(name="download")
CLEAN = Stage(name="clean", libraries=("rensa",))
TRAIN_TOKENIZER = Stage(name="train_tokenizer", has_seed=True, libraries=("tokenizers",))
PACK = Stage(name="pack", has_seed=True, libraries=("tokenizers",))
EVALUATE = Stage(name="evaluate", has_seed=True)


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class PipelineStep:
    """One stage in a pipeline, with its inputs by name. Equal only to itself."""

    stage: Stage
    role: Role = field(default_factory=Role)
    inputs: Mapping[str, "PipelineStep"] = field(default_factory=dict[str, "PipelineStep"])

    @property
    def name(self) -> str:
        """What people call it: `pack corpus`, `pretrain`."""
        return step_name(self.stage.name, self.role)


def step_name(stage: str, role: Role | str) -> str:
    """Return a step's display name: `pack corpus`, `pretrain`."""
    return f"{stage} {role}".strip()


def training_stage(name: str) -> Stage:
    """Return the stage that trains a model of `llm.models.MODELS`."""
    return Stage(name=name, has_seed=True, is_training=True)


def all_stages() -> list[Stage]:
    """Return every stage, in the order of a run."""
    return [DOWNLOAD, CLEAN, TRAIN_TOKENIZER, PACK, *map(training_stage, MODELS), EVALUATE]


def download(role: str, settings: DownloadConfig) -> list[PipelineStep]:
    """Fetch the raw files of a dataset, one step per source."""
    mixture = mixture_of(settings, role)
    roles = [Role(role, index) for index in range(len(mixture.sources))]
    return [PipelineStep(stage=DOWNLOAD, role=part) for part in roles or [Role(role)]]


def clean(
    raw: Sequence[PipelineStep], settings: CleanConfig, held_out: PipelineStep | None = None
) -> PipelineStep:
    """Turn raw files into unique documents with ids, split into train and validation.

    `held_out` becomes an input only under decontamination, which drops training documents that
    overlap with its validation documents.
    """
    inputs = {"raw": raw[0]} if len(raw) == 1 else {f"raw_{k}": step for k, step in enumerate(raw)}
    if held_out is not None and settings.decontamination.action != "none":
        inputs["held_out"] = held_out
    return PipelineStep(stage=CLEAN, role=Role(raw[0].role.name), inputs=inputs)


def train_tokenizer(documents: PipelineStep) -> PipelineStep:
    """Learn the vocabulary."""
    return PipelineStep(stage=TRAIN_TOKENIZER, inputs={"documents": documents})


def pack(documents: PipelineStep, tokenizer: PipelineStep) -> PipelineStep:
    """Pack documents into sequences of tokens."""
    return PipelineStep(
        stage=PACK, role=documents.role, inputs={"documents": documents, "tokenizer": tokenizer}
    )


def pretrain(sequences: PipelineStep, tokenizer: PipelineStep) -> PipelineStep:
    """Train the first model from random weights."""
    first = next(iter(MODELS))
    return PipelineStep(
        stage=training_stage(first), inputs={"sequences": sequences, "tokenizer": tokenizer}
    )


def train_further(
    training: Training, model: PipelineStep, sequences: PipelineStep, replayed: PipelineStep
) -> PipelineStep:
    """Continue training `model` on `sequences`, and on `replayed` where the settings say so."""
    inputs = {STARTING_MODEL: model, "sequences": sequences}
    if getattr(training.settings, "replay_fraction", 0):
        inputs["replay_sequences"] = replayed
    return PipelineStep(
        stage=training_stage(training.stage), role=Role(training.role), inputs=inputs
    )


def evaluate(
    models: Sequence[PipelineStep], sequences: Mapping[str, PipelineStep], tokenizer: PipelineStep
) -> PipelineStep:
    """Measure all models side by side and write the report."""
    inputs = {model_name(model.stage.name, model.role.name): model for model in models}
    inputs |= {"text_sequences": sequences["corpus"], "chat_sequences": sequences["chats"]}
    return PipelineStep(stage=EVALUATE, inputs=inputs | {"tokenizer": tokenizer})


def in_order(last: PipelineStep) -> list[PipelineStep]:
    """Return `last` and every step it needs, each after its inputs, in the order of stages."""
    found: dict[PipelineStep, None] = {}

    def visit(step: PipelineStep) -> None:
        for dependency in step.inputs.values():
            visit(dependency)
        found.setdefault(step)

    visit(last)
    order = all_stages()
    return sorted(found, key=lambda step: order.index(step.stage))
