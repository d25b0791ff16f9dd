"""The report's figures, counted here by hand."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from llm.artifact import Json, read_manifest
from llm.tokenizer.characters import ByteTokenizer, CharacterTokenizer
from llm.tokenizer.report import REPORT_JSON, measure_tokenizer
from llm.train_tokenizer import train_tokenizer

MakeDocuments = Callable[..., Path]
RunStage = Callable[..., tuple[Path, Mapping[str, Json]]]


def test_figures_of_bytes_are_those_of_the_text() -> None:
    report, speed = measure_tokenizer(ByteTokenizer(), ["one two", "é\n", ""])
    assert (report.num_documents, report.num_refused_documents) == (3, 0)
    assert (report.num_bytes, report.num_characters, report.num_words) == (10, 9, 3)
    assert report.num_tokens == report.num_single_byte_tokens == 10
    assert report.num_round_trip_failures == 0
    assert report.lengths == [[7, 7], [2, 3], [0, 0]]
    assert (report.tokens_per_word, report.bytes_per_token) == (10 / 3, 1)
    assert (report.tokens_per_character, report.single_byte_share) == (10 / 9, 1)
    assert min(speed.encode_megabytes_per_second, speed.decode_megabytes_per_second) > 0


def test_documents_the_vocabulary_cannot_say_are_counted() -> None:
    report, _ = measure_tokenizer(CharacterTokenizer.train(["é"], False), ["éé", "e", "é"])
    assert (report.num_documents, report.num_refused_documents) == (2, 1)
    assert (report.num_tokens, report.num_single_byte_tokens, report.num_bytes) == (3, 0, 6)


def test_a_round_trip_that_fails_is_counted() -> None:
    class Broken(ByteTokenizer):
        def decode_bytes(self, ids: object) -> bytes:
            return b"one"

    report, _ = measure_tokenizer(Broken(), ["one", "two"])
    assert report.num_round_trip_failures == 1


def test_nothing_has_no_figures() -> None:
    report, _ = measure_tokenizer(ByteTokenizer(), [])
    assert (report.num_tokens, report.tokens_per_word, report.bytes_per_token) == (0, 0, 0)


def test_the_stage_writes_the_report_and_its_bytes_say_nothing_of_speed(
    make_documents: MakeDocuments, run_stage: RunStage, corpus: list[str]
) -> None:
    documents = make_documents(corpus[:-9], corpus[-9:])
    for kind in ("bpe", "bytes"):
        digests: set[str] = set()
        for name in ("first", "second"):
            out, summary = run_stage(
                train_tokenizer,
                {"kind": kind, "vocab_size": 500},
                out=f"{kind} {name}",
                documents=documents,
            )
            report = json.loads((out / REPORT_JSON).read_bytes())
            assert report["num_documents"] == 9 and report["num_round_trip_failures"] == 0
            assert summary["bytes_per_token"] == report["num_bytes"] / report["num_tokens"]
            digests.add(read_manifest(out).digest)
        assert len(digests) == 1
