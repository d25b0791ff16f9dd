"""Near duplicates: the clusters equal brute force, whatever the order of texts."""

import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from llm.artifact import ArtifactWriter
from llm.config import NearDuplicatesConfig
from llm.data.cleaning import minhash
from llm.data.cleaning.minhash import NearDuplicates, Signer, jaccard, rows_per_band
from llm.data.cleaning.ngrams import hash_distinct_ngrams
from llm.errors import ConfigError

pytest.importorskip("rensa", reason="needs the library that signs texts")
CONFIG = NearDuplicatesConfig(unit="document", min_words=5)


def make_texts(num_texts: int, num_words: int = 60) -> list[str]:
    """Return texts, half of them copies of others with up to one word in ten changed."""
    rng = random.Random(1)
    texts: list[list[str]] = []
    for _ in range(num_texts):
        if texts and rng.random() < 0.5:
            text = list(rng.choice(texts))
            for _ in range(rng.randrange(num_words // 10)):
                text[rng.randrange(num_words)] = str(rng.random())
        else:
            text = [f"word{rng.randrange(5000)}" for _ in range(num_words)]
        texts.append(text)
    return [" ".join(text) for text in texts]


def clusters(
    folder: Path, texts: Sequence[str], config: NearDuplicatesConfig = CONFIG
) -> list[int]:
    """Return the first text of each text's cluster, in the order of the list."""
    sign(folder, texts, config)
    with NearDuplicates([folder], config) as near:
        *_, first = near.find(np.arange(len(texts)), texts.__getitem__)
    return first.tolist()


def sign(folder: Path, texts: Sequence[str], config: NearDuplicatesConfig = CONFIG) -> None:
    with Signer(ArtifactWriter(folder), config) as signer:
        assert all(map(signer.add, texts))


def test_every_pair_that_brute_force_finds_is_in_one_cluster(tmp_path: Path) -> None:
    texts = make_texts(600)
    first = clusters(tmp_path / "near", texts)
    sets = [hash_distinct_ngrams(text, 5) for text in texts]
    linked = {number: {number} for number in range(len(texts))}
    pairs = [
        (one, other) for one in range(len(texts)) for other in range(one)
        if jaccard(sets[one], sets[other]) >= 0.8
    ]  # fmt: skip
    found = [first[one] == first[other] for one, other in pairs]
    # at exactly 0.8 the bands propose 99.8 % of the pairs, and the estimate passes 99.9 %
    assert len(pairs) > 100 and np.mean(found) >= 0.99
    for one, other in pairs:
        linked[one] |= linked[other]
        for number in linked[one]:
            linked[number] = linked[one]
    for number in range(len(texts)):
        assert first[number] in linked[number], "nothing is linked that brute force does not link"


def test_the_result_does_not_depend_on_the_order_texts_are_signed_in(tmp_path: Path) -> None:
    texts = make_texts(150)
    expected = clusters(tmp_path / "in order", texts)
    shuffled = np.random.default_rng(1).permutation(len(texts))
    folders = [tmp_path / f"shard {number}" for number in range(3)]
    for folder, numbers in zip(folders, np.split(shuffled, [0, 40]), strict=True):
        sign(folder, [texts[number] for number in numbers])
    with NearDuplicates(folders, CONFIG) as near:
        *_, first = near.find(np.argsort(shuffled), lambda number: texts[shuffled[number]])
    assert first.tolist() == expected
    assert len(set(expected)) < len(texts)


def test_texts_that_are_not_in_the_order_are_not_compared(tmp_path: Path) -> None:
    texts = make_texts(150)
    sign(tmp_path / "all", texts)
    order = np.arange(50, 150)
    with NearDuplicates([tmp_path / "all"], CONFIG) as near:
        *_, first = near.find(order, texts.__getitem__)
    assert first.tolist() == clusters(tmp_path / "some", texts[50:])


def test_the_first_texts_of_clusters_are_like_no_other(tmp_path: Path) -> None:
    texts = make_texts(300)
    kept = [texts[number] for number in sorted(set(clusters(tmp_path / "once", texts)))]
    assert clusters(tmp_path / "again", kept) == list(range(len(kept)))


def test_many_copies_of_one_text_are_compared_in_proportion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(minhash, "jaccard", lambda *sets: calls.append(1) or jaccard(*sets))
    text = " ".join(f"word{number}" for number in range(400))
    first = clusters(tmp_path / "near", [f"{text} {number}" for number in range(500)])
    assert set(first) == {0} and len(calls) == 499


def test_short_texts_are_not_compared(tmp_path: Path) -> None:
    config = NearDuplicatesConfig(unit="document", min_words=20)
    with Signer(ArtifactWriter(tmp_path), config) as signer:
        assert not signer.add("word " * 19) and signer.add("word " * 20)
    with NearDuplicates([tmp_path], config) as near:
        assert len(near) == 1


@pytest.mark.parametrize("min_jaccard", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_find_nearly_all_pairs_at_the_threshold(min_jaccard: float) -> None:
    rows = rows_per_band(min_jaccard)
    bands = 128 // rows
    misses = (np.random.default_rng(1).random((20_000, bands, rows)) >= min_jaccard).any(axis=2)
    assert misses.all(axis=1).mean() < 0.01


def test_without_the_library_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(ConfigError, match="pip install rensa"):
        Signer(ArtifactWriter(tmp_path), CONFIG)
