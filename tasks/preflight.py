"""Check a run's requirements before its first stage: devices, libraries, writable folders.

Only steps that will be built count; a run with everything cached has no requirements.
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
from llm.data.sources.fingerprint import list_files
from llm.data.sources.http import file_name
from llm.errors import ConfigError
from llm.runtime.job import child_environment
from llm.tokenizer.kinds import TOKENIZER_KINDS
from tasks.cluster.runner import missing_runner
from tasks.plan import PlannedStep, source_of
from tasks.stages import CLEAN, DOWNLOAD, PACK, TRAIN_TOKENIZER, PipelineStep, all_stages
from tasks.store import ArtifactStore

READERS = {".zst": "backports.zstd", ".tzst": "backports.zstd", ".parquet": "pyarrow"}
"""The library that reads files with a suffix."""
GPU_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))
ASK_TORCH = """
import json, sys
from llm.config import RuntimeConfig
from llm.errors import ConfigError
from llm.training.processes import choose_placement
try:
    choose_placement(RuntimeConfig(**json.loads(sys.argv[1])))
except ConfigError as error:
    print(error)
"""


def refuse_what_cannot_run(
    plan: Sequence[PlannedStep], config: RunConfig, store: ArtifactStore
) -> None:
    """Raise if this machine cannot build the steps of `plan`.

    Raises:
        ConfigError: every problem found, each with its setting.
    """
    if problems := find_problems(plan, config, store):
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise ConfigError(
            f"{len(problems)} problem(s) on this machine, nothing was built\n{listed}"
        )


def find_problems(
    plan: Sequence[PlannedStep], config: RunConfig, store: ArtifactStore
) -> list[str]:
    """Return every problem that keeps this machine from building `plan`, each with its setting."""
    steps = [item.step for item in plan if item.status == "build"]
    if not steps:
        return []
    return [
        *_folder_problems(config, store),
        *_library_problems(steps, config),
        *_device_problems(steps, config.runtime),
    ]


def _folder_problems(config: RunConfig, store: ArtifactStore) -> Iterator[str]:
    parts = [store.root / name for name in ("staging", "keys", "locks", "stamps")]
    for path in (store.root, *(part for part in parts if part.is_dir())):
        existing = next(folder for folder in (path, *path.parents) if folder.exists())
        if not existing.is_dir():
            yield f"runtime.artifacts_dir: {existing} is a file; expected a folder that can be made"
            break
        if reason := _why_not_writable(existing):
            yield (
                f"runtime.artifacts_dir: {existing} cannot be written ({reason}); make it writable,"
                " or name another folder"
            )
            break


def _why_not_writable(folder: Path) -> str:
    """Try to write: permission bits do not tell about root or read-only file systems."""
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
    kind = config.train_tokenizer.kind
    library = TOKENIZER_KINDS[kind].library
    if uses_tokenizer and library and _lacks(library):
        yield (
            f"train_tokenizer.kind: found {kind}, which needs the library {library};"
            f" `pip install 'fromscratch[{library}]'`, or take bpe"
        )
    if stages & {CLEAN, PACK} and (problem := missing_runner(config.runtime)):
        yield problem
    for step in steps:
        if step.stage is DOWNLOAD:
            yield from _source_problems(step, config)


def _source_problems(step: PipelineStep, config: RunConfig) -> Iterator[str]:
    """Yield the missing libraries that a source needs."""
    source = source_of(step, config)
    dotted = f"download.{step.role}"
    needed: dict[str, str] = {}
    if source.kind == "hub":
        needed = dict.fromkeys(("huggingface_hub", "datasets"), f"{dotted}.kind: found hub")
    elif source.kind == "url":
        needed = _readers([file_name(source.url)], f"{dotted}.url")
    elif source.kind == "files":
        needed = _readers(
            [name for name, _ in list_files(source, str(step.role)).files], f"{dotted}.path"
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
    """Ask torch only if the settings request GPUs: importing it takes seconds."""
    has_driver = any(path.exists() for path in GPU_DRIVERS)
    asks_for_gpus = runtime.device == "cuda" or (
        runtime.device == "auto" and runtime.num_processes > 1 and has_driver
    )
    if asks_for_gpus and any(step.stage.is_training for step in steps):
        yield from _ask_torch(json.dumps(asdict(runtime)))


@functools.cache
def _ask_torch(runtime: str) -> list[str]:
    """Return the errors that placing the ranks of a training raises, from a short process."""
    asked = subprocess.run(
        [sys.executable, "-c", ASK_TORCH, runtime],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if asked.returncode != 0:
        reason = asked.stderr.strip().splitlines()[-1:] or ["no message"]
        return [f"runtime.device: torch cannot list the GPUs: {reason[0]}"]
    return asked.stdout.splitlines()


def _lacks(library: str) -> bool:
    try:
        return importlib.util.find_spec(library) is None
    except ModuleNotFoundError:  # its parent package is missing
        return True
