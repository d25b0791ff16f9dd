"""The seven stages as values: what each is made from.

A step knows its inputs, and nothing of where or how it runs: planning and running walk the same
steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llm.config import CleanConfig, DownloadConfig, MixtureConfig
from llm.role import Role


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage: `llm.<name>`, its section in the recipe, and what else decides its bytes."""

    name: str
    has_seed: bool = False
    """Whether the run's seed decides its bytes."""
    libraries: Sequence[str] = ()
    """Libraries whose version decides its bytes; torch is provenance, its numbers differ anyway."""
    is_training: bool = False
    """Whether it reports curves, and is taken for hung when these stop."""


DOWNLOAD = Stage(name="download")
CLEAN = Stage(name="clean", libraries=("rensa",))
TRAIN_TOKENIZER = Stage(name="train_tokenizer", has_seed=True, libraries=("tokenizers",))
PACK = Stage(name="pack", has_seed=True, libraries=("tokenizers",))
PRETRAIN = Stage(name="pretrain", has_seed=True, is_training=True)
FINETUNE = Stage(name="finetune", has_seed=True, is_training=True)
EVALUATE = Stage(name="evaluate", has_seed=True)
STAGES = (DOWNLOAD, CLEAN, TRAIN_TOKENIZER, PACK, PRETRAIN, FINETUNE, EVALUATE)


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class PipelineStep:
    """One stage at its place in a pipeline: what it is made from, by name. Equal only to itself."""

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


def download(role: str, settings: DownloadConfig) -> list[PipelineStep]:
    """Fetch the raw files of `download.corpus` or `download.chats`, each of its sources alone."""
    mixture: MixtureConfig = getattr(settings, role)
    roles = [Role(role, index) for index in range(len(mixture.sources))]
    return [PipelineStep(stage=DOWNLOAD, role=part) for part in roles or [Role(role)]]


def clean(
    raw: Sequence[PipelineStep], settings: CleanConfig, held_out: PipelineStep | None = None
) -> PipelineStep:
    """Turn raw files into documents with ids, each once, split into train and validation.

    Where training documents are read for what models are measured on, `held_out`, other documents,
    has a validation side of it; elsewhere it is no input.
    """
    inputs = {"raw": raw[0]} if len(raw) == 1 else {f"raw_{k}": step for k, step in enumerate(raw)}
    if held_out is not None and settings.decontamination.action != "none":
        inputs["held_out"] = held_out
    return PipelineStep(stage=CLEAN, role=Role(raw[0].role.name), inputs=inputs)


def train_tokenizer(documents: PipelineStep) -> PipelineStep:
    """Learn the vocabulary."""
    return PipelineStep(stage=TRAIN_TOKENIZER, inputs={"documents": documents})


def pack(documents: PipelineStep, tokenizer: PipelineStep) -> PipelineStep:
    """Cut documents into rows of tokens."""
    return PipelineStep(
        stage=PACK, role=documents.role, inputs={"documents": documents, "tokenizer": tokenizer}
    )


def pretrain(rows: PipelineStep, tokenizer: PipelineStep) -> PipelineStep:
    """Train the base model on rows of text."""
    return PipelineStep(stage=PRETRAIN, inputs={"sequences": rows, "tokenizer": tokenizer})


def finetune(base: PipelineStep, rows: PipelineStep) -> PipelineStep:
    """Train the chat model from the base model on rows of chats."""
    return PipelineStep(stage=FINETUNE, inputs={"base": base, "sequences": rows})


def evaluate(
    base: PipelineStep,
    chat: PipelineStep,
    text_sequences: PipelineStep,
    chat_sequences: PipelineStep,
    tokenizer: PipelineStep,
) -> PipelineStep:
    """Measure both models side by side and write the report."""
    return PipelineStep(
        stage=EVALUATE,
        inputs={
            "base": base,
            "chat": chat,
            "text_sequences": text_sequences,
            "chat_sequences": chat_sequences,
            "tokenizer": tokenizer,
        },
    )


def in_order(last: PipelineStep) -> list[PipelineStep]:
    """Return every step `last` needs, and itself, each after its inputs, as in STAGES."""
    found: dict[PipelineStep, None] = {}

    def visit(step: PipelineStep) -> None:
        for dependency in step.inputs.values():
            visit(dependency)
        found.setdefault(step)

    visit(last)
    return sorted(found, key=lambda step: STAGES.index(step.stage))
