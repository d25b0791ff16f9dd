"""The loss in chunks against the loss of whole logits: speed of a step, and peak memory.

    python -m benchmarks.cross_entropy

A step is forward and backward of a whole model, without the optimizer. Both ways alternate in one
process; the ratio is that of the medians. The peak is the most memory a process of its own ever
had (VmHWM), once after making model and batch, once after two steps.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from llm.config import ModelConfig
from llm.model.loss import ModelWithLoss
from llm.model.precision import Precision, autocast
from llm.model.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, a batch and a precision."""

    layers: int
    width: int
    heads: int
    vocab_size: int
    rows: int
    seq_len: int
    precision: Precision
    steps: int


CASES = {
    "quickstart, bf16": Case(
        layers=4, width=256, heads=4, vocab_size=4096, rows=16, seq_len=256,
        precision="bf16", steps=15,
    ),
    "quickstart, fp32": Case(
        layers=4, width=256, heads=4, vocab_size=4096, rows=16, seq_len=256,
        precision="fp32", steps=8,
    ),
    "vocabulary 131,072, 4,096 positions, bf16": Case(
        layers=1, width=768, heads=12, vocab_size=131_072, rows=8, seq_len=512,
        precision="bf16", steps=3,
    ),
    "vocabulary 131,072, 4,096 positions, fp32": Case(
        layers=1, width=768, heads=12, vocab_size=131_072, rows=8, seq_len=512,
        precision="fp32", steps=1,
    ),
    "vocabulary 131,072, 2,048 positions, fp32": Case(
        layers=1, width=768, heads=12, vocab_size=131_072, rows=4, seq_len=512,
        precision="fp32", steps=1,
    ),
}  # fmt: skip


def make_steps(case: Case) -> dict[str, Callable[[], None]]:
    """Return one step of training by name of the way."""
    torch.manual_seed(1)
    config = ModelConfig(
        num_layers=case.layers,
        d_model=case.width,
        num_heads=case.heads,
        num_kv_heads=case.heads,
        d_ff=11 * case.width // 4,
    )
    model = Transformer(config, case.vocab_size, case.seq_len)
    model.initialize(torch.Generator().manual_seed(1))
    tokens = torch.randint(0, case.vocab_size, (case.rows, case.seq_len + 1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    with_loss = ModelWithLoss(model)

    def plain() -> Tensor:
        logits = model(inputs).flatten(0, 1)
        return F.cross_entropy(logits.float(), targets.flatten(), reduction="sum")

    def chunked() -> Tensor:
        return with_loss(inputs, targets, None).sum()

    def step(losses: Callable[[], Tensor]) -> None:
        with autocast(case.precision, "cpu"):
            loss = losses()
        (loss / targets.numel()).backward()
        model.zero_grad()

    return {"plain": lambda: step(plain), "chunked": lambda: step(chunked)}


def peak_mib() -> float:
    """Return the most memory this process ever had."""
    # not ru_maxrss, which begins with that of the process this one was forked from
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024


def measure_peak(name: str, way: str) -> tuple[float, float]:
    """Return the peaks, in MiB, of a process before its first step and after its second."""
    command = [sys.executable, "-m", "benchmarks.cross_entropy", "--case", name, "--way", way]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    before, after = map(float, done.stdout.split())
    return before, after


def measure_seconds(case: Case) -> dict[str, float]:
    """Return the median seconds of a step by way, alternated, after one that is not counted."""
    steps = make_steps(case)
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    for number in range(case.steps + 1):
        for way, step in steps.items():
            started_at = time.perf_counter()
            step()
            if number:
                seconds[way].append(time.perf_counter() - started_at)
    return {way: statistics.median(values) for way, values in seconds.items()}


def main() -> None:
    """Print a row for each case; as a child, the two peaks of one way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, help="this one only")
    parser.add_argument("--way", choices=("plain", "chunked"), help="print its peaks alone")
    options = parser.parse_args()
    if options.way:
        step = make_steps(CASES[options.case])[options.way]
        before = peak_mib()
        step()
        step()
        print(before, peak_mib())
        return
    print("| step | plain | chunked | speed | plain peak | chunked peak | memory | above start |")
    print("|---|---|---|---|---|---|---|---|")
    for name in [options.case] if options.case else CASES:
        seconds = measure_seconds(CASES[name])
        (plain_start, plain), (start, chunked) = (
            measure_peak(name, way) for way in ("plain", "chunked")
        )
        print(
            f"| {name} | {seconds['plain'] * 1e3:.0f} ms | {seconds['chunked'] * 1e3:.0f} ms"
            f" | {seconds['plain'] / seconds['chunked']:.2f}x"
            f" | {plain:.0f} MiB | {chunked:.0f} MiB | {chunked / plain:.2f}x"
            f" | {(chunked - start) / (plain - plain_start):.2f}x |",
            flush=True,
        )


if __name__ == "__main__":
    main()
