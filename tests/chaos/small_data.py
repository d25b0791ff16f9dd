"""Data that is empty, tiny or too long (promise 15).

Each case goes through the stages up to the first training, and must end before it in a typed error
that says what to do; or, where a document is longer than a row, lose none of it.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from llm.artifact import ArtifactWriter, Json, read_manifest
from llm.clean import clean
from llm.config import SourceConfig
from llm.data.documents import DocumentReader
from llm.data.packed import PackedSequences
from llm.data.sources.fingerprint import fingerprint
from llm.download import download
from llm.errors import ConfigError, DataError
from llm.pack import pack
from llm.runtime.job import Job, finish
from llm.tokenizer.base import Tokenizer
from llm.tokenizer.load import load_tokenizer
from llm.train_tokenizer import train_tokenizer
from tests import tiny
from tests.chaos.counting import Case

TEXTS = [f"Text {number} has some words of its own, as all of them have." for number in range(99)]
SEQ_LEN = 32


def run(
    folder: Path,
    stage: Callable[[Job, ArtifactWriter], object],
    settings: dict[str, Json],
    role: str,
    **inputs: Path,
) -> Path:
    """Run one stage in this process."""
    name = f"{stage.__name__} {role}".strip()
    job = Job(stage=stage.__name__, role=role, settings=settings, seed=1)
    job.inputs = {name: str(path) for name, path in inputs.items()}
    job.out, job.work = folder / name / "out", folder / name / "work"
    job.work.mkdir(parents=True)
    writer = ArtifactWriter(job.out)
    finish(job, writer, stage(job, writer))  # type: ignore[arg-type]
    return job.out


def rows_of(folder: Path, name: str, data: bytes | None, **settings: Json) -> tuple[Path, ...]:
    """Take a file through download, clean, train_tokenizer and pack; return their folders."""
    role = "chats" if "chats" in name else "corpus"
    path = folder / "source" / name
    path.parent.mkdir(parents=True)
    if data is not None:
        path.write_bytes(data)
    source: dict[str, Json] = {"kind": "files", "path": str(path)}
    fingerprint(SourceConfig(**source), role, None)  # type: ignore[arg-type]
    raw = run(folder, download, source, role)
    documents = run(folder, clean, {"validation_fraction": 0.2}, role, raw=raw)
    learning: dict[str, Json] = {"kind": "bytes"} | settings
    tokenizer = run(folder, train_tokenizer, learning, "", documents=documents)
    rows = run(folder, pack, {"seq_len": SEQ_LEN}, role, documents=documents, tokenizer=tokenizer)
    return documents, tokenizer, rows


def refused(
    folder: Path, name: str, data: bytes | None, saying: str, error: type = DataError,
    **settings: Json,
) -> None:  # fmt: skip
    """Expect an error of this type with the found value."""
    try:
        rows_of(folder, name, data, **settings)
    except (DataError, ConfigError) as found:
        assert isinstance(found, error) and saying in str(found), str(found)
    else:
        raise AssertionError("it came as far as training")


def lines(texts: Sequence[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def chats(answers: Sequence[object]) -> bytes:
    records = [{"instruction": f"Ask {n}.", "output": one} for n, one in enumerate(answers)]
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def nothing_lost(folder: Path, name: str, data: bytes) -> None:
    """Pack documents of which one is far longer than a row; every byte of it is in the rows."""
    documents, tokenizer_folder, rows_folder = rows_of(folder, name, data)
    tokenizer = load_tokenizer(tokenizer_folder)
    for split in ("train", "validation"):
        file, rows = DocumentReader(documents, split), PackedSequences(rows_folder, split)
        every = list(file.read(range(len(file))))
        assert rows.info.num_documents == len(every)
        written = sum(len(text.encode()) for one in every for text in one.texts)
        assert rows.info.num_tokens == written + len(every), "a token per byte, and `<|bos|>`"
        found = _bytes_in(rows, tokenizer)
        assert max(len(text) for one in every for text in one.texts) > 100 * SEQ_LEN
        assert found >= written


def long_chats_are_counted(folder: Path) -> None:
    """Pack chats of which some are far longer than a row: each is cut, counted, and packed."""
    documents, _, rows_folder = rows_of(folder, "chats.jsonl", chats([*TEXTS, *LONG]))
    summary = read_manifest(rows_folder).summary
    num_cut = 0
    for split in ("train", "validation"):
        file, rows = DocumentReader(documents, split), PackedSequences(rows_folder, split)
        every = list(file.read(range(len(file))))
        num_cut += sum(len("".join(one.texts).encode()) > SEQ_LEN for one in every)
        assert rows.info.num_documents == len(every)
        assert rows.info.num_cut_documents == 0, "a chat is never in two sequences"
    counts = [summary.get(f"{split}_truncated_chats", 0) for split in ("train", "validation")]
    assert sum(map(int, counts)) == num_cut >= len(LONG)


def _bytes_in(rows: PackedSequences, tokenizer: Tokenizer) -> int:
    read = rows.read(range(rows.num_sequences))
    return sum(len(tokenizer.decode_bytes(row.tolist())) for row in read.tokens)


def long_prompt(folder: Path) -> None:
    """Build up to pretraining with a prompt that does not fit: nothing is trained."""
    overrides = [*tiny.write_sources(folder), f"evaluate.prompts=[fine, {'long ' * 40}]"]
    display = tiny.SilentDisplay()
    try:
        tiny.build(folder / "artifacts", overrides, "pretrain", display=display)
    except ConfigError as error:
        assert "evaluate.prompts[1]" in str(error) and "pack.seq_len = 32" in str(error)
    else:
        raise AssertionError("it was trained on")
    assert "pack corpus built" in display.shown
    assert not any(line.startswith("pretrain") for line in display.shown)


LONG = [f"Text {number} is far longer than a row. " * 200 for number in range(9)]
SMALL_DATA_CASES: dict[str, Case] = {
    name: functools.partial(refused, name=file, data=data, saying=saying, **more)
    for name, (file, data, saying, more) in {
        "no file": ("a.jsonl", None, "does not exist", {}),
        "an empty corpus": ("a.jsonl", b"", "are empty", {}),
        "empty chats": ("chats.jsonl", b"", "are empty", {}),
        "a corpus of blanks": ("a.txt", b" \n\n\t\n" * 99, "0 are left", {}),
        "one document": ("a.jsonl", lines(TEXTS[:1]), "none of them is in", {}),
        "one chat": ("chats.jsonl", chats(["Yes."]), "none of them is in", {}),
        "no readable record": ("a.jsonl", b"{\n" * 99, "the first in a.jsonl line 1", {}),
        "empty documents": ("a.jsonl", lines([""] * 99), "99 empty", {}),
        "chats without an answer": ("chats.jsonl", chats([" "] * 99), "99 empty answer", {}),
        "chats of wrong types": ("chats.jsonl", chats([3] * 99), "99 wrong type", {}),
        "less than one sequence": (
            "a.jsonl", lines([chr(97 + n) for n in range(9)]), "less than one sequence", {},
        ),
        "a vocabulary without room": (
            "a.jsonl", lines([f"{chr(0x4E00 + n)}" * 40 for n in range(300)]),
            "train_tokenizer.vocab_size: found 264",
            {"error": ConfigError, "kind": "sentencepiece", "vocab_size": 264},
        ),
    }.items()
} | {
    "a prompt longer than the context": long_prompt,
    "a document longer than a row": functools.partial(
        nothing_lost, name="a.jsonl", data=lines([*TEXTS, *LONG])
    ),
    "a chat longer than a row": long_chats_are_counted,
}  # fmt: skip
