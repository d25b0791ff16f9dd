"""A number that is not finite on one of two ranks (promise 7).

`try_poisons` starts `python -m tests.chaos.poisoned_rank FOLDER` twice, which train on one machine,
and compares what both say of weights and optimizer before and after the step that was poisoned.
"""

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from llm.artifact import write_json_atomically
from llm.config import OptimizationConfig, RuntimeConfig
from llm.data.packed import PackedSequences
from llm.errors import StageError
from llm.model.loss import ModelWithLoss
from llm.model.transformer import Transformer
from llm.runtime import failpoints
from llm.tokenizer.bpe import ByteLevelBPE
from llm.training.loop import TrainingSetup, TrainState, training_steps
from llm.training.objectives import ModelWithObjective, NextToken
from llm.training.optimizers import Optimizer, make_optimizer
from llm.training.processes import RENDEZVOUS, make_accelerator
from tests.chaos.counting import Figure
from tests.llm.training_setup import REPOSITORY, tiny_model, write_text_sequences

NUM_PROCESSES = 2
SOUND_STEPS = 2  # before the one that is poisoned
SECONDS, SECONDS_A_POISON = 60, 5  # at most: ranks that disagree wait for each other for ever


@dataclass(frozen=True, slots=True)
class Poison:
    """What goes wrong, and on which rank."""

    place: str
    """training.loss or training.gradient."""
    number: str
    """nan or inf."""
    rank: int
    optimizer: str
    precision: str

    def __str__(self) -> str:
        where = f"{self.place} on rank {self.rank}"
        return f"{self.number} at {where}, {self.optimizer}, {self.precision}"

    @property
    def is_skipped(self) -> bool:
        """Whether the step is skipped, as fp16 does with a gradient that is too large for it."""
        return self.precision == "fp16" and self.place == "training.gradient"


POISONS = [
    Poison(*parts)
    for parts in itertools.product(
        ("training.loss", "training.gradient"), ("nan", "inf"), (0, 1), ("adamw", "muon"),
        ("fp32", "fp16"),
    )
]  # fmt: skip


def try_poisons(poisons: Sequence[Poison], folder: Path) -> Figure:
    """Train with each poison in turn, on the same two processes, and count where it held."""
    texts = [f"{number} times {number} is {number * number}. " * 9 for number in range(40)]
    write_text_sequences(folder / "rows", ByteLevelBPE.train(texts, 600), texts)
    write_json_atomically(folder / "poisons.json", [asdict(poison) for poison in poisons])
    ranks = [_start(folder, rank) for rank in range(NUM_PROCESSES)]
    try:
        errors = [
            rank.communicate(timeout=SECONDS + SECONDS_A_POISON * len(poisons))[1] for rank in ranks
        ]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    figure = Figure(name="one of two ranks poisoned")
    found: list[list[dict[str, Any]]] = [
        json.loads(path.read_bytes()) if (path := folder / f"rank-{rank}.json").exists() else []
        for rank in range(NUM_PROCESSES)
    ]
    for number, poison in enumerate(poisons):
        said = [of_rank[number] if number < len(of_rank) else {} for of_rank in found]
        figure.count(str(poison), lambda poison=poison, said=said: _check(poison, said, errors))
    return figure


def _check(poison: Poison, said: Sequence[Mapping[str, Any]], errors: Sequence[str]) -> None:
    assert all(said), f"a rank ended early: {errors}"
    mine, other = said
    assert mine["fired"] == (poison.rank == 0) and other["fired"] == (poison.rank == 1)
    assert mine["first"] != mine["before"], "the sound steps changed something"
    for rank in said:
        assert rank["after"] == rank["before"], "weights or optimizer changed"
    del mine["fired"], other["fired"]
    assert mine == other, "the ranks disagree"
    if poison.is_skipped:
        assert (mine["error"], mine["skipped_steps"]) == ("", 1)
        assert mine["end"] != mine["after"], "the next step learns again"
    else:
        loss = "(nan|inf)" if poison.place == "training.loss" else r"\d+\.\d+"
        numbers = f"gave a loss of {loss} and a gradient norm of (nan|inf)"
        expected = f"step {SOUND_STEPS + 1} of {SOUND_STEPS + 2} {numbers}"
        assert re.search(expected, mine["error"]), mine["error"]
        assert mine["end"] == mine["after"]


