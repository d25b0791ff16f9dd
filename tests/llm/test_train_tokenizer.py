"""The stage `train_tokenizer`: a bounded sample, deterministic, with a correct summary."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from llm.artifact import Json, read_manifest
from llm.data.documents import DocumentReader, Message
from llm.errors import ConfigError, DataError
from llm.runtime.job import Interrupted, Job, write_job
from llm.tokenizer import pre_tokenization
from llm.tokenizer.load import load_tokenizer
from llm.train_tokenizer import draw_sample, limit_words, train_tokenizer

MakeDocuments = Callable[..., Path]
RunStage = Callable[..., tuple[Path, Mapping[str, Json]]]

ROOT = Path(__file__).parents[2]
SETTINGS = {"vocab_size": 500, "sample_bytes": 20_000}


def report_nothing(done: int, total: int, unit: str) -> None:
    pass


def test_the_vocabulary_has_the_size_asked_for_and_the_summary_is_true(
    make_documents: MakeDocuments, run_stage: RunStage, corpus: list[str]
) -> None:
    validation = corpus[-20:]
    documents = make_documents(corpus[:-20], validation)
    out, summary = run_stage(train_tokenizer, SETTINGS, documents=documents)
    tokenizer = load_tokenizer(out)
    assert tokenizer.vocab_size == summary["vocab_size"] == 500
    num_tokens = sum(map(len, tokenizer.encode_batch(validation)))
    num_bytes = sum(len(text.encode()) for text in validation)
    assert summary["bytes_per_token"] == pytest.approx(num_bytes / num_tokens)
    assert 19_990 <= summary["sampled_bytes"] <= 20_000
    assert 0 < summary["sampled_documents"] < len(corpus)


def test_a_tiny_corpus_gives_a_smaller_vocabulary_and_says_so(
    make_documents: MakeDocuments, run_stage: RunStage
) -> None:
    documents = make_documents(["one and one and one"], [])
    out, summary = run_stage(train_tokenizer, SETTINGS, documents=documents)
    assert 263 < summary["vocab_size"] < 300 == summary["asked_vocab_size"] - 200
    assert summary["bytes_per_token"] is None, "there is nothing to measure on"
    assert load_tokenizer(out).vocab_size == summary["vocab_size"]


def test_the_sample_holds_the_documents_of_smallest_hash_whatever_their_order(
    make_documents: MakeDocuments, corpus: list[str]
) -> None:
    def sample(texts: list[str], seed: int = 1, max_bytes: int = 20_000) -> list[str]:
        documents = DocumentReader(make_documents(texts, []), "train")
        drawn = list(draw_sample(documents, seed, max_bytes, report_nothing))
        assert sum(len(text.encode()) for text in drawn) <= max_bytes
        return drawn

    documents = DocumentReader(make_documents(corpus, []), "train")
    by_hash = sorted(
        documents.read(range(len(documents))),
        key=lambda document: hashlib.blake2b(
            document.id, key=(1).to_bytes(8, "big"), digest_size=8
        ).digest(),
    )
    joined = "".join(document.text for document in by_hash).encode()
    assert "".join(sample(corpus)).encode() == joined[:20_000]
    assert sample(corpus) == sample(corpus[::-1]) != sample(corpus, seed=2)
    assert sorted(sample(corpus, max_bytes=10**9)) == sorted(corpus)
    assert sample(["é" * 100], max_bytes=101) == ["é" * 50], "cut between characters"


def test_the_sample_ends_where_its_distinct_words_pass_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def limited(texts: list[str], max_bytes: int) -> list[str]:
        return list(limit_words(texts, max_bytes))

    texts = ["one two", "two one two", "three", "one"]
    assert limited(texts, 100) == texts
    assert limited(texts, 12) == texts  # "one", " ", "two", "three"
    assert limited(texts, 11) == texts[:2]
    assert limited(texts, 6) == []
    monkeypatch.setattr(pre_tokenization, "CHUNK_CHARACTERS", 6)
    long = "alpha\nbeta\nalpha\ngamma\n"
    assert limited([long], 100) == [long]
    assert limited([long], 12) == ["alpha\nbeta\nalpha"], "alpha, beta and the line's end"


def test_the_words_of_chats_are_learned_from(
    make_documents: MakeDocuments, run_stage: RunStage
) -> None:
    chat = [
        Message(role="user", content="zebra zebra zebra"),
        Message(role="assistant", content="quokka quokka quokka"),
    ]
    out, _ = run_stage(train_tokenizer, SETTINGS, documents=make_documents([chat], [chat]))
    tokenizer = load_tokenizer(out)
    assert [len(ids) for ids in tokenizer.encode_batch([" zebra", " quokka"])] == [1, 1]


def test_training_is_the_same_with_one_thread_and_two_and_again(
    make_documents: MakeDocuments, tmp_path: Path, corpus: list[str]
) -> None:
    documents = make_documents(corpus[:-20], corpus[-20:])
    digests: set[str] = set()
    for number, (threads, hash_seed) in enumerate([("1", "0"), ("2", "1"), ("2", "2")]):
        job = Job(
            stage="train_tokenizer",
            settings={"vocab_size": 2000, "sample_bytes": 10**6},
            inputs={"documents": str(documents)},
            out=tmp_path / f"out{number}",
            work=tmp_path / f"work{number}",
        )
        path = tmp_path / f"job{number}.json"
        write_job(path, job)
        environment = {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-m", "llm.train_tokenizer", str(path)]
        subprocess.run(command, check=True, env=os.environ | environment, cwd=ROOT)
        digests.add(read_manifest(job.out).digest)
    assert len(digests) == 1


@pytest.mark.parametrize("train", [[], [""]])
def test_no_text_is_refused(
    make_documents: MakeDocuments, run_stage: RunStage, train: list[str]
) -> None:
    documents = make_documents(train, ["text"])
    with pytest.raises(DataError, match=r"train: no text to learn a tokenizer from"):
        run_stage(train_tokenizer, SETTINGS, documents=documents)


def test_a_vocabulary_smaller_than_bytes_and_control_tokens_is_refused(
    make_documents: MakeDocuments, run_stage: RunStage
) -> None:
    with pytest.raises(ConfigError, match="vocab_size: found 256, expected >= 264"):
        run_stage(train_tokenizer, {"vocab_size": 256}, documents=make_documents(["x"], ["x"]))


def test_the_smallest_vocabulary_allowed_works(
    make_documents: MakeDocuments, run_stage: RunStage, corpus: list[str]
) -> None:
    documents = make_documents(corpus[:-1], corpus[-1:])
    out, summary = run_stage(train_tokenizer, {"vocab_size": 264}, documents=documents)
    tokenizer = load_tokenizer(out)
    assert summary["vocab_size"] == 264
    assert tokenizer.decode(tokenizer.encode_batch([corpus[0]])[0]) == corpus[0]


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece", "characters"])
@pytest.mark.parametrize("unit", ["bytes of documents hashed", "bytes drawn"])
def test_a_stop_while_reading_leaves_no_manifest(
    make_documents: MakeDocuments,
    run_stage: RunStage,
    tmp_path: Path,
    corpus: list[str],
    monkeypatch: pytest.MonkeyPatch,
    unit: str,
    kind: str,
) -> None:
    """Also where a library reads, in the middle of its training."""
    if kind == "sentencepiece":
        pytest.importorskip("sentencepiece")

    def stop(job: Job, done: int, total: int, found: str) -> None:
        if found == unit and done > total / 2:
            raise Interrupted("asked to stop")

    monkeypatch.setattr(Job, "report_progress", stop)
    with pytest.raises(Interrupted):
        run_stage(
            train_tokenizer, {**SETTINGS, "kind": kind}, documents=make_documents(corpus, corpus)
        )
    assert not (tmp_path / "out" / "manifest.json").exists()
