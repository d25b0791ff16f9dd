"""A pipeline small enough for tests: real stages, real processes, seconds."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.pipeline import language_model
from llm.config import RunConfig
from llm.recipes import load_config
from tasks.cached import Builder, Outcome
from tasks.launch import Progress
from tasks.stages import PipelineStep, in_order
from tasks.store import ArtifactStore
from tasks.tracking.journal import Event

SETTINGS = (
    "download.corpus.kind=files",
    "download.chats.kind=files",
    "clean.text_document_bytes=600",
    "clean.validation_fraction=0.2",
    "train_tokenizer.vocab_size=300",
    "pack.seq_len=32",
    "pretrain.num_steps=12",
    "pretrain.warmup_steps=2",
    "pretrain.global_batch_size=4",
    "pretrain.model.num_layers=2",
    "pretrain.model.d_model=32",
    "pretrain.model.num_heads=2",
    "pretrain.model.num_kv_heads=1",
    "pretrain.model.d_ff=64",
    "finetune.num_steps=8",
    "finetune.warmup_steps=1",
    "finetune.global_batch_size=4",
    "finetune.replay_fraction=0.25",
    "evaluate.num_instructions=4",
    "evaluate.max_new_tokens=8",
    "runtime.checkpoint_every_steps=3",
    "runtime.validate_every_steps=6",
    "runtime.validation_sequences=8",
    "runtime.num_threads=1",
)


def write_sources(folder: Path) -> list[str]:
    """Write a small corpus and small chats into `folder` and return the settings that name them."""
    rng = random.Random(1)
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "and",
        "saw",
        "two",
        "birds",
        "fly",
        "over",
        "one",
        "old",
        "red",
        "house",
        "by",
        "the",
        "sea",
    ]
    paragraphs = [" ".join(rng.choices(words, k=40)) + "." for _ in range(60)]
    (folder / "corpus.txt").write_text("\n\n".join(paragraphs) + "\n")
    lines = [
        f'{{"instruction": "Say {a} {b}", "input": "", "output": "{a} {b}"}}'
        for a in words
        for b in words[:6]
    ]
    (folder / "chats.jsonl").write_text("\n".join(dict.fromkeys(lines)) + "\n")
    return [
        f"download.corpus.path={folder / 'corpus.txt'}",
        f"download.chats.path={folder / 'chats.jsonl'}",
    ]


class SilentTracker:
    """A tracker that records events, for tests that are not about MLflow."""

    pipeline_run_id = "run"

    def __init__(self) -> None:
        """Start without events."""
        self.events: list[Event] = []

    def log(self, event: Event) -> None:
        """Record one event."""
        self.events.append(event)

    def model_run_id(self, stage: str) -> str:
        """Return a made-up id."""
        return f"model-{stage}"


class SilentDisplay:
    """A display that records its calls."""

    def __init__(self) -> None:
        """Start without calls."""
        self.shown: list[str] = []

    def started(self, name: str, reason: str) -> None:
        """Remember the start of a step."""
        self.shown.append(f"{name}: {reason}")

    def waits(self, name: str) -> None:
        """Remember that a step waits."""
        self.shown.append(f"{name} waits")

    def progressed(self, name: str, progress: Progress) -> None:
        """Ignore progress."""

    def restarted(self, name: str, why: str) -> None:
        """Remember that a step began again."""
        self.shown.append(f"{name} again: {why}")

    def finished(self, outcome: Outcome) -> None:
        """Remember the end of a step."""
        self.shown.append(f"{outcome.name} {outcome.status}")


def build(
    artifacts: Path, overrides: list[str], last: str = "evaluate", **options: Any
) -> Mapping[str, Outcome]:
    """Build the tiny pipeline up to the step `last` without Prefect; return outcomes by name."""
    recipe = Path(__file__).parent / "tasks" / "defaults.yaml"
    config = load_config(recipe, [*SETTINGS, *overrides, f"runtime.artifacts_dir={artifacts}"])
    options = {"tracker": SilentTracker(), "display": SilentDisplay()} | options
    builder = Builder(config, ArtifactStore(artifacts), **options)
    outcomes: dict[str, Outcome] = {}
    for step in needed_for(last, config):
        outcomes[step.name] = builder.build(step)
    builder.finish()
    return outcomes


def needed_for(last: str, config: RunConfig) -> list[PipelineStep]:
    """Return the steps up to and including the one named `last`."""
    steps = in_order(language_model(config))
    return in_order(next(step for step in steps if step.name == last))
