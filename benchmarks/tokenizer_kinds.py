"""What every kind of tokenizer makes of one text, and how fast, beside the library's own encoding.

    python benchmarks/tokenizer_kinds.py                          # the standard library, all kinds
    python benchmarks/tokenizer_kinds.py --text FILE --folder artifacts/train_tokenizer/DIGEST
    python benchmarks/tokenizer_kinds.py --gpt2 FOLDER --plot lengths.png

Speeds are megabytes of text for each second of processor time, of a tokenizer just loaded, that
remembers no word yet. `library` is `encode_batch` of `tokenizers` on the same texts; `to rows` is
the stage pack, from documents to rows on disk.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer as LibraryTokenizer

from llm.artifact import ArtifactWriter
from llm.config import TrainTokenizerConfig
from llm.data.stdlib import corpus_documents
from llm.job import Job
from llm.pack import pack
from llm.tokenizer.base import TOKENIZER_JSON
from llm.tokenizer.load import load_tokenizer
from llm.tokenizer.report import TokenizerReport, measure_tokenizer
from llm.train_tokenizer import make_tokenizer
from tasks.mlflow_tokenizer import draw_lengths

KINDS = {
    "bpe 32k": TrainTokenizerConfig(vocab_size=32_768),
    "bpe 32k, gpt4": TrainTokenizerConfig(vocab_size=32_768, splitting="gpt4"),
    "bpe 4k": TrainTokenizerConfig(vocab_size=4096),
    "sentencepiece bpe 4k": TrainTokenizerConfig(kind="sentencepiece", algorithm="bpe"),
    "sentencepiece unigram 4k": TrainTokenizerConfig(kind="sentencepiece"),
    "characters": TrainTokenizerConfig(kind="characters"),
    "bytes": TrainTokenizerConfig(kind="bytes"),
}
CHUNK_CHARACTERS = 4000


def read_texts(path: Path | None) -> list[str]:
    """Return the file in pieces, or the documents of the standard library."""
    if path is None:
        return list(corpus_documents())
    text = path.read_text(encoding="utf-8")
    return [text[i : i + CHUNK_CHARACTERS] for i in range(0, len(text), CHUNK_CHARACTERS)]


def library_speed(folder: Path, texts: Sequence[str]) -> float | None:
    """Return MB a second of `encode_batch`, ids read, where the library can read the tokenizer."""
    data = (folder / TOKENIZER_JSON).read_text(encoding="utf-8")
    if "kind" in json.loads(data):
        return None
    library = LibraryTokenizer.from_str(data)
    started = time.process_time()
    for start in range(0, len(texts), 1000):
        for encoding in library.encode_batch(texts[start : start + 1000], add_special_tokens=False):
            encoding.ids  # noqa: B018  # made when it is read
    return sum(len(text.encode()) for text in texts) / 1e6 / (time.process_time() - started)


def pack_speed(folder: Path, documents: Path, num_bytes: int) -> float:
    """Return MB a second of the stage pack."""
    with tempfile.TemporaryDirectory() as place:
        job = Job(
            stage="pack",
            settings={"seq_len": 1024},
            inputs={"documents": str(documents), "tokenizer": str(folder)},
            work=Path(place),
        )
        started = time.process_time()
        pack(job, ArtifactWriter(Path(place) / "out"))
        return num_bytes / 1e6 / (time.process_time() - started)


def write_documents(folder: Path, texts: Sequence[str]) -> None:
    """Write the texts as clean does, the last of them for validation."""
    folder.mkdir()
    (folder / "documents.json").write_text('{"content": "text"}')
    lines = [json.dumps({"id": f"{i:032x}", "text": text}) for i, text in enumerate(texts)]
    (folder / "train.jsonl").write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    (folder / "validation.jsonl").write_text(lines[-1] + "\n", encoding="utf-8")


def measure(
    folders: Mapping[str, Path], texts: Sequence[str], documents: Path
) -> tuple[Table, dict[str, TokenizerReport]]:
    """Measure each tokenizer; return a table, and the reports by name."""
    reports: dict[str, TokenizerReport] = {}
    table = Table(box=None, header_style="bold")
    for heading in (
        "tokenizer", "ids", "tokens\na word", "bytes\na token", "tokens a\ncharacter",
        "single\nbytes", "round trips\nfailed", "encode", "decode", "library", "ratio", "to rows",
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "tokenizer" else "right")
    for name, folder in folders.items():
        report, speed = measure_tokenizer(load_tokenizer(folder), texts)
        reports[name] = report
        encode, library = speed.encode_megabytes_per_second, library_speed(folder, texts)
        table.add_row(
            name,
            f"{report.vocab_size:,}",
            f"{report.tokens_per_word:.2f}",
            f"{report.bytes_per_token:.2f}",
            f"{report.tokens_per_character:.3f}",
            f"{report.single_byte_share:.1%}",
            str(report.num_round_trip_failures),
            f"{encode:.1f}",
            f"{speed.decode_megabytes_per_second:.1f}",
            f"{library:.1f}" if library else "",
            f"{encode / library:.1f}" if library else "",
            f"{pack_speed(folder, documents, report.num_bytes):.1f}",
        )
    return table, reports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", type=Path, help="a text file; default: the standard library")
    parser.add_argument("--folder", type=Path, action="append", default=[], help="a tokenizer's")
    parser.add_argument("--kind", action="append", default=[], choices=KINDS, help="of those made")
    parser.add_argument("--gpt2", type=Path, help="folder of encoder.json and vocab.bpe")
    parser.add_argument("--plot", type=Path, help="PNG of the lengths of documents")
    options = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = "1"  # read when the library first encodes
    texts = read_texts(options.text)
    num_bytes = sum(len(text.encode()) for text in texts)
    kinds = {name: KINDS[name] for name in options.kind or ([] if options.folder else KINDS)}
    if options.gpt2:
        kinds["gpt2"] = TrainTokenizerConfig(kind="gpt2", path=str(options.gpt2))
    with tempfile.TemporaryDirectory() as place:
        folders = {folder.name[:12]: folder for folder in options.folder}
        for number, (name, settings) in enumerate(kinds.items()):
            folders[name] = Path(place) / str(number)
            folders[name].mkdir()
            for file, data in make_tokenizer(settings, texts).to_files().items():
                (folders[name] / file).write_bytes(data)
        write_documents(Path(place) / "documents", texts)
        table, reports = measure(folders, texts, Path(place) / "documents")
    console = Console(width=150)
    console.print(f"{len(texts):,} documents, {num_bytes / 1e6:.1f} MB; speeds in MB a second")
    console.print(table)
    if options.plot:
        lengths = {name: report.lengths for name, report in reports.items()}
        draw_lengths(lengths).savefig(options.plot)


if __name__ == "__main__":
    main()
