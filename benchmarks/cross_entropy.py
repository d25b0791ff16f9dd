"""Chunked cross-entropy against plain cross-entropy: seconds per step and peak memory.

    python -m benchmarks.cross_entropy

A step is forward and backward of a whole model, without the optimizer. Both losses alternate in one
process; the ratio is of the medians. Peaks are VmHWM of one process per loss, before the first step
and after the second.
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

    num_layers: int
    d_model: int
    num_heads: int
    vocab_size: int
    num_sequences: int
    seq_len: int
    precision: Precision
    num_steps: int


CASES = {
    "quickstart, bf16": Case(
        num_layers=4, d_model=256, num_heads=4, vocab_size=4096, num_sequences=16, seq_len=256,
        precision="bf16", num_steps=15,
    ),
    "quickstart, fp32": Case(
        num_layers=4, d_model=256, num_heads=4, vocab_size=4096, num_sequences=16, seq_len=256,
        precision="fp32", num_steps=8,
    ),
    "vocabulary 131,072, 4,096 positions, bf16": Case(
        num_layers=1, d_model=768, num_heads=12, vocab_size=131_072, num_sequences=8, seq_len=512,
        precision="bf16", num_steps=3,
    ),
    "vocabulary 131,072, 4,096 positions, fp32": Case(
        num_layers=1, d_model=768, num_heads=12, vocab_size=131_072, num_sequences=8, seq_len=512,
        precision="fp32", num_steps=1,
    ),
    "vocabulary 131,072, 2,048 positions, fp32": Case(
        num_layers=1, d_model=768, num_heads=12, vocab_size=131_072, num_sequences=4, seq_len=512,
        precision="fp32", num_steps=1,
    ),
}  # fmt: skip


def make_steps(case: Case) -> dict[str, Callable[[], None]]:
    """Return one step of training by kind of loss."""
    torch.manual_seed(1)
    config = ModelConfig(
        num_layers=case.num_layers,
        d_model=case.d_model,
        num_heads=case.num_heads,
        num_kv_heads=case.num_heads,
        d_ff=11 * case.d_model // 4,
    )
    model = Transformer(config, case.vocab_size, case.seq_len)
    model.initialize(torch.Generator().manual_seed(1))
    tokens = torch.randint(0, case.vocab_size, (case.num_sequences, case.seq_len + 1))
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
    """Return this process's peak memory."""
    # not ru_maxrss, which a forked process inherits
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024


def measure_peak(name: str, loss: str) -> tuple[float, float]:
    """Return a process's peaks in MiB before its first step and after its second."""
    command = [sys.executable, "-m", "benchmarks.cross_entropy", "--case", name, "--loss", loss]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    before, after = map(float, done.stdout.split())
    return before, after


def measure_seconds(case: Case) -> dict[str, float]:
    """Return the median seconds of a step by kind of loss, alternated, after one for warm-up."""
    steps = make_steps(case)
    seconds: dict[str, list[float]] = {loss: [] for loss in steps}
    for number in range(case.num_steps + 1):
        for loss, step in steps.items():
            started_at = time.perf_counter()
            step()
            if number:
                seconds[loss].append(time.perf_counter() - started_at)
    return {loss: statistics.median(values) for loss, values in seconds.items()}


def main() -> None:
    """Print a table of all cases; in a child process, the two peaks of one loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, help="only this one")
    parser.add_argument("--loss", choices=("plain", "chunked"), help="print only its peaks")
    options = parser.parse_args()
    if options.loss:
        step = make_steps(CASES[options.case])[options.loss]
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
            measure_peak(name, loss) for loss in ("plain", "chunked")
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
