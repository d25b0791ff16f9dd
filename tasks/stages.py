"""The seven stages as values: what each is made from.

A step knows its inputs, and nothing of where or how it runs: planning and running walk the same
steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llm.config import CleanConfig, DownloadConfig, MixtureConfig


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
class Step:
    """One stage at its place in a pipeline: what it is made from, by name. Equal only to itself."""

    stage: Stage
    role: str = ""
    """corpus or chats; of one of several sources, its place in `download`: `corpus.sources.0`."""
    inputs: Mapping[str, "Step"] = field(default_factory=dict[str, "Step"])

    @property
    def name(self) -> str:
        """What people call it: `pack corpus`, `pretrain`."""
        return f"{self.stage.name} {self.role}".strip()


def download(role: str, settings: DownloadConfig) -> list[Step]:
    """Fetch the raw files of `download.corpus` or `download.chats`, each of its sources alone."""
    mixture: MixtureConfig = getattr(settings, role)
    roles = [f"{role}.sources.{index}" for index in range(len(mixture.sources))]
    return [Step(stage=DOWNLOAD, role=place) for place in roles or [role]]


def clean(raw: Sequence[Step], settings: CleanConfig, held_out: Step | None = None) -> Step:
    """Turn raw files into documents with ids, each once, split into train and validation.

    Where training documents are read for what models are measured on, `held_out`, other documents,
    has a validation side of it; elsewhere it is no input.
    """
    inputs = {"raw": raw[0]} if len(raw) == 1 else {f"raw_{k}": step for k, step in enumerate(raw)}
    if held_out is not None and settings.decontamination.action != "none":
        inputs["held_out"] = held_out
    return Step(stage=CLEAN, role=raw[0].role.partition(".")[0], inputs=inputs)


def train_tokenizer(documents: Step) -> Step:
    """Learn the vocabulary."""
    return Step(stage=TRAIN_TOKENIZER, inputs={"documents": documents})


def pack(documents: Step, tokenizer: Step) -> Step:
    """Cut documents into rows of tokens."""
    return Step(
        stage=PACK, role=documents.role, inputs={"documents": documents, "tokenizer": tokenizer}
    )


def pretrain(rows: Step, tokenizer: Step) -> Step:
    """Train the base model on rows of text."""
    return Step(stage=PRETRAIN, inputs={"rows": rows, "tokenizer": tokenizer})


def finetune(base: Step, rows: Step) -> Step:
    """Train the chat model from the base model on rows of chats."""
    return Step(stage=FINETUNE, inputs={"base": base, "rows": rows})


def evaluate(base: Step, chat: Step, text_rows: Step, chat_rows: Step, tokenizer: Step) -> Step:
    """Measure both models side by side and write the report."""
    return Step(
        stage=EVALUATE,
        inputs={
            "base": base,
            "chat": chat,
            "text_rows": text_rows,
            "chat_rows": chat_rows,
            "tokenizer": tokenizer,
        },
    )


def in_order(last: Step) -> list[Step]:
    """Return every step `last` needs, and itself, each after its inputs, as in STAGES."""
    found: dict[Step, None] = {}

    def visit(step: Step) -> None:
        for made_first in step.inputs.values():
            visit(made_first)
        found.setdefault(step)

    visit(last)
    return sorted(found, key=lambda step: STAGES.index(step.stage))
