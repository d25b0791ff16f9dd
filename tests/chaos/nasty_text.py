"""Malformed text and records (promise 14).

Files of good records among bad ones, mixed at random: how many there are, why each bad one is
skipped and on which line it stands is known before they are cleaned. And lines of 1 GiB, cleaned in
processes whose memory is measured.
"""

import csv
import gzip
import io
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from llm.artifact import Json, load_artifact
from llm.data.raw.first_records import FIRST_RECORDS
from llm.errors import DataError
from llm.runtime.job import Job, write_job
from tests.llm.cleaning import TEXTS, corpus, jsonl, run_clean
from tests.llm.hub_server import HubServer, download
from tests.llm.nasty_records import CHATS, NASTY, NOT_CLOSED, PREFERENCES

ROOT = Path(__file__).parents[2]
GOOD = 60
MAX_EXAMPLES = 20  # per reason
MEMORY_MIB = 512
LINE_BYTES = 1 << 30

Records = list[tuple[bytes, str]]
"""Each record's bytes, and why it is skipped; empty if it is used."""


def mixed(rng: random.Random, good: Sequence[bytes], bad: Records, num_bad: int) -> Records:
    """Return good and some bad records in any order; no used one occurs twice."""
    used = [record for record in bad if not record[1]]
    skipped = [record for record in bad if record[1] not in ("", "duplicate")]
    chosen = rng.sample(used, rng.randint(0, len(used))) + rng.choices(skipped, k=num_bad)
    records = [(line, "") for line in good] + chosen
    rng.shuffle(records)
    if repeated := [record for record in records if not record[1]]:
        again = rng.choices(repeated, k=3)
        records += [(line, "duplicate") for line, _ in again]
    return records


def check_file(
    folder: Path, name: str, data: bytes, records: Records, lines: Sequence[int], content: str
) -> None:
    """Clean a file of these records, which begin on these lines, and compare all counts."""
    summary, outputs, _ = run_clean(folder, {name: data}, content, validation_fraction=0.3)
    reasons = Counter(reason for _, reason in records if reason)
    assert summary["read_documents"] == len(records), summary
    assert summary["skipped"] == dict(sorted(reasons.items())), summary["skipped"]
    used = len(outputs["train"]) + len(outputs["validation"])
    assert used == len(records) - reasons.total()
    expected: list[tuple[str, str, int]] = []
    seen: Counter[str] = Counter()
    for (_, reason), line in zip(records, lines, strict=True):
        seen[reason] += 1
        if reason and seen[reason] <= MAX_EXAMPLES:
            expected.append((reason, name, line))
    found = [(one["reason"], one["file"], one["line"]) for one in outputs["rejected"]]
    assert sorted(found, key=str) == sorted(expected, key=str)
    funnel: list[dict[str, int]] = summary["funnel"]  # type: ignore[assignment]
    assert sum(row["dropped"] for row in funnel) == reasons.total()
    assert funnel[-1]["left"] == used


def good_texts(rng: random.Random) -> list[bytes]:
    return corpus(rng.sample(TEXTS, GOOD)).splitlines()


def try_jsonl(folder: Path, rng: random.Random) -> None:
    """Lines of JSON that hold texts."""
    records = mixed(rng, good_texts(rng), [*(NASTY | NOT_CLOSED).items()], 40)
    data = b"\n".join(line for line, _ in records)
    check_file(folder, "a.jsonl", data, records, range(1, len(records) + 1), "text")


def try_array(folder: Path, rng: random.Random) -> None:
    """An array of JSON that holds texts."""
    bad = [(line, reason) for line, reason in NASTY.items() if line.strip()]
    records = mixed(rng, good_texts(rng), bad, 40)
    data = b"[%s]" % b",\n".join(line for line, _ in records)
    check_file(folder, "a.json", data, records, range(1, len(records) + 1), "text")


def try_chats(folder: Path, rng: random.Random) -> None:
    """Lines of JSON that hold chats."""
    good = [{"instruction": text, "output": "Yes."} for text in rng.sample(TEXTS, GOOD)]
    bad = [(json.dumps(record).encode(), reason) for record, reason in CHATS.values()]
    records = mixed(rng, jsonl([*good]).splitlines(), bad, 40)
    data = b"\n".join(line for line, _ in records)
    check_file(folder, "a.jsonl", data, records, range(1, len(records) + 1), "chats")


