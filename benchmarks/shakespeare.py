"""Tiny Shakespeare by characters: our training beside the recipe that the field's tutorials use.

    python benchmarks/shakespeare.py --text FOLDER/tinyshakespeare.txt [--only TABLE ...]

The recipe, written here in plain torch: 4 layers, 4 heads, 128 wide, context 64, 12 rows a step,
learned positions, LayerNorm, GELU, AdamW 1e-3 to 1e-4 by a cosine after 100 steps of warm-up, betas
0.9 and 0.99, decay 0.1, clipping at 1.0, 2000 steps in fp32. Ours is the pretraining stage of
configs/shakespeare-char.yaml, run as the pipeline runs it, a process of its own; its seconds are
those of its own curve, from the first to the last step. Only the table of speed has both in one
process, ten steps of each in turn.

Every loss is the mean over the whole validation split, the last tenth of the text, in windows of 64
characters that do not overlap, in nats per character. Everything is measured in one run, the two
sides in turn. With no --text the recipe downloads it.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.config import ModelConfig, PretrainConfig, RuntimeConfig
from llm.data.packed import PackedSequences
from llm.model.loss import ModelWithLoss
from llm.model.transformer import Transformer
from llm.model.weights import load_model
from llm.monitoring.metrics import METRICS_FILE
from llm.recipes import load_config
from llm.runtime.job import Job, write_job
from llm.tokenizer.load import load_tokenizer
from llm.training.loop import TrainingSetup, TrainState, training_steps
from llm.training.objectives import ModelWithObjective, NextToken
from llm.training.optimizers import make_optimizer
from llm.training.processes import make_accelerator

REPOSITORY = Path(__file__).parents[1]
CONTEXT, ROWS, STEPS = 64, 12, 2000
SPEED_TURNS = 31  # of ten steps; the first is not counted
NEVER = 1_000_000_000
SAME_AS_THE_RECIPE = ModelConfig(
    num_layers=4,
    d_model=128,
    num_heads=4,
    num_kv_heads=4,
    d_ff=512,
    positions="learned",
    norm="layernorm",
    mlp="gelu",
)


class RecipeBlock(nn.Module):
    """Attention and feed-forward as the tutorials write them."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.num_heads, -1).transpose(1, 2)
            for part in self.qkv(self.norm_1(x)).split(C, dim=2)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class RecipeModel(nn.Module):
    """The conventional GPT: learned positions, tied embeddings."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab_size, 128), nn.Embedding(CONTEXT, 128)
        self.blocks = nn.ModuleList(RecipeBlock(128, 4) for _ in range(4))
        self.norm = nn.LayerNorm(128, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                is_adding = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(weight, 0.0, 0.02 / math.sqrt(8) if is_adding else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


@dataclass(frozen=True, kw_only=True)
class Result:
    """One training."""

    loss: float
    seconds: float
    num_steps: int
    num_parameters: int

    @property
    def tokens_per_second(self) -> float:
        return self.num_steps * ROWS * CONTEXT / self.seconds


def train_recipe(train: Tensor, validation: Tensor, vocab_size: int, seed: int) -> Result:
    """Train as the tutorials do."""
    torch.manual_seed(seed)
    model = RecipeModel(vocab_size)
    started_at = time.perf_counter()
    for _ in recipe_steps(model, train):
        pass
    return Result(
        seconds=time.perf_counter() - started_at,
        loss=whole_loss(model, validation),
        num_steps=STEPS,
        num_parameters=sum(weight.numel() for weight in model.parameters()),
    )


def recipe_steps(model: RecipeModel, train: Tensor) -> Iterator[None]:
    """Take the recipe's steps: 12 windows at random places each."""
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    vectors = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(STEPS):
        share = 0.5 * (1 + math.cos(math.pi * (step - 100) / (STEPS - 100)))
        rate = 1e-3 * (step + 1) / 101 if step < 100 else 1e-4 + 9e-4 * share
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(train) - CONTEXT - 1, (ROWS, 1))
        window = train[starts + torch.arange(CONTEXT + 1)]
        logits = model(window[:, :-1])
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), window[:, 1:].reshape(-1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield


@torch.no_grad()
def whole_loss(model: nn.Module, validation: Tensor) -> float:
    """Return the mean loss over all windows of the validation split that do not overlap."""
    model.eval()
    num_windows = (len(validation) - 1) // CONTEXT
    inputs = validation[: num_windows * CONTEXT].view(num_windows, CONTEXT)
    targets = validation[1 : num_windows * CONTEXT + 1].view(num_windows, CONTEXT)
    total = 0.0
    for start in range(0, num_windows, 256):
        logits = model(inputs[start : start + 256])
        some = targets[start : start + 256]
        total += float(F.cross_entropy(logits.flatten(0, 1), some.flatten(), reduction="sum"))
    return total / (num_windows * CONTEXT)


class Ours:
    """Runs our pretraining on rows that the recipe's own stages made."""

    def __init__(self, folder: Path, overrides: Sequence[str]) -> None:
        self._folder, self._number = folder, 0
        command = [sys.executable, "-m", "flows.cli", "run", "shakespeare-char", *overrides]
        command += ["pretrain.num_steps=11", "finetune.num_steps=11", "--json"]
        command += [f"runtime.artifacts_dir={folder / 'artifacts'}"]
        done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, check=True)
        stages = json.loads(done.stdout.splitlines()[-1])["stages"]
        paths = {(stage["stage"], stage["role"]): Path(stage["path"]) for stage in stages}
        self._inputs = {
            "sequences": paths["pack", "corpus"],
            "tokenizer": paths["train_tokenizer", ""],
        }
        (text,) = (paths["download", "corpus"] / "files").iterdir()
        self.text = text.read_text(encoding="utf-8")
        self.tokenizer = load_tokenizer(self._inputs["tokenizer"])
        self.config = load_config("shakespeare-char", overrides).pretrain

    def encode(self, text: str) -> Tensor:
        """Return the characters' ids."""
        return torch.tensor(self.tokenizer.encode_batch([text])[0])

    def train(self, config: PretrainConfig, validation: Tensor, seed: int) -> Result:
        """Run the stage as the pipeline does and measure the model that it leaves."""
        self._number += 1
        folder = self._folder / f"training-{self._number}"
        folder.mkdir()
        settings = json.loads(json.dumps(asdict(config)))
        job = Job(
            stage="pretrain",
            settings=settings,
            seed=seed,
            inputs={name: str(path) for name, path in self._inputs.items()},
            runtime=RuntimeConfig(validate_every_steps=NEVER, checkpoint_every_steps=NEVER),
            out=folder / "out",
            work=folder / "work",
        )
        write_job(folder / "job.json", job)
        command = [sys.executable, "-m", "llm.pretrain", str(folder / "job.json")]
        environment = {**os.environ, "GOMP_SPINCOUNT": "3000"}  # as tasks/launch.py has it
        subprocess.run(command, cwd=REPOSITORY, env=environment, check=True)
        curve = [json.loads(line) for line in (folder / "work" / METRICS_FILE).open()]
        model = load_model(folder / "out")
        return Result(
            loss=whole_loss(model, validation),
            seconds=max(p["seconds"] for p in curve if "train/loss" in p["metrics"]),
            num_steps=config.num_steps,
            num_parameters=model.num_parameters(),
        )

    def steps(self, config: PretrainConfig) -> Iterator[object]:
        """Take the steps of the stage's loop in this process."""
        rows = PackedSequences(self._inputs["sequences"], "train")
        model = Transformer(config.model, self.tokenizer.vocab_size, CONTEXT)
        model.initialize(torch.Generator().manual_seed(1))
        accelerator = make_accelerator(RuntimeConfig(device="cpu"), config)
        objective = NextToken(document_mask=config.document_mask)
        training = TrainingSetup(
            accelerator=accelerator,
            model=accelerator.prepare_model(ModelWithObjective(ModelWithLoss(model), objective)),
            optimizer=make_optimizer(model, config),
            sequences=rows,
            objective=objective,
            config=config,
            stage="pretrain",
            seed=1,
            micro_batch_size=ROWS,
        )
        return training_steps(training, TrainState(), is_stopping=lambda: False)


