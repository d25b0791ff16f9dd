"""Compare all kinds of tokenizers on one text, and their speed with that of the library.

    python benchmarks/tokenizer_kinds.py                      # the standard library, all kinds
    python benchmarks/tokenizer_kinds.py --text FILE --kind "bpe 4k" --gpt2 FOLDER --to FOLDER

Each is trained on the text that it is measured on. `fromscratch tokenizers` compares those of runs.
Speeds are megabytes of text per second of processor time, of a tokenizer with an empty word cache;
`library` is `encode_batch` of `tokenizers` on the same texts.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as LibraryTokenizer

from flows.compare_tokenizers import measure_tokenizers, read_texts, write_report
from flows.display import print_tokenizers
from llm.config import TrainTokenizerConfig
from llm.data.sources.stdlib import corpus_documents
from llm.tokenizer.base import TOKENIZER_JSON
from llm.train_tokenizer import make_tokenizer

VARIANTS = {
    "bpe 32k": TrainTokenizerConfig(vocab_size=32_768),
    "bpe 32k, gpt4": TrainTokenizerConfig(vocab_size=32_768, pre_tokenization="gpt4"),
    "bpe 4k": TrainTokenizerConfig(vocab_size=4096),
    "sentencepiece bpe 4k": TrainTokenizerConfig(kind="sentencepiece", algorithm="bpe"),
    "sentencepiece unigram 4k": TrainTokenizerConfig(kind="sentencepiece"),
    "characters": TrainTokenizerConfig(kind="characters"),
    "bytes": TrainTokenizerConfig(kind="bytes"),
}


def library_speed(folder: Path, texts: Sequence[str]) -> float | None:
    """Return MB per second of `encode_batch`, if the library can read the tokenizer."""
    data = (folder / TOKENIZER_JSON).read_text(encoding="utf-8")
    if "kind" in json.loads(data):
        return None
    library = LibraryTokenizer.from_str(data)
    started = time.process_time()
    for start in range(0, len(texts), 1000):
        for encoding in library.encode_batch(texts[start : start + 1000], add_special_tokens=False):
            encoding.ids  # noqa: B018  # made when it is read
    return sum(len(text.encode()) for text in texts) / 1e6 / (time.process_time() - started)


def main() -> None:
    """Train the chosen kinds and print their measurements."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", type=Path, help="a text file; default: the standard library")
    parser.add_argument("--kind", action="append", choices=VARIANTS, help="default: all")
    parser.add_argument("--gpt2", type=Path, help="folder of encoder.json and vocab.bpe")
    parser.add_argument("--to", type=Path, help="folder for all measurements and a plot")
    options = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = "1"  # before the library starts its threads
    texts = read_texts(options.text) if options.text else list(corpus_documents())
    kinds = {name: VARIANTS[name] for name in options.kind or VARIANTS}
    if options.gpt2:
        kinds["gpt2"] = TrainTokenizerConfig(kind="gpt2", path=str(options.gpt2))
    with tempfile.TemporaryDirectory() as root:
        folders: dict[str, Path] = {}
        for number, (name, settings) in enumerate(kinds.items()):
            folders[name] = Path(root) / str(number)
            folders[name].mkdir()
            for file, data in make_tokenizer(settings, texts).to_files().items():
                (folders[name] / file).write_bytes(data)
        measured = measure_tokenizers(folders, texts)
        print(f"{len(texts):,} documents, {measured[0].report.num_bytes / 1e6:.1f} MB")
        print_tokenizers(measured)
        for tokenizer in measured:
            if speed := library_speed(folders[tokenizer.name], texts):
                ratio = tokenizer.speed.encode_megabytes_per_second / speed
                print(f"{tokenizer.name}: library {speed:.1f} MB/s, ours {ratio:.1f} of it")
    if options.to:
        write_report(measured, options.to)


if __name__ == "__main__":
    main()
