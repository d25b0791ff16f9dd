"""Measure training a large tokenizer, and encoding beside the library's own."""

import argparse
import os
import random
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from data_stages import HERE, Figure, library_texts, run_stage, varied, write_documents
from tokenizers import Tokenizer as LibraryTokenizer

from llm.config import RuntimeConfig
from llm.tokenizer.base import TOKENIZER_JSON

VOCAB_SIZE = 32_768
CALL_TEXTS = 1000
WIKITEXT = HERE / "../shared/data/wikitext2"
WORD = re.compile(r"[A-Za-z]{4,}")
ARTICLE = re.compile(r"^(?= = [^=])", re.MULTILINE)


def measure_train(options: argparse.Namespace, folder: Path) -> Iterator[Figure]:
    """Memory and time of training a BPE of 32k tokens, and whether runs give equal bytes."""
    texts = varied(library_texts(), options.megabytes * 1_000_000)
    write_documents(folder / "documents", texts)
    settings = {"vocab_size": VOCAB_SIZE, "sample_bytes": options.megabytes * 1_000_000}
    digests: set[str] = set()
    num_runs = 0
    for threads in (1, 2):
        peaks, seconds = [], []
        for _ in range(options.repeats):
            num_runs += 1
            run = run_stage(
                folder / f"run{num_runs}",
                "train_tokenizer",
                settings,
                {"documents": folder / "documents"},
                environment={"RAYON_NUM_THREADS": str(threads)},
            )
            digests.add(run.digest)
            peaks.append(run.peak_mib)
            seconds.append(run.seconds)
        megabytes = run.summary["sampled_bytes"] / 1e6
        yield Figure(
            measure=f"train a BPE of 32k on {megabytes:.0f} MB, threads: {threads}",
            value=f"{max(peaks):.0f} MiB, {np.median(seconds):.0f} s",
            target="<= 2048 MiB",
        )
    yield Figure(
        measure=f"digests of {num_runs} trainings",
        value=f"{len(digests)}: {' '.join(sorted(digests))}",
        target="1",
    )


def measure_encode(options: argparse.Namespace, folder: Path) -> Iterator[Figure]:
    """Speed of the stage pack, from documents to files, beside the library's `encode_batch`.

    One worker and one thread each, in turn. The first figure includes the start of the process,
    which is measured with almost no text; the second does not.
    """
    os.environ["RAYON_NUM_THREADS"] = "1"  # before the library starts its threads
    for number, (name, texts) in enumerate(_corpora(options.megabytes * 1_000_000)):
        yield _encode_figure(name, list(texts), options.repeats, folder / str(number))


def _encode_figure(name: str, texts: Sequence[str], repeats: int, folder: Path) -> Figure:
    write_documents(folder / "documents", texts)
    write_documents(folder / "few", ["one", "two " * 2000])
    tokenizer = run_stage(
        folder / "tokenizer",
        "train_tokenizer",
        {"vocab_size": VOCAB_SIZE},
        {"documents": folder / "documents"},
    ).folder
    library = LibraryTokenizer.from_file(str(tokenizer / TOKENIZER_JSON))
    seconds: dict[str, list[float]] = {"few": [], "documents": [], "library": []}
    for turn in range(repeats):
        for part in ("few", "documents"):
            run = run_stage(
                folder / f"{part}{turn}",
                "pack",
                {"seq_len": 1024},
                {"documents": folder / part, "tokenizer": tokenizer},
                runtime=RuntimeConfig(shard_workers=1),
            )
            seconds[part].append(run.seconds)
        seconds["library"].append(_library_seconds(library, texts))
    start, stage, by_library = (float(np.median(found)) for found in seconds.values())
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    return Figure(
        measure=f"encode {name}, {megabytes:.0f} MB, to sequences",
        value=f"{megabytes / stage:.1f} MB/s ({megabytes / (stage - start):.1f} once started),"
        f" library {megabytes / by_library:.1f}, {by_library / stage:.2f}x",
        target=">= 5 MB/s, >= 0.9x",
    )


def _library_seconds(library: LibraryTokenizer, texts: Sequence[str]) -> float:
    started_at = time.monotonic()
    for start in range(0, len(texts), CALL_TEXTS):
        for encoding in library.encode_batch(
            texts[start : start + CALL_TEXTS], add_special_tokens=False
        ):
            encoding.ids  # noqa: B018  # made when it is read
    return time.monotonic() - started_at


def _corpora(num_bytes: int) -> Iterator[tuple[str, Iterable[str]]]:
    """Yield names and texts of corpora: each text once, and varied to `num_bytes`."""
    corpora = {"the standard library": library_texts()}
    if WIKITEXT.is_dir():
        text = "".join((WIKITEXT / name).read_text() for name in ("valid.txt", "test.txt"))
        corpora["WikiText-2"] = [article for article in ARTICLE.split(text) if article.strip()]
    for name, texts in corpora.items():
        yield f"{name} varied", varied(texts, num_bytes)
        yield f"{name} once", texts
    yield "words that never repeat", _new_words(library_texts(), num_bytes)


def _new_words(texts: Sequence[str], num_bytes: int) -> Iterator[str]:
    """Yield about `num_bytes` of words like those of `texts`, almost all different.

    The worst case for an encoder with a cache of words: heads and tails of random words, joined.
    """
    words = sorted({word for text in texts for word in WORD.findall(text)})
    rng = random.Random(1)
    while num_bytes > 0:
        heads, tails = (rng.choices(words, k=1000) for _ in range(2))
        text = " ".join(
            head[: 1 + len(head) // 2] + tail[len(tail) // 2 :]
            for head, tail in zip(heads, tails, strict=True)
        )
        num_bytes -= len(text)
        yield text
