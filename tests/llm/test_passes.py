"""The optional steps of cleaning together: counted, independent of order, idempotent."""

import hashlib
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm.artifact import Json
from llm.errors import DataError
from tests.llm.cleaning import TEXTS, corpus, jsonl, run_clean, texts_of

pytest.importorskip("rensa", reason="needs the library that signs texts")
WORDS = [f"word{number}" for number in range(3000)]
NEAR: Mapping[str, Json] = {"unit": "document", "min_words": 8}
DROP: Mapping[str, Json] = {"action": "drop", "ngram_words": 4}
EVERYTHING: dict[str, Json] = {
    "line_ends": "lf", "unicode_form": "nfc", "masks_emails": True, "masks_ip_addresses": True,
    "filters": "gopher+c4", "near_duplicates": NEAR, "decontamination": DROP,  # type: ignore[dict-item]
    "c4": {"has_terminal_punctuation": False, "min_sentences": 0, "min_words_per_line": 2},
    "gopher": {"min_words": 3, "min_stop_words": 0, "max_top_2gram_fraction": 1.0,
               "max_top_3gram_fraction": 1.0, "max_top_4gram_fraction": 1.0},
    "min_document_bytes": 10, "validation_fraction": 0.2,
}  # fmt: skip
STEPS = ["read", "filters", "length", "exact duplicates", "near duplicates", "decontamination"]


def sentences(seed: int, num_words: int = 30) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=num_words)) + "."


def near_copies(seed: int, num_copies: int) -> list[str]:
    return [f"{sentences(seed)} Copy {number}." for number in range(num_copies)]


def kept(outputs: Mapping[str, Any]) -> set[str]:
    return texts_of(outputs["train"] + outputs["validation"])


def test_every_step_is_a_row_of_the_funnel(tmp_path: Path) -> None:
    texts = [sentences(number) for number in range(100)]
    texts += ["so {short}", "Two a@b.de", "x", texts[0], *near_copies(500, 4)]
    summary, outputs, _ = run_clean(
        tmp_path, {"a.jsonl": corpus(texts) + b"{\n"}, **EVERYTHING | {"decontamination": {}}
    )  # fmt: skip
    assert summary["skipped"] == {
        "malformed JSON": 1, "c4: curly bracket": 1, "gopher: too few words": 2, "duplicate": 1,
        "near duplicate": 3,
    }  # fmt: skip
    assert [row["step"] for row in summary["funnel"]] == STEPS  # type: ignore[index,union-attr]
    assert [row["dropped"] for row in summary["funnel"]] == [1, 3, 0, 1, 3, 0]  # type: ignore[index,union-attr]
    assert summary["funnel"][-1]["left"] == len(kept(outputs))  # type: ignore[index]
    assert summary["masked_emails"] == 1 and summary["removed_lines"] == {"too few words": 1}
    assert {example["reason"] for example in outputs["rejected"]} == set(summary["skipped"])  # type: ignore[arg-type]


def test_of_near_duplicates_one_is_kept_and_validation_goes_before_training(tmp_path: Path) -> None:
    groups = [near_copies(seed, 12) for seed in range(60)]
    texts = [text for group in groups for text in group]
    summary, outputs, _ = run_clean(
        tmp_path, {"a.jsonl": corpus(texts)}, near_duplicates=dict(NEAR)
    )
    _, alone, _ = run_clean(tmp_path / "alone", {"a.jsonl": corpus(texts)})
    assert summary["skipped"] == {"near duplicate": 60 * 11}
    for group in groups:
        (survivor,) = kept(outputs) & set(group)
        in_validation = texts_of(alone["validation"]) & set(group)
        assert not in_validation or survivor in in_validation
        assert survivor in texts_of(alone["validation"]) or survivor in texts_of(outputs["train"])


def test_chats_are_compared_whole_and_never_filtered(tmp_path: Path) -> None:
    chats: list[Json] = [
        {"instruction": text, "output": "Yes."}
        for text in [*map(sentences, range(60)), *near_copies(99, 5)]
    ]
    summary, _, _ = run_clean(
        tmp_path, {"a.jsonl": jsonl(chats)}, "chats", filters="gopher+c4",
        near_duplicates=dict(NEAR),
    )  # fmt: skip
    assert summary["skipped"] == {"near duplicate": 4}


def test_every_step_works_on_both_answers_of_a_pair(tmp_path: Path) -> None:
    """Masks, duplicates, near duplicates and decontamination see the whole pair."""
    texts = [sentences(number) for number in range(200)]
    pairs: list[Json] = [
        {"prompt": f"Which, {number}?", "chosen": text, "rejected": "Mail a@b.de."}
        for number, text in enumerate(texts)
    ]
    masked: Json = {"prompt": "Mail?", "chosen": "To a@b.de", "rejected": "To c@d.de"}
    _, before, _ = run_clean(
        tmp_path / "before", {"a.jsonl": jsonl(pairs)}, "preferences", masks_emails=True
    )
    assert {pair["rejected"] for pair in before["train"]} == {"Mail [email]."}
    secret = " ".join(str(before["validation"][0]["chosen"]).split()[:15])
    secret = f"{secret} {sentences(900)}"
    leak: Json = {"prompt": "Leak?", "chosen": "x", "rejected": secret, "group": "train"}
    copies: list[Json] = [
        {"prompt": "Near?", "chosen": "x", "rejected": text} for text in near_copies(99, 5)
    ]
    summary, after, _ = run_clean(
        tmp_path / "after", {"a.jsonl": jsonl([*pairs, pairs[0], masked, leak, *copies])},
        "preferences", filters="gopher+c4", masks_emails=True, near_duplicates=dict(NEAR),
        decontamination=dict(DROP),
    )  # fmt: skip
    assert summary["skipped"] == {
        "duplicate": 1, "equal answers": 1, "contaminated": 1, "near duplicate": 4,
    }  # fmt: skip
    assert summary["masked_emails"] == 203
    assert not {"Leak?", "Mail?"} & {pair["messages"][0]["content"] for pair in after["train"]}  # type: ignore[index]
    assert summary["train_bytes"] == sum(
        len(str(text)) for pair in after["train"]
        for text in (pair["messages"][0]["content"], pair["chosen"], pair["rejected"])  # type: ignore[index]
    )  # fmt: skip


