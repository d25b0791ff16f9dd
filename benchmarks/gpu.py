"""Train GPT-2 124M on one GPU, from the plainest way to the project's, and print what each step
up brings.

    python benchmarks/gpu.py [--seconds 15] [--rows-per-step 128] [--micro-batch-rows 16]

Context 1024, random tokens: speed does not depend on them. Every rung keeps what the ones before it
gained. The plain rungs are a loop written here, which reads the loss after every step; the last two
are the project's own, as it trains by default and with `runtime.deterministic=always`: the gain of
that rung is the price of the same bits every time. Tokens/s is over whole steps after a warm-up;
MFU is defined in llm/monitoring/throughput.py, with the peak of the rung's precision.
Needs torch, accelerate, safetensors, tokenizers, numpy, yaml and a CUDA device, nothing else.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parents[1]))

from llm.artifact import ArtifactWriter
from llm.config import ModelConfig, OptimizationConfig, RuntimeConfig
from llm.data.packed import PackedLayout, PackedSequences, shard_prefix, write_pack_json
from llm.data.packed_writer import EncodedDocument, EncodedDocuments, write_packed_shard
from llm.data.packing import pack_best_fit
from llm.model.loss import ModelWithLoss
from llm.model.precision import Precision, autocast, fp32_products
from llm.model.transformer import Transformer
from llm.monitoring.throughput import TERA, flops_per_token, peak_flops
from llm.training.loop import TrainingSetup, TrainState, training_steps
from llm.training.objectives import ModelWithObjective, NextToken
from llm.training.optimizers import make_optimizer
from llm.training.processes import make_accelerator

WARM_UP_STEPS = 3
NUM_ROWS = 4096
GPT2_124M = ModelConfig(
    num_layers=12,
    d_model=768,
    num_heads=12,
    num_kv_heads=12,
    d_ff=3072,
    positions="learned",
    norm="layernorm",
    mlp="gelu",
    has_biases=True,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """What is trained, and how much of it at once."""

    shape: ModelConfig = GPT2_124M
    vocab_size: int = 50_257
    seq_len: int = 1024
    global_batch_size: int = 128
    micro_batch_size: int = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """One way to train; each differs from the one before in one thing."""

    name: str
    precision: Precision = "fp32"
    has_attention_kernel: bool = False
    """Attention without its scores in memory."""
    is_fused: bool = False
    """AdamW as one kernel over all weights."""
    is_compiled: bool = False
    has_chunked_loss: bool = False
    """Logits and loss chunk by chunk, and so a micro-batch twice as large."""
    is_project: bool = False
    """The project's loop: the host is a step ahead of the device."""
    is_deterministic: bool = False
    """Only kernels that add in a fixed order."""


def ladder() -> list[Rung]:
    """Return all rungs, the plainest first."""
    rungs = [Rung(name="fp32, plain attention, AdamW in a loop")]
    for name, change in (
        ("products in tf32", {"precision": "tf32"}),
        ("products in bf16", {"precision": "bf16"}),
        ("attention as one kernel", {"has_attention_kernel": True}),
        ("AdamW as one kernel", {"is_fused": True}),
        ("torch.compile", {"is_compiled": True}),
        ("chunked loss, twice the micro-batch", {"has_chunked_loss": True}),
        ("the project's loop", {"is_project": True}),
        ("deterministic=always", {"is_deterministic": True}),
    ):
        rungs.append(replace(rungs[-1], name=name, **change))
    return rungs


class WholeLoss(nn.Module):
    """A model with the loss of torch, over all logits at once."""

    def __init__(self, model: Transformer) -> None:
        """Wrap `model`."""
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor, document_ids: Tensor | None) -> Tensor:
        """Return the loss at each position of (B, T), in a line."""
        logits = self.model(inputs, document_ids)  # (B, T) -> (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")


def plain_steps(
    rung: Rung, size: Size, rows: PackedSequences, device: torch.device
) -> Iterator[float]:
    """Train with a loop as tutorials write it; yield the loss of every step."""
    model = make_model(size).to(device)
    module = ModelWithLoss(model) if rung.has_chunked_loss else WholeLoss(model)
    if rung.is_compiled:
        module.compile()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, weight_decay=0.1, foreach=False, fused=rung.is_fused
    )
    step = 0
    while True:
        first = step * size.global_batch_size % (NUM_ROWS - size.global_batch_size + 1)
        tokens = torch.from_numpy(rows.read(first + np.arange(size.global_batch_size)).tokens)
        total = torch.zeros((), device=device)
        with nullcontext() if rung.has_attention_kernel else sdpa_kernel(SDPBackend.MATH):
            for batch in tokens.split(micro_batch_size(rung, size)):
                local = batch.to(device)  # (B, T + 1)
                with autocast(rung.precision, device.type):
                    losses = module(local[:, :-1].contiguous(), local[:, 1:].contiguous(), None)
                loss = losses.sum() / (size.global_batch_size * size.seq_len)
                loss.backward()
                total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        yield total.item()


