"""Control tokens that a user types stay text (promise 16); any text comes back, and training is the
same on any machine (promise 17).

Every kind of tokenizer, as it was made, saved and loaded, and sent out to transformers.
"""

import argparse
import functools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llm.artifact import Json, load_artifact
from llm.clean import clean
from llm.data.chat import render_chats
from llm.data.documents import Message
from llm.exchange.hf_tokenizer import exported_files
from llm.exchange.import_tokenizer import import_tokenizer
from llm.runtime.job import Job, write_job
from llm.tokenizer.base import (
    CONTROL_TOKENS,
    MARK,
    TOKENIZER_CONFIG_JSON,
    TOKENIZER_JSON,
    Tokenizer,
)
from llm.tokenizer.characters import CharacterTokenizer
from llm.tokenizer.gpt2 import load_gpt2
from tests.chaos.counting import Figure
from tests.chaos.small_data import run
from tests.llm.tokenizer_makers import BEGIN, FRAGMENTS, MAKERS, save_and_load, train_library

ROOT = Path(__file__).parents[2]
GPT2_FILES = ROOT / "../shared/data/gpt2"
CORPUS = Path(argparse.__file__).read_text(encoding="utf-8").split("\n\n\n")
ROLES = ("system", "user", "assistant")
BATCH = 1000
TYPED = (
    *CONTROL_TOKENS, *(MARK + token for token in CONTROL_TOKENS), "<|endoftext|>",
    "<|begin_of_text|>", "<tool_call>", "<|", "|>", "end", "user", "<s>", "</s>", "<unk>",
)  # fmt: skip
"""Names of control tokens, those by which they go out to transformers, and parts of names."""

Make = Callable[[], Tokenizer]


def imported(form: str) -> Tokenizer:
    """Return a tokenizer put together as others have it, and read here."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / TOKENIZER_JSON).write_text(train_library(form, CORPUS).to_str())
        (Path(name) / TOKENIZER_CONFIG_JSON).write_text(json.dumps({"bos_token": BEGIN[form]}))
        return import_tokenizer(Path(name))


def narrow() -> Tokenizer:
    """Return characters without bytes, which says no others."""
    return CharacterTokenizer.train([*FRAGMENTS, *TYPED, *CORPUS], has_byte_fallback=False)


TOKENIZERS: dict[str, Make] = {
    **{name: functools.partial(make, CORPUS) for name, make in MAKERS.items()},
    "characters without bytes": narrow,
    **{f"imported {form}": functools.partial(imported, form) for form in BEGIN},
    **({"gpt2": functools.partial(load_gpt2, GPT2_FILES)} if GPT2_FILES.is_dir() else {}),
}


def typed_text(rng: random.Random) -> str:
    """Return what a user types who wants control."""
    return "".join(rng.choices((*TYPED, *FRAGMENTS), k=rng.randint(1, 6)))


def any_text(rng: random.Random) -> str:
    """Return a text of hard pieces, of any characters, or of any bytes."""
    choice = rng.random()
    if choice < 0.4:
        return "".join(rng.choices((*TYPED, *FRAGMENTS), k=rng.randint(0, 8)))
    if choice < 0.7:  # all but halves of surrogate pairs
        points = (rng.randrange(0x110000 - 0x800) for _ in range(rng.randint(1, 8)))
        return "".join(chr(point if point < 0xD800 else point + 0x800) for point in points)
    data = rng.randbytes(rng.randint(1, 16))
    return data.decode("latin-1") if choice < 0.85 else data.decode(errors="replace")


def batches(count: int) -> Iterator[int]:
    """Yield sizes of batches that are `count` together."""
    for start in range(0, count, BATCH):
        yield min(BATCH, count - start)


def try_control_tokens(make: Make, count: int, seed: int, folder: Path) -> Figure:
    """Encode `count` texts and as many chats with each of a tokenizer's forms."""
    figure, rng = Figure(name=""), random.Random(seed)
    made = make()
    forms = {"made": made, "loaded": save_and_load(made, folder)}
    theirs = _exported(made, folder / "exported")
    for size in batches(count):
        texts = [typed_text(rng) for _ in range(size)]
        chats = [_chat(rng) for _ in range(size)]
        for form, tokenizer in forms.items():
            _count_texts(figure, form, tokenizer, texts, tokenizer.encode_batch(texts))
            rendered = [list(chat.ids) for chat in render_chats(chats, tokenizer)]
            _count_chats(figure, form, tokenizer, chats, rendered)
        plain = [text for text in texts if MARK not in text]
        _count_texts(figure, "exported", made, plain, theirs(plain)["input_ids"])
        split = theirs(texts, split_special_tokens=True)["input_ids"]
        _count_texts(figure, "exported, split", made, texts, split)
        out = theirs.apply_chat_template(chats, return_dict=False)
        _count_chats(figure, "exported", made, chats, out)
    return figure


