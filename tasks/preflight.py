"""What a run will need is looked for before its first stage: devices, libraries, folders.

Only what is to be built counts: a run that finds everything cached needs nothing of it.
"""

import functools
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from llm.config import RunConfig, RuntimeConfig
from llm.data.sources.fingerprint import local_files
from llm.data.sources.http import file_name
from llm.errors import ConfigError
from llm.runtime.job import child_environment
from tasks.cluster.runner import missing_runner
from tasks.plan import PlannedStep, source_of
from tasks.stages import CLEAN, DOWNLOAD, PACK, TRAIN_TOKENIZER, PipelineStep, all_stages
from tasks.store import Store

READERS = {".zst": "backports.zstd", ".tzst": "backports.zstd", ".parquet": "pyarrow"}
"""The library that reads files of a name that ends so."""
GPU_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))
ASK_TORCH = """
import json, sys
from llm.config import RuntimeConfig
from llm.errors import ConfigError
from llm.training.processes import place
try:
    place(RuntimeConfig(**json.loads(sys.argv[1])))
except ConfigError as error:
    print(error)
"""


def refuse_what_cannot_run(plan: Sequence[PlannedStep], config: RunConfig, store: Store) -> None:
    """Raise where building what `plan` says cannot work out on this machine.

    Raises:
        ConfigError: with every problem found, each by its setting.
    """
    if problems := find_problems(plan, config, store):
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(
            f"{len(problems)} problem(s) on this machine, nothing was built\n{listed}"
        )


def find_problems(plan: Sequence[PlannedStep], config: RunConfig, store: Store) -> list[str]:
    """Return what keeps the steps that `plan` builds from running here, each by its setting."""
    steps = [item.step for item in plan if item.status == "build"]
    if not steps:
        return []
    return [
        *_folder_problems(config, store),
        *_library_problems(steps, config),
        *_device_problems(steps, config.runtime),
    ]


def _folder_problems(config: RunConfig, store: Store) -> Iterator[str]:
    parts = [store.root / name for name in ("staging", "keys", "locks", "stamps")]
    folders = {"artifacts_dir": [store.root, *(part for part in parts if part.is_dir())]}
    if config.runtime.cache_dir:
        folders["cache_dir"] = [Path(config.runtime.cache_dir).absolute()]
    for setting, paths in folders.items():
        for path in paths:
            existing = next(folder for folder in (path, *path.parents) if folder.exists())
            if not existing.is_dir():
                yield f"runtime.{setting}: {existing} is a file; expected a folder that can be made"
                break
            if reason := _why_not_writable(existing):
                yield (
                    f"runtime.{setting}: {existing} cannot be written ({reason}); make it writable,"
                    " or name another folder"
                )
                break


def _why_not_writable(folder: Path) -> str:
    """Try it: permissions alone tell nothing of root, nor of a file system that is read only."""
    try:
        Path(tempfile.mkdtemp(prefix=".writable-", dir=folder)).rmdir()
    except OSError as error:
        return error.strerror or type(error).__name__
    return ""


def _library_problems(steps: Sequence[PipelineStep], config: RunConfig) -> Iterator[str]:
    stages = {step.stage for step in steps}
    if CLEAN in stages and config.clean.near_duplicates.unit != "none" and _lacks("rensa"):
        yield (
            f"clean.near_duplicates.unit: found {config.clean.near_duplicates.unit}, which needs"
            " the library rensa; `pip install rensa`, or set it to none"
        )
    order = all_stages()
    uses_tokenizer = any(order.index(stage) >= order.index(TRAIN_TOKENIZER) for stage in stages)
    is_sentencepiece = config.train_tokenizer.kind == "sentencepiece"
    if uses_tokenizer and is_sentencepiece and _lacks("sentencepiece"):
        yield (
            "train_tokenizer.kind: found sentencepiece, which needs its library;"
            " `pip install 'fromscratch[sentencepiece]'`, or take bpe"
        )
    if stages & {CLEAN, PACK} and (problem := missing_runner(config.runtime)):
        yield problem
    for step in steps:
        if step.stage is DOWNLOAD:
            yield from _source_problems(step, config)


def _source_problems(step: PipelineStep, config: RunConfig) -> Iterator[str]:
    """Yield the libraries that are missing to get or read what a source gives."""
    source = source_of(step, config)
    dotted = f"download.{step.role}"
    needed: dict[str, str] = {}
    if source.kind == "hub":
        needed = dict.fromkeys(("huggingface_hub", "datasets"), f"{dotted}.kind: found hub")
    elif source.kind == "url":
        needed = _readers([file_name(source.url)], f"{dotted}.url")
    elif source.kind == "files":
        needed = _readers(
            [name for name, _ in local_files(source, step.role).files], f"{dotted}.path"
        )
    for library, found in needed.items():
        if _lacks(library):
            yield f"{found}, which needs the library {library}; `pip install {library}`"


def _readers(names: Sequence[str], dotted: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        for suffix, library in READERS.items():
            if name.lower().endswith(suffix):
                found.setdefault(library, f"{dotted}: found {name}")
    return found


def _device_problems(steps: Sequence[PipelineStep], runtime: RuntimeConfig) -> Iterator[str]:
    """Ask torch where the settings ask for GPUs: it takes seconds to import, and the rest works."""
    has_driver = any(path.exists() for path in GPU_DRIVERS)
    asks_for_gpus = runtime.device == "cuda" or (
        runtime.device == "auto" and runtime.num_processes > 1 and has_driver
    )
    if asks_for_gpus and any(step.stage.is_training for step in steps):
        yield from _ask_torch(json.dumps(asdict(runtime)))


@functools.cache
def _ask_torch(runtime: str) -> list[str]:
    """Return what the processes of a training would refuse, asked of one that ends at once."""
    asked = subprocess.run(
        [sys.executable, "-c", ASK_TORCH, runtime],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if asked.returncode != 0:
        reason = asked.stderr.strip().splitlines()[-1:] or ["it says nothing"]
        return [f"runtime.device: torch cannot say which GPUs there are: {reason[0]}"]
    return asked.stdout.splitlines()


def _lacks(library: str) -> bool:
    try:
        return importlib.util.find_spec(library) is None
    except ModuleNotFoundError:  # of the package it is part of
        return True