def test_training_documents_that_give_validation_away_are_dropped_or_counted(
    tmp_path: Path,
) -> None:
    texts = [sentences(number) for number in range(200)]
    _, outputs, _ = run_clean(tmp_path, {"a.jsonl": corpus(texts)})
    secret, lesson = sorted(texts_of(outputs["validation"]))[0], "One two three four"
    words = secret.split()
    leaks = [f"Someone wrote {' '.join(words[n : n + 13])} {sentences(900 + n)}" for n in range(8)]
    leaks += [f"{sentences(800)} {lesson.lower()}"]
    for action, contaminated in (("count", {}), ("drop", {"contaminated": None})):
        decontamination: dict[str, Json] = {"action": action, "ngram_words": 4, "texts": [lesson]}
        summary, cleaned, _ = run_clean(
            tmp_path / action, {"a.jsonl": corpus(texts + leaks)}, decontamination=decontamination
        )
        in_training = [leak for leak in leaks if leak in texts_of(outputs["train"])]
        left = set(leaks) & texts_of(cleaned["train"])
        assert not in_training
        assert summary["contaminated_documents"] == 9 - len(
            set(leaks) & texts_of(cleaned["validation"])
        )
        assert set(summary["skipped"]) == set(contaminated)  # type: ignore[arg-type]
        assert bool(left) == (action == "count")


def test_validation_documents_that_are_dropped_protect_nothing(tmp_path: Path) -> None:
    copies = near_copies(7, 30)
    variants = (f"{sentences(number)} {' '.join(copies[number % 30].split()[-4:])}"
                for number in range(900, 1100))  # fmt: skip
    leaks = [text for text in variants if hashlib.sha256(text.encode()).digest()[0] >= 128]
    files = {"a.jsonl": corpus([*map(sentences, range(60)), *copies, *leaks])}
    chosen: dict[str, Json] = {"near_duplicates": dict(NEAR), "validation_fraction": 0.5}
    _, before, _ = run_clean(tmp_path / "before", files, **chosen)
    _, after, _ = run_clean(tmp_path / "after", files, **chosen, decontamination=dict(DROP))
    (survivor,) = texts_of(before["validation"]) & set(copies)
    assert set(leaks) <= texts_of(before["train"])
    expected = {leak for leak in leaks if leak.split()[-4:] == survivor.split()[-4:]}
    assert expected and set(leaks) - texts_of(after["train"]) == expected


PARTS = st.lists(
    st.sampled_from([
        "", "\n\n", " ", "x", "{", "a@b.de", "8.8.8.8", "[1]", "e\u0301\r\n",
        "one two three four. ",
        *(sentences(number, 12) + "\n\n" for number in range(4)),
    ]), max_size=6,
).map("".join)  # fmt: skip
DOCUMENTS = st.lists(PARTS | st.text(max_size=30), max_size=12)


@given(DOCUMENTS, st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_kept_documents_do_not_depend_on_order_and_cleaning_is_idempotent(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], rng: random.Random
) -> None:
    folder, chosen = tmp_path_factory.mktemp("any"), EVERYTHING
    others = [sentences(1000 + number, 14) for number in range(30)]
    _, outputs, digest = run_clean(folder / "0", {"a.jsonl": corpus(others + texts)}, **chosen)
    assert run_clean(folder / "1", {"a.jsonl": corpus(others + texts)}, **chosen)[2] == digest
    shuffled = rng.sample(texts, len(texts))
    cut = rng.randrange(len(texts) + 1)
    files = {"b.jsonl": corpus(shuffled[:cut]), "a.jsonl": corpus(shuffled[cut:] + others)}
    _, again, _ = run_clean(folder / "2", files, **chosen)
    for side in ("train", "validation"):
        assert texts_of(outputs[side]) == texts_of(again[side])
    summary, again, _ = run_clean(
        folder / "3", {"a.jsonl": corpus(sorted(kept(outputs)))}, **chosen
    )
    assert summary["skipped"] == {} and kept(again) == kept(outputs)


@given(DOCUMENTS, DOCUMENTS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_more_documents_move_none_to_the_other_side(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], more: list[str]
) -> None:
    folder, chosen = tmp_path_factory.mktemp("any"), EVERYTHING
    others = [sentences(1000 + number, 14) for number in range(30)]
    _, few, _ = run_clean(folder / "few", {"a.jsonl": corpus(others + texts)}, **chosen)
    _, many, _ = run_clean(folder / "many", {"a.jsonl": corpus(others + texts + more)}, **chosen)
    ids = {
        (name, side): {document["id"] for document in outputs[side]}
        for name, outputs in (("few", few), ("many", many))
        for side in ("train", "validation")
    }
    assert not ids["few", "train"] & ids["many", "validation"]
    assert not ids["few", "validation"] & ids["many", "train"]


def test_a_side_that_the_rules_left_empty_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="200 gopher: too few words"):
        run_clean(tmp_path, {"a.jsonl": corpus(TEXTS)}, filters="gopher")