def _exported(made: Tokenizer, folder: Path) -> Any:
    """Return what AutoTokenizer makes of it."""
    import transformers

    folder.mkdir()
    for name, data in exported_files(made, 64).items():
        (folder / name).write_bytes(data)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder / "again")
    return transformers.AutoTokenizer.from_pretrained(folder / "again")


def _chat(rng: random.Random) -> list[Message]:
    return [
        Message(role=rng.choice(ROLES), content=typed_text(rng)) for _ in range(rng.randint(1, 3))
    ]


def _count_texts(
    figure: Figure, form: str, tokenizer: Tokenizer, texts: Sequence[str],
    encoded: Sequence[Sequence[int]],
) -> None:  # fmt: skip
    control = set(tokenizer.control_ids)
    figure.num_tried += len(texts)
    for text, ids in zip(texts, encoded, strict=True):
        if control.intersection(ids):
            figure.failures.append(f"{form}: {text!r} gave {control.intersection(ids)}")


def _count_chats(
    figure: Figure, form: str, tokenizer: Tokenizer, chats: Sequence[Sequence[Message]],
    rendered: Sequence[Sequence[int]],
) -> None:  # fmt: skip
    control = set(tokenizer.control_ids)
    roles = dict(zip(ROLES, (tokenizer.system_id, tokenizer.user_id, tokenizer.assistant_id),
                     strict=True))  # fmt: skip
    figure.num_tried += len(chats)
    for chat, ids in zip(chats, rendered, strict=True):
        expected = [tokenizer.bos_id]
        for message in chat:
            expected += [roles[message["role"]], tokenizer.end_id]
        if [index for index in ids if index in control] != expected:
            figure.failures.append(f"{form}: {chat!r}")


def try_round_trips(make: Make, count: int, seed: int, folder: Path) -> Figure:
    """Encode `count` texts as made, and decode them as loaded, byte for byte."""
    figure, rng = Figure(name=""), random.Random(seed)
    made = make()
    loaded = save_and_load(made, folder)
    known = "".join(loaded.decode([index]) for index in range(loaded.vocab_size))
    for size in batches(count):
        texts = [any_text(rng) for _ in range(size)]
        if not made.can_encode("\U0010fffe"):  # it says its own characters alone
            texts = ["".join(rng.choices(known, k=rng.randint(0, 12))) for _ in range(size)]
        figure.num_tried += size
        for text, ids in zip(texts, made.encode_batch(texts), strict=True):
            if loaded.decode_bytes(ids) != text.encode() or loaded.decode(ids) != text:
                figure.failures.append(repr(text))
    return figure


TRAININGS: dict[str, dict[str, Json]] = {
    "bpe": {"kind": "bpe", "vocab_size": 2000},
    "bpe gpt4": {"kind": "bpe", "vocab_size": 2000, "pre_tokenization": "gpt4"},
    "unigram": {"kind": "sentencepiece", "vocab_size": 2000},
    "sentencepiece bpe": {"kind": "sentencepiece", "vocab_size": 2000, "algorithm": "bpe"},
    "characters": {"kind": "characters"},
}


def try_trainings(names: Sequence[str], threads: Sequence[int], folder: Path) -> Figure:
    """Train each kind once for each number of threads, in processes of their own."""
    figure = Figure(name="")
    raw = folder / "raw"
    (raw / "files").mkdir(parents=True)
    (raw / "files" / "a.txt").write_text("\n\n\n".join(CORPUS))
    source = {"kind": "files", "content": "text", "text_key": "text", "format": "auto"}
    (raw / "source.json").write_text(json.dumps(source))
    documents = run(folder, clean, {"text_document_bytes": 2000}, "corpus", raw=raw)
    for name in names:
        digests = [
            _digest_of_training(folder / f"{name} {number}", name, documents, count, number)
            for number, count in enumerate(threads)
        ]
        figure.num_tried += len(digests)
        others = [digest for digest in digests if digest != digests[0]]
        figure.failures += [f"{name}: {other}, not {digests[0]}" for other in others]
    return figure


def _digest_of_training(
    folder: Path, name: str, documents: Path, num_threads: int, hash_seed: int
) -> str:
    job = Job(stage="train_tokenizer", settings=TRAININGS[name], seed=1)
    job.inputs, job.out, job.work = {"documents": str(documents)}, folder / "out", folder / "work"
    folder.mkdir()
    write_job(folder / "job.json", job)
    threads = {"RAYON_NUM_THREADS": str(num_threads), "PYTHONHASHSEED": str(hash_seed)}
    command = [sys.executable, "-m", "llm.train_tokenizer", str(folder / "job.json")]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=os.environ | threads)
    return load_artifact(job.out).digest
