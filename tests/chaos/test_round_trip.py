"""Any text comes back from its ids, and training gives the same bytes again (promise 17)."""

from pathlib import Path

import pytest

from tests.chaos.tokenizer_promises import TOKENIZERS, TRAININGS, try_round_trips, try_trainings

TRIES = 1000


@pytest.mark.parametrize("kind", list(TOKENIZERS))
def test_any_text_comes_back_from_its_ids(kind: str, tmp_path: Path) -> None:
    if kind in ("unigram", "sentencepiece bpe"):
        pytest.importorskip("sentencepiece")
    figure = try_round_trips(TOKENIZERS[kind], TRIES, 1, tmp_path)
    assert figure.num_tried == TRIES and figure.failures == []


@pytest.mark.parametrize("kind", ["bpe", "unigram", "sentencepiece bpe"])
def test_training_gives_the_same_bytes_with_one_thread_and_with_two(
    kind: str, tmp_path: Path
) -> None:
    if TRAININGS[kind]["kind"] == "sentencepiece":
        pytest.importorskip("sentencepiece")
    assert try_trainings([kind], [1, 2], tmp_path).failures == []
