"""What tests of training share: packed sequences, small settings, and stages as processes."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from llm.artifact import ArtifactWriter, Json
from llm.config import (
    FinetuneConfig,
    ModelConfig,
    OptimizationConfig,
    PretrainConfig,
    RuntimeConfig,
)
from llm.data.chat import render_chats
from llm.data.packed import PackedLayout, PackedShard, shard_prefix, write_pack_json
from llm.data.packed_writer import EncodedDocument, EncodedDocuments, Segments, write_packed_shard
from llm.data.packing import pack_best_fit
from llm.model.transformer import Transformer
from llm.runtime.job import Job, StageFunction, read_job, write_job
from llm.tokenizer.bpe import ByteLevelBPE

SEQ_LEN = 32
PAIRS_SEQ_LEN = 96
TINY = ModelConfig(num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, d_ff=48)
REPOSITORY = Path(__file__).parents[2]
torch.set_num_threads(1)  # on matrices this small threads cost more than they give


def tiny_model(
    seed: int = 0, vocab_size: int = 600, seq_len: int = SEQ_LEN, **shape: Any
) -> Transformer:
    """A model of TINY's shape, changed by `shape`, with random weights."""
    config = ModelConfig(**{**asdict(TINY), **shape})
    model = Transformer(config, vocab_size, seq_len)
    model.initialize(torch.Generator().manual_seed(seed))
    return model


def tiny_pretrain(**settings: Any) -> PretrainConfig:
    """A pretraining of eight steps, changed by `settings`."""
    few = {"num_steps": 8, "global_batch_size": 8, "warmup_steps": 2, "model": TINY}
    return PretrainConfig(**{**few, **settings})


def tiny_finetune(**settings: Any) -> FinetuneConfig:
    """A fine-tuning of four steps, changed by `settings`."""
    return FinetuneConfig(**{"num_steps": 4, "global_batch_size": 4, "warmup_steps": 1, **settings})


def write_text_sequences(
    folder: Path, tokenizer: ByteLevelBPE, texts: Sequence[str], seq_len: int = SEQ_LEN
) -> Path:
    """Pack texts; every fifth sequence is for validation."""
    stream = [token for ids in tokenizer.encode_batch(texts) for token in (tokenizer.bos_id, *ids)]
    num_rows = (len(stream) - 1) // seq_len
    starts = np.arange(num_rows) * seq_len
    tokens = np.array(stream, dtype=np.uint32)[starts[:, None] + np.arange(seq_len + 1)]
    return _write_sequences(folder, tokenizer, tokens, None)


def write_chat_sequences(
    folder: Path, tokenizer: ByteLevelBPE, num_chats: int, seq_len: int = SEQ_LEN
) -> Path:
    """Pack short questions and answers, one per sequence; every fifth is for validation."""
    chats = [
        [
            {"role": "user", "content": f"what is {number}?"},
            {"role": "assistant", "content": f"it is {number * number}"},
        ]
        for number in range(num_chats)
    ]
    tokens = np.full((num_chats, seq_len + 1), tokenizer.pad_id, dtype=np.uint32)
    mask = np.zeros((num_chats, seq_len + 1), dtype=np.bool_)
    for row, chat in enumerate(render_chats(chats, tokenizer)):
        tokens[row, : len(chat.ids)] = chat.ids[: seq_len + 1]
        mask[row, : len(chat.mask)] = chat.mask[: seq_len + 1]
    return _write_sequences(folder, tokenizer, tokens, mask)


def write_preference_sequences(
    folder: Path, tokenizer: ByteLevelBPE, splits: Mapping[str, Sequence[tuple[str, str, str]]]
) -> Path:
    """Pack preference pairs, a prompt with a chosen and a rejected answer each, by split."""
    layout = PackedLayout(
        seq_len=PAIRS_SEQ_LEN,
        vocab_size=tokenizer.vocab_size,
        content="preferences",
        bos_id=tokenizer.bos_id,
        pad_id=tokenizer.pad_id,
    )
    writer = ArtifactWriter(folder)
    infos: dict[str, list[PackedShard]] = {}
    for split, pairs in splits.items():
        documents = EncodedDocuments(layout.dtype)
        for prompt, *answers in pairs:
            question = {"role": "user", "content": prompt}
            sides = [
                render_chats([[question, {"role": "assistant", "content": answer}]], tokenizer)[0]
                for answer in answers
            ]
            tokens = np.array([token for side in sides for token in side.ids], dtype=np.uint32)
            mask = np.array([is_target for side in sides for is_target in side.mask])
            documents.add([EncodedDocument(id=bytes(16), tokens=tokens, mask=mask)])
        segments = pack_best_fit(documents.lengths, layout.seq_len)
        prefix = shard_prefix(split, 0)
        bytes_of = tokenizer.token_bytes
        infos[split] = [write_packed_shard(writer, prefix, layout, documents, segments, bytes_of)]
    write_pack_json(writer, layout, infos)
    writer.finish(stage="pack", summary={})
    return folder