def try_preferences(folder: Path, rng: random.Random) -> None:
    """Lines of JSON that hold preference pairs."""
    good = [
        {"prompt": text, "chosen": "Yes.", "rejected": "No."} for text in rng.sample(TEXTS, GOOD)
    ]
    bad = [(json.dumps(record).encode(), reason) for record, reason in PREFERENCES.values()]
    records = mixed(rng, jsonl([*good]).splitlines(), bad, 40)
    data = b"\n".join(line for line, _ in records)
    check_file(folder, "a.jsonl", data, records, range(1, len(records) + 1), "preferences")


def try_csv(folder: Path, rng: random.Random) -> None:
    """Rows of a table, some over several lines."""
    good = [f'"{text}\nand a second ""line""",1'.encode() for text in rng.sample(TEXTS, GOOD)]
    bad: Records = [
        (b"nul \x00 stays,1", ""), (b"bad \xff\xc3( bytes,1", ""),
        ('"e\u0301, \u2028",1'.encode(), ""),
        (b",1", "empty"), (b'" \n ",1', "empty"), (b"one field", "wrong number of columns"),
        (b"1,2,3", "wrong number of columns"), (b'"a"b,1', "malformed CSV"), (b"", "empty"),
    ]  # fmt: skip
    records = mixed(rng, good, bad, 40)
    lines = [2]
    for line, _ in records:
        lines.append(lines[-1] + line.count(b"\n") + 1)
    data = b"text,n\n" + b"".join(line + b"\n" for line, _ in records)
    check_file(folder, "a.csv", data, records, lines[:-1], "text")


def try_csv_without_the_key(folder: Path, rng: random.Random) -> None:
    """A table without the column, too short to be an error: each row is counted."""
    texts = TEXTS[: FIRST_RECORDS - 1]
    rows = [["a", "b"], *[[str(rng.random()), text] for text in texts]]
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    _all_skipped(folder, "a.csv", text.getvalue().encode(), len(texts), "missing key")


def try_parquet(folder: Path, rng: random.Random) -> None:
    """Columns of texts and nulls, of invalid text, and of every other type."""
    import pyarrow
    from pyarrow import parquet

    def table(column: object) -> bytes:
        out = io.BytesIO()
        parquet.write_table(pyarrow.table({"text": column}), out, row_group_size=7)
        return out.getvalue()

    values = [*rng.sample(TEXTS, GOOD), *[None] * 9, "", " \n", "nul \0", "\u2028"]
    rng.shuffle(values)
    reasons = ["wrong type" if v is None else "" if v.strip() else "empty" for v in values]
    records = [(b"", reason) for reason in reasons]
    lines = range(1, len(records) + 1)
    check_file(folder / "0", "a.parquet", table(values), records, lines, "text")
    columns = {
        "int": pyarrow.array([1, 2]), "float": pyarrow.array([0.5, None]),
        "bool": pyarrow.array([True, False]), "binary": pyarrow.array([b"a", b"\xff"]),
        "list": pyarrow.array([["a"], []]), "struct": pyarrow.array([{"a": "b"}, {"a": None}]),
        "time": pyarrow.array([1, 2], pyarrow.timestamp("s")),
        "null": pyarrow.array([None, None]),
    }  # fmt: skip
    for name, column in columns.items():
        _all_skipped(folder / name, "a.parquet", table(column), 2, "wrong type")


def try_bytes(folder: Path, rng: random.Random) -> None:
    """Any bytes, or a good file with some of its bytes changed."""
    name = rng.choice(["a.txt", "a.jsonl", "a.json", "a.csv", "a.parquet", "a.md"])
    content = "text" if name.endswith((".txt", ".md")) else rng.choice(["text", "chats"])
    data = bytearray(
        rng.randbytes(rng.randint(0, 400))
        if rng.random() < 0.5
        else corpus(TEXTS[:9]) + b"[" + b",".join(corpus(TEXTS[:9]).splitlines()) + b']\r\n,""\n'
    )
    for _ in range(rng.randint(0, 9) if data else 0):
        data[rng.randrange(len(data))] = rng.choice(b'\0\n\r"\\{}[],:\xff\xc3\xe2\xed' + b"a1 ")
    many: list[Json] = [{"text": text, "instruction": text, "output": "Yes."} for text in TEXTS]
    try:
        run_clean(folder, {name: bytes(data), "z.jsonl": jsonl(many)}, content)
    except DataError as error:
        assert name in str(error)