def print_speed(ways: Mapping[str, Iterator[object]]) -> None:
    """Print tokens/s, by the median step; ten steps of each way in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(SPEED_TURNS):
        for name, steps in ways.items():
            for _ in range(10):
                started_at = time.perf_counter()
                next(steps)
                if number:
                    seconds[name].append(time.perf_counter() - started_at)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    base = next(iter(medians.values()))
    print(f"\nSpeed, the same model and optimizer, {torch.get_num_threads()} thread(s)")
    print(f"{'':44} {'ms/step':>8} {'fastest':>8} {'tok/s':>7}")
    for name, median in medians.items():
        print(
            f"{name:44} {median * 1e3:8.1f} {min(seconds[name]) * 1e3:8.1f}"
            f" {ROWS * CONTEXT / median:7,.0f} {base / median:7.2f}x",
            flush=True,
        )


def print_table(title: str, rows: Mapping[str, Result], base: Result) -> None:
    """Print trainings beside `base`."""
    print(f"\n{title}")
    names = f"{'weights':>9} {'steps':>6} {'seconds':>8} {'of base':>8} {'tok/s':>7} {'nats':>7}"
    print(f"{'':44} {names}")
    for name, row in rows.items():
        print(
            f"{name:44} {row.num_parameters:9,} {row.num_steps:6,} {row.seconds:8.1f}"
            f" {row.seconds / base.seconds:7.2f}x {row.tokens_per_second:7,.0f} {row.loss:7.4f}",
            flush=True,
        )


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--text", type=Path, help="tinyshakespeare.txt; without it, downloaded")
    parser.add_argument("--chats", type=Path, help="any chats, which the recipe asks for")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=["loss", "speed", "steps"])
    options = parser.parse_args()
    overrides: list[str] = []
    for slot, path in (("corpus", options.text), ("chats", options.chats)):
        if path is not None:
            overrides += [f"download.{slot}.kind=files", f"download.{slot}.path={path.absolute()}"]
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(Path(folder), overrides)
        measure(ours, options.seeds, options.only)


def measure(ours: Ours, num_seeds: int, tables: Sequence[str]) -> None:
    """Print the tables."""
    text = ours.text
    num_train = int(0.9 * len(text))
    characters = sorted(set(text))
    plain = torch.tensor([characters.index(character) for character in text])
    validation = ours.encode(text[num_train:])
    ours_config = ours.config
    if "loss" in tables:
        recipe = train_recipe(plain[:num_train], plain[num_train:], len(characters), seed=1)
        rows = {"recipe": recipe}
        for seed in range(1, num_seeds + 1):
            rows[f"ours, to its loss, seed {seed}"] = ours.train(ours_config, validation, seed)
        last = list(rows.values())[-1]
        num_steps = int(0.97 * recipe.seconds / last.seconds * ours_config.num_steps)
        long = replace(ours_config, num_steps=num_steps, muon_momentum=0.95, learning_rate=1e-2)
        rows["ours, as long as the recipe takes"] = ours.train(long, validation, 1)
        print_table("Loss and time", rows, recipe)
    if "speed" in tables:
        same = replace(
            ours_config,
            model=SAME_AS_THE_RECIPE,
            optimizer="adamw",
            learning_rate=1e-3,
            warmup_steps=100,
            final_learning_rate_fraction=0.1,
            schedule="cosine",
            beta2=0.99,
            weight_decay=0.1,
            num_steps=STEPS,
        )
        print_speed(
            {
                "recipe": recipe_steps(RecipeModel(len(characters)), plain[:num_train]),
                "ours, fp32": ours.steps(replace(same, precision="fp32")),
                "ours, bf16": ours.steps(replace(same, precision="bf16")),
            }
        )
    if "steps" in tables:
        rows: dict[str, Result] = {}
        for seed in range(1, num_seeds + 1):
            for rate in (1e-3, 3e-3, 6e-3):
                adamw = replace(
                    ours_config, optimizer="adamw", learning_rate=rate, num_steps=1000, beta2=0.99
                )
                rows[f"AdamW {rate:g}, seed {seed}"] = ours.train(adamw, validation, seed)
            for num_steps in (400, 600):
                muon = replace(ours_config, num_steps=num_steps)
                rows[f"Muon {num_steps} steps, seed {seed}"] = ours.train(muon, validation, seed)
        print_table("Muon and AdamW, same model and batch", rows, next(iter(rows.values())))


if __name__ == "__main__":
    main()
