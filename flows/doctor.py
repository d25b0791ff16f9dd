"""`fromscratch doctor`: check the machine, the libraries, the servers and the artifacts."""

import importlib.util
import itertools
import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import track

from flows.services.processes import HOST
from flows.services.registry import DEFAULT_PORTS, errors_in_logs, recorded_services
from llm.errors import ArtifactError
from tasks.stages import all_stages
from tasks.store import ArtifactStore

MIN_DISK_BYTES = 5_000_000_000  # twice the artifacts of the quickstart, and the databases
MIN_MEMORY_BYTES = 4_000_000_000  # the quickstart uses less than 2 GiB, the servers the rest
FASTAPI_TOO_NEW = (0, 151)  # from here on the server of Prefect 3.8.8 does not start


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The result of one check; the text of a problem says what to do."""

    level: Literal["ok", "note", "wrong"]
    text: str


def examine(artifacts: Path, *, is_thorough: bool = False) -> int:
    """Print every finding and return 1 if one is wrong; `is_thorough` hashes all artifacts."""
    console = Console(highlight=False)
    num_wrong = 0
    marks = {"ok": "[green]ok   [/]", "note": "[yellow]note [/]", "wrong": "[red]wrong[/]"}
    findings = (_machine(artifacts), _libraries(), _servers(artifacts))
    for finding in itertools.chain(*findings, _store(artifacts, is_thorough)):
        console.print(f"{marks[finding.level]} {finding.text}", soft_wrap=True)
        num_wrong += finding.level == "wrong"
    console.print(f"problems found: {num_wrong}" if num_wrong else "no problems found")
    return 1 if num_wrong else 0


def _machine(artifacts: Path) -> Iterator[Finding]:
    version = platform.python_version()
    if not (3, 11) <= sys.version_info[:2] < (3, 14):
        yield Finding(level="wrong", text=f"Python {version}: 3.11 to 3.13 is required")
    else:
        yield Finding(level="ok", text=f"Python {version}, {os.cpu_count()} cores")
    if not sys.platform.startswith("linux"):
        text = f"{sys.platform}: only Linux ends a training when its flow is killed"
        yield Finding(level="note", text=text)
    import psutil

    memory = psutil.virtual_memory().available
    level = "ok" if memory >= MIN_MEMORY_BYTES else "note"
    yield Finding(level=level, text=f"{memory / 1e9:.1f} GB of memory free")
    folder = artifacts.absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    level = "ok" if free >= MIN_DISK_BYTES else "wrong"
    action = "" if level == "ok" else ": free some space, or set runtime.artifacts_dir"
    yield Finding(level=level, text=f"{free / 1e9:.1f} GB of disk free for {folder}{action}")
    if not os.access(existing, os.W_OK):
        yield Finding(level="wrong", text=f"{existing}: not writable; set runtime.artifacts_dir")


def _libraries() -> Iterator[Finding]:
    for name in ("torch", "accelerate", "tokenizers", "safetensors", "numpy", "prefect", "mlflow"):
        if importlib.util.find_spec(name) is None:
            yield Finding(level="wrong", text=f"{name} is not installed; run `make run` or pip")
    try:
        fastapi = metadata.version("fastapi")
        if tuple(map(int, fastapi.split(".")[:2])) >= FASTAPI_TOO_NEW:
            text = f"fastapi {fastapi}: stops Prefect's server; pip install 'fastapi<0.151'"
            yield Finding(level="wrong", text=text)
    except metadata.PackageNotFoundError:
        yield Finding(level="wrong", text="fastapi is not installed; run `make run` or pip")
    if importlib.util.find_spec("torch") is not None:
        import torch

        gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        text = f"torch {torch.__version__}, {', '.join(gpus) or 'no GPU: training runs on the CPU'}"
        yield Finding(level="ok", text=text)


def _servers(artifacts: Path) -> Iterator[Finding]:
    known = recorded_services(artifacts.absolute())
    for name, port in DEFAULT_PORTS.items():
        service = known.get(name)
        if service is not None and service.is_alive:
            yield Finding(level="ok", text=f"{name} runs on port {service.port}")
        elif _is_in_use(port):
            text = f"port {port} is in use; `fromscratch up` uses another for {name}"
            yield Finding(level="note", text=text)
    for text in errors_in_logs(artifacts):
        yield Finding(level="note", text=text)


def _is_in_use(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def _store(artifacts: Path, is_thorough: bool) -> Iterator[Finding]:
    store = ArtifactStore(artifacts)
    folders = store.artifacts([stage.name for stage in all_stages()])
    yield Finding(level="ok", text=f"{len(folders)} artifacts in {store.root}")
    num_damaged = len(list((store.root / "damaged").glob("*/REASON.txt")))
    if num_damaged:
        text = f"{num_damaged} damaged artifacts were set aside in {store.root / 'damaged'}"
        yield Finding(level="note", text=f"{text}; check the disk, then delete them")
    num_unfinished = len(list((store.root / "staging").glob("*/job.json")))
    if num_unfinished:
        text = f"{num_unfinished} unfinished stages in {store.root / 'staging'}"
        yield Finding(level="note", text=f"{text}; the same commands resume them")
    shown = track(folders, "verifying", transient=True) if is_thorough else folders
    for folder in shown:
        try:
            store.verify(folder, is_thorough=is_thorough)
        except ArtifactError as error:
            yield Finding(level="wrong", text=f"{error}; the next run that needs it rebuilds it")
