"""What may happen inside the save of a checkpoint: a kill, a torn write, a full disk (promise 2).

Each case is a process of its own, forked from a server that has imported torch already. It saves
the checkpoints of steps 1 and 2, then that of step 3 with something planned at one failpoint.
"""

import multiprocessing
import random
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch._dynamo  # an optimizer's first step does, 3 s in each process otherwise

from llm.config import OptimizationConfig
from llm.errors import DiskFullError
from llm.model.transformer import Transformer
from llm.runtime import failpoints
from llm.training.checkpoints import load_checkpoint, newest_checkpoint, save_checkpoint
from llm.training.loop import TrainState
from llm.training.optimizers import Optimizer, make_optimizer
from tests.chaos.counting import Case
from tests.llm.training_setup import tiny_model

KEEP = 2
NEVER = "never=kill"  # planned so that failpoints are counted
WIDTHS = (
    32,
    160,
    192,
    224,
    256,
)  # the widest: 4 MB of weights, 8 MB of moments, written by the MiB
FULL_DISK_SAID = 7


@dataclass(frozen=True, slots=True)
class Point:
    """A failpoint of the third save, reached for the `count`-th time in it."""

    width: int
    name: str
    count: int

    def __str__(self) -> str:
        return f"{self.name}:{self.count} at width {self.width}"


def points(folder: Path, width: int) -> list[Point]:
    """Find every failpoint that a save reaches, by doing one."""
    for step in (1, 2):
        save_checkpoint(folder, *trained(step, width), keep=KEEP)
    failpoints.arm(NEVER)
    save_checkpoint(folder, *trained(3, width), keep=KEEP)
    found = failpoints.reached()
    failpoints.arm("")
    return [
        Point(width, name, count + 1) for name, times in found.items() for count in range(times)
    ]


def kills(found: Sequence[Point]) -> dict[str, Case]:
    """A kill at each of these points."""
    return {f"kill at {point}": partial(_try, point, "kill") for point in found}


def torn_writes(found: Sequence[Point]) -> dict[str, Case]:
    """Half of what is written lost, at each of these points that write."""
    writes = [point for point in found if point.name.endswith(".write")]
    return {f"torn {point}": partial(_try, point, "torn") for point in writes}


def full_disks(found: Sequence[Point]) -> dict[str, Case]:
    """A full disk at each of these points where one shows."""
    writes = [point for point in found if point.name.endswith((".write", ".sync"))]
    return {f"full disk at {point}": partial(_try, point, "raise:ENOSPC") for point in writes}


def random_kills(folder: Path, number: int, seed: int) -> dict[str, Case]:
    """So many different kills, every failpoint of the smallest model among them."""
    rng = random.Random(seed)
    first, *others = (points(folder / str(width), width) for width in WIDTHS)
    rest = [point for some in others for point in some]
    assert len(first) <= number <= len(first) + len(rest)
    return kills([*first, *rng.sample(rest, number - len(first))])


def trained(step: int, width: int) -> tuple[Transformer, Optimizer, TrainState]:
    """A model, an optimizer and a state that are those of `step` alone."""
    model = tiny_model(seed=step, vocab_size=16 * width, d_model=width, d_ff=width)
    optimizer = make_optimizer(model, OptimizationConfig(optimizer="muon"))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.1 * step)
    optimizer.step()
    return model, optimizer, TrainState(step=step, tokens=step * 7, loss=2.5)


def _try(point: Point, action: str, folder: Path) -> None:
    """Save three checkpoints with `action` in the third, and look at what is left."""
    code = _in_child(folder, point.width, f"{point.name}:{point.count}={action}")
    expected = {"kill": -signal.SIGKILL, "raise:ENOSPC": FULL_DISK_SAID, "torn": 0}[action]
    assert code == expected, f"found exit code {code}, expected {expected}"
    was_published = (folder / "step-00000003").is_dir()
    found = _newest_step(folder, point.width)
    if action == "kill":  # what had its name before the kill is whole
        assert found == (3 if was_published else 2), found
    else:  # a torn write is noticed when it is read
        assert found == 2, found
    save_checkpoint(folder, *trained(4, point.width), keep=KEEP)  # as training goes on
    assert _newest_step(folder, point.width) == 4
    assert not list(folder.glob(".*")), "nothing is left of what was cut short"


def _newest_step(folder: Path, width: int) -> int:
    """Return the step of the newest whole checkpoint, whose content is compared bit for bit."""
    newest = newest_checkpoint(folder)
    assert newest is not None, "no valid checkpoint is left"
    model, optimizer, _ = trained(9, width)
    state = load_checkpoint(newest, model, optimizer)
    its_model, its_optimizer, its_state = trained(state.step, width)
    assert state == its_state
    assert all(map(torch.equal, model.parameters(), its_model.parameters()))
    moments, its_moments = optimizer.state_dict(), its_optimizer.state_dict()
    assert moments.keys() == its_moments.keys()
    assert all(torch.equal(moments[name], its_moments[name]) for name in moments)
    return state.step


def _in_child(folder: Path, width: int, plan: str) -> int | None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    child = context.Process(target=_save_three, args=(folder, width, plan))
    child.start()
    child.join()
    return child.exitcode


def _save_three(folder: Path, width: int, plan: str) -> None:
    for step in (1, 2):
        save_checkpoint(folder, *trained(step, width), keep=KEEP)
    model, optimizer, state = trained(3, width)
    failpoints.arm(plan)
    try:
        save_checkpoint(folder, model, optimizer, state, keep=KEEP)
    except DiskFullError as error:
        assert str(folder) in str(error) and "bytes free, needed" in str(error)
        raise SystemExit(FULL_DISK_SAID) from None