def write_job_file(
    folder: Path,
    stage: str,
    config: OptimizationConfig,
    inputs: Mapping[str, Path],
    **runtime: Any,
) -> Path:
    """Write the job file of a stage whose artifact and work folder lie in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    settings: Mapping[str, Json] = json.loads(json.dumps(asdict(config)))
    small = {"num_threads": 1, "checkpoint_every_steps": 3, "validate_every_steps": 4}
    job = Job(
        stage=stage,
        settings=settings,
        seed=1,
        inputs={name: str(path) for name, path in inputs.items()},
        runtime=RuntimeConfig(**{**small, "validation_sequences": 8, **runtime}),
        out=folder / "out",
        work=folder / "work",
    )
    write_job(folder / "job.json", job)
    return folder / "job.json"


def start(job_file: Path, stage: str) -> subprocess.Popen[str]:
    """Start `python -m llm.<stage>` in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", f"llm.{stage}", str(job_file)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def points(folder: Path) -> list[dict[str, Any]]:
    """The points of a job's `metrics.jsonl`, without what depends on the clock."""
    found: list[dict[str, Any]] = []
    for line in (folder / "work" / "metrics.jsonl").read_text().splitlines():
        point = json.loads(line)
        del point["seconds"]
        for name in ("throughput/tokens_per_second", "memory/peak_gb"):
            point["metrics"].pop(name, None)
        found.append(point)
    return found


def run_inside(stage: StageFunction, job_file: Path) -> Mapping[str, Json]:
    """Run a stage in this process, so that its errors can be caught; return its summary."""
    forget_accelerator()
    job = read_job(job_file)
    job.work.mkdir(parents=True, exist_ok=True)
    return stage(job, ArtifactWriter(job.out))


def fresh_accelerator() -> Accelerator:
    """An Accelerator on the CPU."""
    forget_accelerator()
    return Accelerator(cpu=True)


def forget_accelerator() -> None:
    """Accelerate keeps the settings of its first use in a process; start anew."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _write_sequences(
    folder: Path,
    tokenizer: ByteLevelBPE,
    tokens: np.ndarray[Any, np.dtype[np.uint32]],
    mask: np.ndarray[Any, np.dtype[np.bool_]] | None,
) -> Path:
    layout = PackedLayout(
        seq_len=tokens.shape[1] - 1,
        vocab_size=tokenizer.vocab_size,
        content="text" if mask is None else "chats",
        bos_id=tokenizer.bos_id,
        pad_id=tokenizer.pad_id,
    )
    writer = ArtifactWriter(folder)
    is_validation = np.arange(len(tokens)) % 5 == 0
    infos: dict[str, list[PackedShard]] = {}
    for split, is_in in (("train", ~is_validation), ("validation", is_validation)):
        documents, pieces = EncodedDocuments(layout.dtype), []
        for row, (ids, is_target) in enumerate(
            zip(tokens[is_in], tokens[is_in] * 0 if mask is None else mask[is_in], strict=True)
        ):
            is_first = np.r_[True, ids[1:] == layout.bos_id]  # of a document, or of the sequence
            starts = np.flatnonzero(is_first & (ids != layout.pad_id)).tolist()
            for start, end in pairwise([*starts, int((ids != layout.pad_id).sum())]):
                pieces.append((len(documents), 0, end - start, row, start))
                of_chat = None if mask is None else is_target[start:end]
                documents.add([EncodedDocument(id=bytes(16), tokens=ids[start:end], mask=of_chat)])
        laid = Segments(*np.array(pieces).T)
        prefix = shard_prefix(split, 0)
        info = write_packed_shard(writer, prefix, layout, documents, laid, tokenizer.token_bytes)
        infos[split] = [info]
    write_pack_json(writer, layout, infos)
    writer.finish(stage="pack", summary={})
    return folder
