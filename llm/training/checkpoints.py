"""Checkpoints: training resumes from one with the bits of an uninterrupted run.

`checkpoints/step-00000050/` holds the weights in training, the optimizer state and the kept weights
(average and best, if any) as safetensors, `state.json`, and a manifest with their sha256. It is
renamed to that name once all of it is on the disk.
"""

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import cast

from accelerate import Accelerator

from llm.artifact import ArtifactWriter, file_sha256, fsync_folder, read_manifest
from llm.errors import ArtifactError, DiskFullError
from llm.model.transformer import Transformer
from llm.model.weights import WEIGHTS, read_tensors, set_weights, trained_weights_of, write_tensors
from llm.runtime.disk import disk_full
from llm.runtime.failpoints import failpoint
from llm.training.kept_weights import KeptWeights
from llm.training.loop import TrainState
from llm.training.optimizers import Optimizer

PREFIX, DAMAGED_PREFIX = "step-", "damaged-"
WRITING, REMOVING = ".writing", ".removing"
OPTIMIZER, KEPT, STATE = "optimizer.safetensors", "kept.safetensors", "state.json"


def save_checkpoint(
    folder: Path,
    model: Transformer,
    optimizer: Optimizer,
    state: TrainState,
    *,
    keep: int,
    kept: KeptWeights | None = None,
) -> None:
    """Write a checkpoint to `folder`, then remove all but the newest `keep`.

    Raises:
        DiskFullError: earlier checkpoints are untouched; training can resume from the newest.
    """
    final = folder / f"{PREFIX}{state.step:08d}"
    if final.exists():
        # saved before a resume: the same settings and seed give the same bytes, but for the choice
        # of the best weights at this very step, which resuming repeats
        return
    weights, moments = trained_weights_of(model), optimizer.state_dict()
    copies = kept.state_dict() if kept else {}
    try:
        writer = ArtifactWriter(folder / WRITING)
        with writer.open(WEIGHTS) as file:
            write_tensors(file, weights)
        # two files: exporters and `load_model` read the weights alone
        with writer.open(OPTIMIZER) as file:
            write_tensors(file, moments)
        if copies:
            with writer.open(KEPT) as file:
                write_tensors(file, copies)
        # JSON, not pickle: a checkpoint can be read by eye and cannot run code
        writer.write_json(STATE, asdict(state))
        writer.finish(stage="checkpoint", summary={"step": state.step})
    except (OSError, DiskFullError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        needed = sum(
            tensor.nbytes for tensor in (*weights.values(), *moments.values(), *copies.values())
        )
        # with the bytes of the whole checkpoint, not of the one write that failed
        full = disk_full(cast(OSError, cause), folder, needed)
        shutil.rmtree(folder / WRITING, ignore_errors=True)
        raise full or error from error
    # a kill before this line leaves no checkpoint, a kill after it a whole one
    failpoint("checkpoint.rename")
    (folder / WRITING).rename(final)
    failpoint("checkpoint.renamed")
    fsync_folder(folder)  # the new name must be on the disk before older checkpoints go
    for old in _published(folder)[:-keep]:
        failpoint("checkpoint.remove")
        old.rename(folder / REMOVING)  # a kill while files are deleted leaves no half checkpoint
        failpoint("checkpoint.removing")
        shutil.rmtree(folder / REMOVING)
        failpoint("checkpoint.removed")


def resume(
    accelerator: Accelerator,
    folder: Path,
    model: Transformer,
    optimizer: Optimizer,
    kept: KeptWeights,
) -> TrainState:
    """Load the newest whole checkpoint, the same on every process, or start from step 0."""
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        newest_checkpoint(folder)  # renames damaged ones before other processes list the folder
    accelerator.wait_for_everyone()
    # every process reads the same bytes, so nothing is broadcast
    path = newest_checkpoint(folder)
    return load_checkpoint(path, model, optimizer, kept) if path else TrainState()


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint; damaged ones are set aside with the reason."""
    # of a process that was killed while it wrote or removed one
    for leftover in (WRITING, REMOVING):
        shutil.rmtree(folder / leftover, ignore_errors=True)
    for path in reversed(_published(folder)):
        problem = _problem(path)
        if problem is None:
            return path
        # kept, for whoever wants to know what happened to the disk
        aside = _free_name(folder / f"{DAMAGED_PREFIX}{path.name}")
        path.rename(aside)
        (aside / "reason.txt").write_text(problem + "\n", encoding="utf-8")
        print(f"checkpoint set aside as {aside.name}: {problem}", file=sys.stderr)
    return None


def load_checkpoint(
    path: Path, model: Transformer, optimizer: Optimizer, kept: KeptWeights | None = None
) -> TrainState:
    """Load weights, optimizer state and kept weights from `path`; return the training state.

    Raises:
        ArtifactError: it belongs to another model, optimizer or version.
    """
    try:
        state = TrainState(**json.loads((path / STATE).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(
            f"{path / STATE}: written by another version ({error}); remove {path.parent}"
        ) from error
    # into the existing tensors, which the optimizer and DDP hold
    set_weights(model, read_tensors(path / WEIGHTS), path / WEIGHTS)
    optimizer.load_state_dict(read_tensors(path / OPTIMIZER), path / OPTIMIZER)
    if kept and (path / KEPT).exists():  # the manifest says so: an absent file is not a lost one
        kept.load_state_dict(read_tensors(path / KEPT), path / KEPT)
    return state


def _published(folder: Path) -> list[Path]:
    # eight digits sort by step as text
    return sorted(folder.glob(f"{PREFIX}*"))


def _problem(path: Path) -> str | None:
    """Return what is damaged in a checkpoint, None if nothing is."""
    # every byte is read: a disk that lost data must not decide how training goes on
    try:
        manifest = read_manifest(path)
        for record in manifest.files:
            # size first: cheap, and the usual damage is a file cut short
            size = (path / record.path).stat().st_size
            if size != record.size_bytes:
                return f"{record.path}: found {size} bytes, expected {record.size_bytes}"
            if (found := file_sha256(path / record.path)) != record.sha256:
                return f"{record.path}: found sha256 {found}, expected {record.sha256}"
    except (ArtifactError, OSError) as error:
        return str(error)
    return None


def _free_name(path: Path) -> Path:
    number = 0  # a checkpoint of the same step may have been damaged before
    candidate = path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
