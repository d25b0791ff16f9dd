"""Measure GRPO on the quickstart's chats, from its fine-tuned model: speed, rewards, exact match.

    python -m benchmarks.grpo ARTIFACTS [--steps 80] [--base MODEL] [align.key=value ...]

ARTIFACTS is the folder of a finished `fromscratch run quickstart`; MODEL the folder of another chat
model with the same tokenizer. Prints seconds per step, answers
per second and the share of time spent sampling; then held-out exact match, and bits per byte on
text, before and after.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm.align import align
from llm.artifact import ArtifactWriter
from llm.config import RuntimeConfig
from llm.data.packed import PackedSequences
from llm.evaluation.instructions import answer_instructions, exact_match, read_instructions
from llm.model.loss import ModelWithLoss
from llm.model.weights import load_model
from llm.recipes import load_config
from llm.runtime.job import Job
from llm.tokenizer.load import load_tokenizer
from llm.training import rollouts
from llm.training.objectives import NextToken

SETTINGS = [
    "align.method=grpo",
    "align.optimizer=adamw",
    "align.learning_rate=2e-4",
    "align.global_batch_size=512",
    "align.warmup_steps=5",
    "align.weight_decay=0",
    "align.precision=bf16",
    "align.final_learning_rate_fraction=1.0",
    "align.document_mask=true",
    "align.grpo.max_new_tokens=16",
]


def main(arguments: Sequence[str]) -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifacts", type=Path)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--base", type=Path, default=None)
    parser.add_argument("settings", nargs="*")
    options = parser.parse_intermixed_args(arguments)
    settings = [*SETTINGS, f"align.num_steps={options.steps}", *options.settings]
    config = load_config("quickstart", settings).align
    section = {name: value for name, value in asdict(config).items() if name != "stages"}
    packs = {_content(path): path for path in (options.artifacts / "pack").iterdir()}
    base = options.base or next((options.artifacts / "finetune").iterdir())
    torch.set_num_threads(options.threads)
    print(" ".join(settings))
    print("before", measured(base, packs))
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            stage="align",
            settings=json.loads(json.dumps(section)),
            seed=options.seed,
            inputs={"base": str(base), "sequences": str(packs["chats"])},
            runtime=RuntimeConfig(
                num_threads=options.threads, validate_every_steps=20, checkpoint_every_steps=1000
            ),
            out=Path(folder) / "out",
            work=Path(folder) / "work",
        )
        job.work.mkdir()
        timed = _Timed()
        started_at = time.monotonic()
        align(job, ArtifactWriter(job.out))
        seconds = time.monotonic() - started_at
        lines = (job.work / "metrics.jsonl").read_text().splitlines()
        points = [json.loads(line) for line in lines]
        for point in points:
            found = point["metrics"]
            if "val/reward" in found or point["step"] % 10 == 0:
                print(point["step"], point["seconds"], {k: round(v, 3) for k, v in found.items()})
        print(f"{seconds:.0f} s, of which sampling {timed.seconds:.0f} s, {options.steps} steps")
        answers = options.steps * config.global_batch_size
        print(f"{answers / seconds:.0f} answers/s; sampling alone {answers / timed.seconds:.0f}")
        print("after", measured(job.out, packs))


def measured(folder: Path, packs: dict[str, Path]) -> dict[str, Any]:
    """Return the exact match of a model on held-out questions, and bits per byte on text."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    chats = PackedSequences(packs["chats"], "validation")
    instructions = read_instructions(chats, tokenizer, 600).instructions
    answers = [
        answer
        for batch in answer_instructions(model, tokenizer, instructions, 48)
        for answer in batch
    ]
    matched = {
        f"exact_match_{count}": exact_match(answers[:count], instructions[:count]).value
        for count in (200, 600)
    }
    text = PackedSequences(packs["text"], "validation")
    objective, sums = NextToken(document_mask=False), torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for start in range(0, min(text.num_sequences, 128), 16):
            some = np.arange(start, min(start + 16, text.num_sequences))
            batch = objective.make_batch(text.read(some), some)
            token_bytes = torch.from_numpy(tokenizer.token_bytes)
            sums += objective.measure(ModelWithLoss(model), batch, token_bytes)["bits_per_byte"]
    return {**matched, "bits_per_byte": round(float(sums[0] / sums[1]), 4)}


class _Timed:
    """Adds up the time of sampling."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._generate = rollouts.generate
        rollouts.generate = self

    def __call__(self, *arguments: Any) -> list[list[int]]:
        started_at = time.monotonic()
        found = self._generate(*arguments)
        self.seconds += time.monotonic() - started_at
        return found


def _content(pack: Path) -> str:
    return json.loads((pack / "pack.json").read_text())["content"]


if __name__ == "__main__":
    main(sys.argv[1:])
