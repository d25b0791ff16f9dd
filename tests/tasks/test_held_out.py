"""Decontamination removes held-out chats from the training text."""

import json
import random
from pathlib import Path

from llm.data.documents import DocumentReader
from tests import tiny

WORDS = [f"word{number}" for number in range(2000)]


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=20))


def texts(folder: str, split: str) -> list[str]:
    file = DocumentReader(Path(folder), split)
    return ["\n".join(document.texts) for document in file.read(range(len(file)))]


def test_a_held_out_answer_is_dropped_from_the_corpus(tmp_path: Path) -> None:
    rng = random.Random(1)
    answers = [sentence(rng) for _ in range(40)]
    corpus = [{"text": sentence(rng)} for _ in range(40)]
    corpus += [{"text": f"{sentence(rng)} {answer} {sentence(rng)}"} for answer in answers]
    chats = [{"instruction": f"Question {n}?", "output": text} for n, text in enumerate(answers)]
    for name, records in (("corpus", corpus), ("chats", chats)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    paths = [f"download.{name}.path={tmp_path / name}.jsonl" for name in ("corpus", "chats")]

    def cleaned(action: str) -> tuple[set[str], set[str], object]:
        """Return the answers that are held out and those in the training text, and the skips."""
        overrides = [*paths, f"clean.decontamination.action={action}"]
        built = tiny.build(tmp_path / "artifacts", overrides, last="pack corpus")
        if action == "none":  # the corpus alone needs no chats
            built |= tiny.build(tmp_path / "artifacts", overrides, last="clean chats")
        held_out = "\n".join(texts(built["clean chats"].path, "validation"))
        training = "\n".join(texts(built["clean corpus"].path, "train"))
        return (
            {answer for answer in answers if answer in held_out},
            {answer for answer in answers if answer in training},
            built["clean corpus"].summary["skipped"],
        )

    held_out, in_training, skipped = cleaned("none")
    planted = held_out & in_training
    assert planted and skipped == {}
    assert cleaned("drop") == (held_out, in_training - held_out, {"contaminated": len(planted)})