def try_hub(folder: Path, rng: random.Random, *, is_streamed: bool) -> None:
    """A dataset of the hub: values that `datasets` would convert to text or null are counted."""
    odd = b'{"text": 3}\n{"text": null}\n{"text": ["x"]}\n{"other": 1}\nno json\n'
    good = corpus(rng.sample(TEXTS, GOOD))
    with HubServer({"data.jsonl": good + odd}) as hub:
        done = download(folder, hub, is_hub_streamed=is_streamed)
    assert done.returncode == 0, done.stderr
    got = load_artifact(folder / "out")
    (file,) = (got.path / "files").iterdir()
    summary, outputs, _ = run_clean(folder / "clean", {file.name: file.read_bytes()})
    counted = Counter(summary["skipped"]) + Counter(got.summary.get("skipped", {}))  # type: ignore[arg-type]
    assert counted == {"wrong type": 3, "missing key": 1, "malformed JSON": 1}
    assert len(outputs["train"]) + len(outputs["validation"]) == GOOD


def _all_skipped(folder: Path, name: str, data: bytes, count: int, reason: str) -> None:
    good = {"z.jsonl": corpus(TEXTS)}
    summary, _, _ = run_clean(folder, {name: data} | good)
    assert summary["skipped"] == {reason: count}, summary["skipped"]
    assert summary["read_documents"] == count + len(TEXTS)


RANDOM_FILES: dict[str, Callable[[Path, random.Random], None]] = {
    "lines of JSON": try_jsonl,
    "an array of JSON": try_array,
    "chats": try_chats,
    "preference pairs": try_preferences,
    "a table": try_csv,
    "a table without the key": try_csv_without_the_key,
    "Parquet": try_parquet,
    "any bytes": try_bytes,
}


def long_line(folder: Path, name: str, content: str = "text") -> float:
    """Clean a file with one line of 1 GiB beside good ones; return the most MiB of a process.

    Raises:
        AssertionError: the line is not counted by its reason, or memory was over MEMORY_MIB.
    """
    raw = folder / "raw"
    (raw / "files").mkdir(parents=True)
    source = {"kind": "files", "content": content, "text_key": "text", "format": "auto"}
    (raw / "source.json").write_text(json.dumps(source))
    good: list[Json] = [{"text": text, "instruction": text, "output": "Yes."} for text in TEXTS]
    (raw / "files" / "z.jsonl").write_bytes(jsonl(good))
    is_packed = name.endswith(".gz")
    head, tail = {
        "jsonl": (b'{"text": "', b'"}\n'), "json": (b'[{"text": "', b'"}]'),
        "csv": (b'text,n\n"', b'",1\n'), "txt": (b"", b"\n"),
    }[name.split(".")[1]]  # fmt: skip
    with (raw / "files" / name).open("wb") as file:
        if is_packed:
            with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1) as packed:
                packed.write(head)
                for _ in range(LINE_BYTES >> 24):
                    packed.write(bytes(1 << 24))
                packed.write(tail)
        else:
            file.write(head)
            file.truncate(LINE_BYTES)  # sparse: takes no disk
            file.seek(0, os.SEEK_END)
            file.write(tail)
    job = Job(stage="clean", inputs={"raw": str(raw)}, settings={})
    job.settings = {"reading": {"max_ratio": 2000.0}} if is_packed else {}
    job.out, job.work = folder / "out", folder / "work"
    write_job(folder / "job.json", job)
    peak_mib = peak_of([sys.executable, "-m", "llm.clean", str(folder / "job.json")])
    summary = load_artifact(job.out).summary
    if name.endswith(".txt"):  # text is cut, so no record is too long
        assert summary["read_documents"] - summary["skipped"].get("duplicate", 0) < 10**6  # type: ignore[operator,union-attr]
    else:
        assert summary["skipped"] == {"longer than 12 MiB": 1}, summary["skipped"]
        assert summary["read_documents"] == len(TEXTS) + 1
    assert peak_mib <= MEMORY_MIB, f"{peak_mib:.0f} MiB"
    return peak_mib


def peak_of(command: Sequence[str]) -> float:
    """Run a command; return the peak memory in MiB of its largest process."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1]) / 1024


LONG_LINES = (
    ("a.jsonl", "text"), ("a.jsonl", "chats"), ("a.json", "text"), ("a.csv", "text"),
    ("a.txt", "text"), ("a.jsonl.gz", "text"),
)  # fmt: skip
"""Files with one, and their content."""
