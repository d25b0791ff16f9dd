"""Measure alignment on real data: preference pairs about the standard library's functions.

    python -m benchmarks.align dpo                           # three seeds
    python -m benchmarks.align dpo --seeds 1 align.dpo.beta=0.3

Each seed is a whole run: a small base is pretrained, fine-tuned on chats, then aligned. Prints the
validation figures, on pairs of functions that training never saw, at the start, halfway and at the
end. benchmarks/grpo.py measures GRPO.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

SMALL = (
    "pretrain.model={num_layers: 3, d_model: 128, num_heads: 4, num_kv_heads: 4, d_ff: 352}",
    "pretrain.num_steps=120",
    "finetune.num_steps=100",
    "evaluate.num_instructions=20",
    "runtime.num_threads=1",
)
DPO = (
    "stages_after_pretrain=[finetune, align]",
    "download.preferences.kind=stdlib",
    "align.method=dpo",
    "align.num_steps=100",
    "align.warmup_steps=10",
    "align.global_batch_size=16",
    "align.optimizer=adamw",
    "align.learning_rate=3e-4",
    "align.precision=bf16",
    "runtime.validation_sequences=128",
    "runtime.validate_every_steps=50",
)
FIGURES = ("loss", "preference_accuracy", "reward_margin", "chosen_reward", "rejected_reward")


def measure_dpo(artifacts: Path, seed: int, settings: Sequence[str]) -> Iterator[str]:
    """Yield a line for each validation of a DPO training."""
    overrides = [*SMALL, *DPO, f"seed={seed}", f"runtime.artifacts_dir={artifacts}", *settings]
    command = [sys.executable, "-m", "flows.cli", "run", "quickstart", *overrides, "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    # the newest is of this seed: each has an artifact of its own
    folder = max((artifacts / "align").iterdir(), key=lambda path: path.stat().st_mtime)
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        point: dict[str, Any] = json.loads(line)
        if "val/loss" in point["metrics"]:
            found = " ".join(f"{name} {point['metrics'][f'val/{name}']:.4f}" for name in FIGURES)
            yield f"seed {seed} step {point['step']:>4} {point['seconds']:6.0f} s  {found}"


MEASURES: Mapping[str, Callable[[Path, int, Sequence[str]], Iterator[str]]] = {"dpo": measure_dpo}


def main() -> None:
    """Print the rows of a method."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("method", choices=MEASURES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--artifacts", type=Path, help="folder to keep them in")
    parser.add_argument("settings", nargs="*")
    options = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1, options.seeds + 1):
            artifacts = options.artifacts or Path(folder)
            for line in MEASURES[options.method](artifacts, seed, options.settings):
                print(line, flush=True)


if __name__ == "__main__":
    main()
