"""Mixtures: shares by tokens within one document, every document used, the same every time."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.artifact import Json, read_manifest
from llm.clean import clean
from llm.config import ShareConfig
from llm.data.mixture import DocumentSize, SourceTally, mix_sources
from llm.data.packed import HEADER, PackedSequences
from llm.errors import DataError
from llm.pack import pack
from tests.llm.cleaning import lines_of

Item = tuple[int, int, int]  # source, index in it, tokens
LENGTHS = st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=12), min_size=1, max_size=4)
WEIGHTS = st.lists(st.floats(0.1, 10), min_size=4, max_size=4)


def size_of(item: Item) -> DocumentSize:
    return DocumentSize(num_tokens=item[2], num_bytes=3 * item[2])


def run(
    lengths: list[list[int]], shares: list[ShareConfig]
) -> tuple[list[Item], list[SourceTally]]:
    tallies = [SourceTally() for _ in lengths]
    sources = [
        lambda number=number, found=found: iter(
            [(number, place, length) for place, length in enumerate(found)]
        )
        for number, found in enumerate(lengths)
    ]
    return list(mix_sources(shares, sources, size_of, tallies)), tallies


@given(LENGTHS, WEIGHTS)
def test_at_every_point_shares_are_within_one_document_of_their_weights(
    lengths: list[list[int]], weights: list[float]
) -> None:
    shares = [ShareConfig(weight=weight) for weight, _ in zip(weights, lengths, strict=False)]
    items, _ = run(lengths, shares)
    given_tokens = [0] * len(lengths)
    longest = [max(found) for found in lengths]
    for number, _, length in items:
        given_tokens[number] += length
        least = min(n / share.weight for n, share in zip(given_tokens, shares, strict=True))
        for n, share, one in zip(given_tokens, shares, longest, strict=True):
            assert n <= share.weight * least * (1 + 1e-9) + one  # rounding of the division


@given(LENGTHS, WEIGHTS)
def test_every_document_is_read_equally_often_within_one_and_that_is_counted(
    lengths: list[list[int]], weights: list[float]
) -> None:
    shares = [ShareConfig(weight=weight) for weight, _ in zip(weights, lengths, strict=False)]
    items, tallies = run(lengths, shares)
    assert (items, tallies) == run(lengths, shares)
    for number, (found, tally) in enumerate(zip(lengths, tallies, strict=True)):
        places = [place for source, place, _ in items if source == number]
        expected = islice((place for _ in iter(int, 1) for place in range(len(found))), len(places))
        assert places == list(expected), "in order, and again in the same order"
        assert tally.num_documents == len(places) >= len(found) == tally.num_distinct_documents
        assert tally.num_tokens == sum(n for source, _, n in items if source == number)
    counts = Counter(source for source, _, _ in items)
    assert any(counts[number] == len(found) for number, found in enumerate(lengths))


def test_one_source_is_itself() -> None:
    items, tallies = run([[5, 6, 7]], [ShareConfig(weight=3)])
    assert [place for _, place, _ in items] == [0, 1, 2]
    assert tallies[0].num_epochs == 1


@pytest.mark.parametrize(
    ("caps", "num_used"),
    [
        ({"max_tokens": 10}, 2), ({"max_tokens": 14}, 2), ({"max_tokens": 15}, 3),
        ({"max_bytes": 30}, 2), ({"max_bytes": 29}, 1), ({"max_tokens": 15, "max_bytes": 15}, 1),
    ],
)  # fmt: skip
def test_a_cap_takes_the_first_documents_and_reads_these_again(
    caps: dict[str, int], num_used: int
) -> None:
    items, tallies = run([[5, 5, 5, 5], [100]], [ShareConfig(**caps), ShareConfig()])
    assert {place for source, place, _ in items if source == 0} == set(range(num_used))
    assert tallies[0].num_distinct_documents == num_used
    assert 95 <= tallies[0].num_tokens <= 105
    assert tallies[0].num_epochs == pytest.approx(tallies[0].num_documents / num_used, abs=1e-3)


@pytest.mark.parametrize(("lengths", "cap"), [([], 0), ([5], 4)])
def test_a_source_that_gives_nothing_is_left_out(lengths: list[int], cap: int) -> None:
    shares = [ShareConfig(weight=1e-9), ShareConfig(max_tokens=cap)]
    items, tallies = run([[1, 2], lengths], shares)
    assert items == [(0, 0, 1), (0, 1, 2)]
    assert tallies[1] == SourceTally()


def raw_folder(folder: Path, texts: list[str]) -> Path:
    """An artifact of `download` with `texts`."""
    (folder / "files").mkdir(parents=True)
    source = {"kind": "files", "content": "text", "text_key": "text", "format": "auto"}
    (folder / "source.json").write_text(json.dumps(source))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "files/a.jsonl").write_text(lines)
    return folder


def ids_of_documents(folder: Path) -> list[str]:
    """The ids of a pack artifact's training documents, repeated as read."""
    found: list[str] = []
    for path in sorted(folder.glob("train/*.document_ids.bin")):
        data = path.read_bytes()[HEADER.size :]
        found += [data[place : place + 16].hex() for place in range(0, len(data), 16)]
    return found


def test_packed_sources_of_a_mixture_have_their_shares(
    tmp_path: Path,
    run_stage: Callable[..., tuple[Path, Mapping[str, Json]]],
    tokenizer_folder: Path,
) -> None:
    many = [f"number {n} of many, which says something of its own" for n in range(400)]
    few = [f"one of few: {n}" for n in range(40)]
    raws = {
        "raw_0": raw_folder(tmp_path / "raw_0", many),
        "raw_1": raw_folder(tmp_path / "raw_1", [*few, many[0]]),
    }
    documents, summary = run_stage(clean, {"validation_fraction": 0.1}, out="clean", **raws)
    assert summary["skipped"] == {"duplicate": 1}, "the sources are cleaned as one"
    assert json.loads((documents / "documents.json").read_bytes())["num_sources"] == 2
    train = lines_of(documents, "train")
    by_source = [{d["id"] for d in train if d["source"] == number} for number in range(2)]
    inputs = {"documents": documents, "tokenizer": tokenizer_folder}

    def packed(weights: list[float], out: str) -> tuple[Path, Mapping[str, Json]]:
        shares: list[Json] = [{"weight": weight} for weight in weights]
        return run_stage(pack, {"seq_len": 32, "shares": shares}, out=out, **inputs)

    folder, summary = packed([3, 1], "a")
    assert read_manifest(folder).digest == read_manifest(packed([3, 1], "b")[0]).digest
    report = json.loads((folder / "pack.json").read_bytes())["sources"]
    assert [source["asked_share"] for source in report] == [0.75, 0.25]
    assert [source["share"] for source in report] == pytest.approx([0.75, 0.25], abs=0.01)
    assert report[0]["epochs"] == 1 and report[1]["epochs"] == summary["source_1_epochs"] > 2
    found = Counter(ids_of_documents(folder))
    assert set(found) == by_source[0] | by_source[1]
    assert {found[one] for one in by_source[0]} == {1}
    times = {found[one] for one in by_source[1]}
    assert (
        max(times) - min(times) == 1
        and sum(found[one] for one in by_source[1]) == (report[1]["documents"])
    )
    rows = PackedSequences(folder, "train")
    assert rows.info.num_documents == sum(found.values())
    assert rows.info.num_tokens == sum(source["tokens"] for source in report)
    assert (
        PackedSequences(folder, "validation").info.num_documents == summary["validation_documents"]
    )
    with pytest.raises(DataError, match=r"sources\.2: none of its documents"):
        packed([3, 1, 1], "c")
