"""Where a training runs: devices, numbers of processes, and who may reach them."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor_config

from llm.config import OptimizationConfig, RuntimeConfig
from llm.errors import ConfigError
from llm.tokenizer.base import TOKENIZER_JSON
from llm.tokenizer.bpe import ByteLevelBPE
from llm.training import processes
from llm.training.processes import Placement, choose_placement, make_accelerator, sum_over_processes
from tests.llm.training_setup import (
    forget_accelerator,
    fresh_accelerator,
    start,
    tiny_pretrain,
    write_job_file,
    write_text_sequences,
)


@pytest.mark.parametrize(
    ("num_gpus", "settings", "expected"),
    [
        (0, {}, Placement(device="cpu", num_processes=1)),
        (0, {"num_processes": 3}, Placement(device="cpu", num_processes=3)),
        (4, {}, Placement(device="cuda", num_processes=4)),
        (4, {"num_processes": 2}, Placement(device="cuda", num_processes=2)),
        (4, {"device": "cpu"}, Placement(device="cpu", num_processes=1)),
    ],
)
def test_a_process_per_visible_gpu_or_one_without_any(
    num_gpus: int, settings: dict[str, object], expected: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert choose_placement(RuntimeConfig(**settings)) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_gpus", "settings", "message"),
    [
        (0, {"device": "cuda"}, "runtime.device: found cuda"),
        (2, {"num_processes": 3}, "runtime.num_processes: found 3, expected at most 2"),
    ],
)
def test_gpus_that_are_not_there_are_refused_by_setting(
    num_gpus: int, settings: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    with pytest.raises(ConfigError, match=message):
        choose_placement(RuntimeConfig(**settings))  # type: ignore[arg-type]


def test_the_environment_decides_nothing_that_the_settings_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    forget_accelerator()
    accelerator = make_accelerator(RuntimeConfig(device="cpu"), OptimizationConfig())
    assert accelerator.gradient_accumulation_steps == 1
    assert accelerator.mixed_precision == "no"


@pytest.mark.parametrize(
    ("device", "setting", "expected"),
    [
        ("cpu", "auto", True),
        ("cuda", "auto", False),
        ("cuda", "always", True),
        ("cpu", "never", False),
        ("cuda", "never", False),
    ],
)
def test_sums_have_a_fixed_order_on_a_cpu_and_elsewhere_where_it_is_asked_for(
    device: Any, setting: Any, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default" if expected else "error")
    try:
        processes._use_fixed_order(RuntimeConfig(deterministic=setting), device)
        assert torch.are_deterministic_algorithms_enabled() == expected
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == expected
        if device == "cuda":
            assert inductor_config.deterministic == expected
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_deterministic_debug_mode(before)


def test_a_training_on_a_cpu_adds_in_a_fixed_order() -> None:
    forget_accelerator()
    torch.set_deterministic_debug_mode("default")
    make_accelerator(RuntimeConfig(device="cpu"), OptimizationConfig())
    assert torch.are_deterministic_algorithms_enabled()


def test_sums_of_one_process_are_its_numbers() -> None:
    found = sum_over_processes(fresh_accelerator(), 3, True, torch.tensor(0.25))
    assert found == [3.0, 1.0, 0.25]


@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's /proc")
def test_no_process_of_a_training_listens_to_other_machines(
    tmp_path: Path, tokenizer: ByteLevelBPE, corpus: list[str]
) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_bytes(tokenizer.to_files()[TOKENIZER_JSON])
    sequences = write_text_sequences(tmp_path / "sequences", tokenizer, corpus[:20])
    inputs = {"sequences": sequences, "tokenizer": tmp_path / "tokenizer"}
    settings = tiny_pretrain(num_steps=5000)
    process = start(
        write_job_file(tmp_path, "pretrain", settings, inputs, num_processes=2), "pretrain"
    )
    metrics = tmp_path / "work" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 3:
        time.sleep(0.01)
    addresses = listening_addresses(process.pid)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert addresses == {"0100007F"}  # 127.0.0.1, as the kernel writes it


def listening_addresses(group: int) -> set[str]:
    """The addresses on which the processes of a group listen."""
    inodes: set[str] = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(folder.name)) == group:
                links = [str(link.readlink()) for link in (folder / "fd").iterdir()]
                inodes |= {link[8:-1] for link in links if link.startswith("socket:[")}
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
    found: set[str] = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:  # 0A: listening
                found.add(fields[1].split(":")[0])
    return found