def _start(folder: Path, rank: int) -> subprocess.Popen[str]:
    variables = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(NUM_PROCESSES),
        "LOCAL_WORLD_SIZE": str(NUM_PROCESSES),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        RENDEZVOUS: str(folder / "rendezvous"),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.poisoned_rank", str(folder)],
        cwd=REPOSITORY,
        env={**os.environ, **variables},
        stderr=subprocess.PIPE,
        text=True,
    )


def _train(poison: Poison, rows: PackedSequences, rank: int) -> dict[str, Any]:
    """Take two sound steps, a poisoned one, and what follows; return what this rank saw."""
    config = OptimizationConfig(
        num_steps=SOUND_STEPS + 2,
        global_batch_size=6,
        warmup_steps=1,
        optimizer=poison.optimizer,  # type: ignore[arg-type]
        precision=poison.precision,  # type: ignore[arg-type]
    )
    runtime = RuntimeConfig(device="cpu", num_processes=NUM_PROCESSES, num_threads=1)
    accelerator = make_accelerator(runtime, config)
    model = tiny_model()
    optimizer = make_optimizer(model, config)
    objective = NextToken(document_mask=False)
    training = TrainingSetup(
        accelerator=accelerator,
        model=accelerator.prepare_model(ModelWithObjective(ModelWithLoss(model), objective)),
        optimizer=optimizer,
        sequences=rows,
        objective=objective,
        config=config,
        stage="pretrain",
        seed=3,
        micro_batch_size=2,  # two passes a step: the poison is in the second
    )
    state = TrainState(loss_scale=1024.0)
    steps = training_steps(training, state, is_stopping=lambda: False)
    found: dict[str, Any] = {"first": _digest(model, optimizer), "error": ""}
    for _ in range(SOUND_STEPS):
        next(steps)
    found["before"] = _digest(model, optimizer)
    failpoints.arm(f"{poison.place}:2@{poison.rank}={poison.number}")
    try:
        next(steps)
        found["after"] = _digest(model, optimizer)
        next(steps)
    except StageError as error:
        found["error"] = str(error)
        found["after"] = _digest(model, optimizer)
    found["end"] = _digest(model, optimizer)
    found["skipped_steps"] = state.skipped_steps
    found["fired"] = failpoints.reached().get(poison.place, 0) >= 2
    failpoints.arm("")
    return found


def _digest(model: Transformer, optimizer: Optimizer) -> str:
    """Return a digest of every weight and every number of the optimizer."""
    tensors = {**dict(model.named_parameters()), **optimizer.state_dict()}
    parts = [tensor.detach().contiguous().numpy().tobytes() for tensor in tensors.values()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def main() -> None:
    """Be one rank."""
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    rows = PackedSequences(folder / "rows", "train")
    found: list[dict[str, Any]] = []
    for parts in json.loads((folder / "poisons.json").read_bytes()):
        with (  # fp16 on a CPU, slowly, as a GPU would
            mock.patch("llm.training.loop.computed_precision", lambda asked, device: asked),
            mock.patch("llm.model.precision.computed_precision", lambda asked, device: asked),
        ):
            found.append(_train(Poison(**parts), rows, rank))
        write_json_atomically(folder / f"rank-{rank}.json", found)
    torch.distributed.barrier()
    sys.stderr.flush()
    os._exit(0)  # as ranks end: threads of gloo may abort one that ends in the ordinary way


if __name__ == "__main__":
    main()