def project_steps(
    rung: Rung, size: Size, rows: PackedSequences, device: torch.device
) -> Iterator[float]:
    """Train with the project's loop; yield the loss of every step."""
    config = OptimizationConfig(
        num_steps=1_000_000, global_batch_size=size.global_batch_size, precision=rung.precision
    )
    kind = "cuda" if device.type == "cuda" else "cpu"
    runtime = RuntimeConfig(
        device=kind,
        num_processes=1,
        deterministic="always" if rung.is_deterministic else "never",
    )
    accelerator = make_accelerator(runtime, config)
    model = make_model(size)
    module = ModelWithLoss(model)
    if rung.is_compiled:
        module.compile()
    objective = NextToken(document_mask=False)
    prepared = accelerator.prepare_model(ModelWithObjective(module, objective))
    training = TrainingSetup(
        accelerator=accelerator,
        model=prepared,
        optimizer=make_optimizer(model, config),
        sequences=rows,
        objective=objective,
        config=config,
        stage="pretrain",
        seed=1,
        micro_batch_size=micro_batch_size(rung, size),
    )
    steps = training_steps(
        training,
        TrainState(),
        is_stopping=lambda: False,
        needs_weights=lambda step: False,
    )
    for step in steps:
        yield step.loss


def micro_batch_size(rung: Rung, size: Size) -> int:
    """Return the rows of one forward pass."""
    return size.micro_batch_size * (2 if rung.has_chunked_loss else 1)


def make_model(size: Size) -> Transformer:
    """Return the model with its first weights."""
    model = Transformer(size.shape, size.vocab_size, size.seq_len)
    model.initialize(torch.Generator().manual_seed(1))
    return model


def make_rows(folder: Path, size: Size) -> PackedSequences:
    """Write rows of random tokens."""
    layout = PackedLayout(
        seq_len=size.seq_len, vocab_size=size.vocab_size, content="text", bos_id=0, pad_id=5
    )
    shape = (NUM_ROWS, size.seq_len + 1)
    tokens = np.random.default_rng(1).integers(10, size.vocab_size, shape, dtype=np.uint32)
    tokens[:, 0] = layout.bos_id
    writer = ArtifactWriter(folder)
    documents = EncodedDocuments(layout.dtype)
    documents.add([EncodedDocument(id=bytes(16), tokens=row) for row in tokens])
    pieces = pack_best_fit(documents.lengths, size.seq_len)
    token_bytes = np.ones(size.vocab_size, dtype=np.int64)
    prefix = shard_prefix("train", 0)
    info = write_packed_shard(writer, prefix, layout, documents, pieces, token_bytes)
    write_pack_json(writer, layout, {"train": [info]})
    return PackedSequences(folder, "train")


def tokens_per_second(
    rung: Rung, size: Size, rows: PackedSequences, device: torch.device, seconds: float
) -> float:
    """Take steps for about so many seconds after a warm-up, in which compiling falls."""
    synchronize: Callable[[], None] = (
        torch.cuda.synchronize if device.type == "cuda" else lambda: None
    )
    with fp32_products(rung.precision, device.type):
        make_steps = project_steps if rung.is_project else plain_steps
        steps = make_steps(rung, size, rows, device)
        for _ in range(WARM_UP_STEPS):
            next(steps)
        synchronize()
        started_at, num_steps = time.perf_counter(), 0
        while time.perf_counter() - started_at < seconds:
            next(steps)
            num_steps += 1
        synchronize()
        passed = time.perf_counter() - started_at
        steps.close()
    return num_steps * size.global_batch_size * size.seq_len / passed


def main() -> None:
    """Climb the ladder and print a line a rung."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--rows-per-step", type=int, default=128)
    parser.add_argument("--micro-batch-rows", type=int, default=16)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py measures a GPU, and torch sees no CUDA device here")
    device = torch.device("cuda")
    size = Size(
        global_batch_size=options.global_batch_size, micro_batch_size=options.micro_batch_size
    )
    with torch.device("meta"):
        per_token = flops_per_token(Transformer(size.shape, size.vocab_size, size.seq_len))
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}", flush=True)
    print(
        f"{per_token / 1e6:.1f} MFLOP per token; {size.global_batch_size} sequences of"
        f" {size.seq_len} tokens per step"
    )
    print(f"{'':<38}{'tokens/s':>12}{'gain':>8}{'in all':>8}{'peak TFLOP/s':>14}{'MFU':>8}")
    before = first = 0.0
    with tempfile.TemporaryDirectory() as folder:
        rows = make_rows(Path(folder) / "rows", size)
        for rung in ladder():
            torch.cuda.empty_cache()
            torch.compiler.reset()
            try:
                speed = tokens_per_second(rung, size, rows, device, options.seconds)
            except torch.OutOfMemoryError:
                print(f"{rung.name:<38}{'out of memory; try --micro-batch-rows 4':>50}", flush=True)
                continue
            before, first = before or speed, first or speed
            peak = peak_flops(device, rung.precision)
            shown_peak = f"{peak / TERA:.1f}" if peak else "unknown"
            share = f"{speed * per_token / peak:.1%}" if peak else "unknown"
            print(
                f"{rung.name:<38}{speed:>12,.0f}{speed / before:>7.2f}x{speed / first:>7.2f}x"
                f"{shown_peak:>14}{share:>8}",
                flush=True,
            )
            before = speed


if __name__ == "__main__":
    main()
