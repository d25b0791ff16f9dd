"""The stage `pack`: from documents to sequences, deterministic, with errors for bad inputs."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from llm import pack as pack_module
from llm.artifact import Json, read_manifest
from llm.data.chat import CHAT_FORMATS, RenderedChat, render_chat, truncate_left
from llm.data.documents import SPLITS, Message
from llm.data.packed import HEADER, PackedSequences
from llm.errors import ArtifactError, ConfigError, DataError
from llm.pack import pack
from llm.runtime.job import PROGRESS, Interrupted, Job
from llm.tokenizer.base import TOKENIZER_JSON
from llm.tokenizer.bpe import ByteLevelBPE
from llm.tokenizer.characters import ByteTokenizer, CharacterTokenizer
from tests.llm.cleaning import lines_of
from tests.llm.conftest import write_lines

MakeDocuments = Callable[..., Path]
RunStage = Callable[..., tuple[Path, Mapping[str, Json]]]

SHARED = Path(__file__).parents[2] / "../shared/data"


def chat(question: str, answer: str) -> list[Message]:
    return [Message(role="user", content=question), Message(role="assistant", content=answer)]


CHATS = [chat(f"what is {n} + {n}?", f"{n} and {n} make {2 * n}." * (n % 4)) for n in range(200)]


def contents_of_documents(folder: Path, split: str) -> dict[str, list[int]]:
    """Every document's tokens by its id, joined over sequences."""
    rows = PackedSequences(folder, split)
    ids = [
        data[place : place + 16].hex()
        for path in sorted(folder.glob(f"{split}/*.document_ids.bin"))
        for data in [path.read_bytes()[HEADER.size :]]
        for place in range(0, len(data), 16)
    ]
    contents: dict[str, list[int]] = {}
    all_tokens, _, all_ordinals = map(np.ndarray.tolist, rows.read(np.arange(rows.num_sequences)))
    for tokens, ordinals in zip(all_tokens, all_ordinals, strict=True):
        for position, token in enumerate(tokens):
            found = contents.setdefault(ids[ordinals[position]], [])
            is_repeated = position == 0 and bool(found)
            if token != rows.layout.pad_id and not is_repeated:
                found.append(token)
    assert len(ids) == len(contents) == rows.info.num_documents
    return contents


def test_every_document_is_restored_from_the_sequences(
    make_documents: MakeDocuments,
    run_stage: RunStage,
    tokenizer_folder: Path,
    tokenizer: ByteLevelBPE,
    corpus: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pack_module, "ENCODE_BATCH_BYTES", 2000)
    train, validation = corpus[:-5], [*corpus[-5:], "", "<|bos|> typed <|pad|>"]
    documents = make_documents(train, validation)
    out, summary = run_stage(pack, {"seq_len": 64}, documents=documents, tokenizer=tokenizer_folder)
    for split, texts in (("train", train), ("validation", validation)):
        rows = PackedSequences(out, split)
        contents = contents_of_documents(out, split)
        assert all(ids[0] == tokenizer.bos_id for ids in contents.values())
        texts_by_id = {record["id"]: record["text"] for record in lines_of(documents, split)}
        assert {name: tokenizer.decode(ids) for name, ids in contents.items()} == texts_by_id
        assert list(contents) != list(texts_by_id), "documents are shuffled"
        num_tokens = sum(map(len, tokenizer.encode_batch(texts))) + len(texts)
        assert (rows.info.num_tokens, rows.info.num_documents) == (num_tokens, len(texts))
        assert rows.info.num_bytes == sum(len(text.encode()) for text in texts)
        assert rows.info.num_target_tokens == num_tokens - 1
        assert summary[f"{split}_rows"] == rows.num_sequences
    assert not list(out.glob("*/*.mask.bin"))


def test_every_chat_is_restored_with_its_mask(
    make_documents: MakeDocuments,
    run_stage: RunStage,
    tokenizer_folder: Path,
    tokenizer: ByteLevelBPE,
) -> None:
    train, validation = CHATS[:150], CHATS[150:]
    documents = make_documents(train, validation)
    out, summary = run_stage(pack, {"seq_len": 64}, documents=documents, tokenizer=tokenizer_folder)
    rows = PackedSequences(out, "train")
    rendered = [render_chat(messages, tokenizer) for messages in train]
    cut = [RenderedChat(ids[:65], mask[:65]) for ids, mask in rendered]
    contents = contents_of_documents(out, "train").values()
    assert sorted(contents) == sorted(ids for ids, _ in cut)
    tokens, mask, _ = rows.read(np.arange(rows.num_sequences))
    assert mask.sum() == sum(sum(each) for _, each in cut)
    expected = sorted(
        token for ids, each in cut for token, is_target in zip(ids, each, strict=True) if is_target
    )
    assert sorted(tokens[mask].tolist()) == expected
    assert rows.info.num_bytes == len(tokenizer.decode_bytes(expected))
    num_long = sum(len(ids) > 65 for ids, _ in rendered)
    assert summary["train_truncated_chats"] == num_long > 0
    assert summary["train_cut_documents"] == 0, "no chat is in two sequences"


@pytest.mark.parametrize("chat_format", CHAT_FORMATS)
@pytest.mark.parametrize("long_chats", ["drop", "truncate_left", "truncate_right"])
def test_long_chats_are_dropped_or_cut_and_counted_in_every_format(
    long_chats: str,
    chat_format: str,
    make_documents: MakeDocuments,
    run_stage: RunStage,
    tmp_path: Path,
) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.chat_format = chat_format
    for name, data in tokenizer.to_files().items():
        (tmp_path / name).write_bytes(data)
    system = Message(role="system", content="S")
    short = chat("q", "a" * 9)
    long = [[system, *chat("q" * 9, letter * 300)] for letter in "xyz"]
    hopeless = [
        [system, *chat("q" * 300, "a")],  # no answer left at its beginning
        [Message(role="system", content="s" * 400), *chat("q", "aa")],  # no room for an answer
    ]
    documents = make_documents([short, *long, *hopeless], [short])
    out, summary = run_stage(
        pack,
        {"seq_len": 299, "long_chats": long_chats},
        documents=documents,
        tokenizer=tmp_path,
    )
    contents = contents_of_documents(out, "train")
    rendered = [render_chat(messages, tokenizer) for messages in (short, *long, *hopeless)]
    found = sorted(map(len, contents.values()))
    num_kept = {"drop": 1, "truncate_left": 5, "truncate_right": 4}[long_chats]
    assert found == sorted([len(rendered[0].ids), *[300] * (num_kept - 1)])
    expected = {
        "drop": (5, None),
        "truncate_left": (1, 4),
        "truncate_right": (2, 3),
    }[long_chats]
    counts = (summary.get("train_dropped_chats"), summary.get("train_truncated_chats"))
    assert counts == expected
    assert not [name for name in summary if name.startswith("validation") and "chats" in name]
    if long_chats == "truncate_left":
        wanted = [truncate_left(long[0], rendered[1], 300, tokenizer).ids]
        wanted.append(truncate_left(hopeless[0], rendered[4], 300, tokenizer).ids)
        assert all(ids in contents.values() for ids in wanted)
        assert tokenizer.decode_bytes(wanted[0]).strip().endswith(b"x" * 200)
        assert b"S" in tokenizer.decode_bytes(wanted[0]).split(b"x")[0]
    if long_chats == "truncate_right":
        assert rendered[1].ids[:300] in contents.values()


def test_a_split_of_chats_that_are_all_too_long_is_refused_with_the_counts(
    make_documents: MakeDocuments, run_stage: RunStage, tokenizer_folder: Path
) -> None:
    documents = make_documents([chat(f"{n} " * 99, "yes") for n in range(7)], CHATS[1:3])
    for long_chats in ("drop", "truncate_right"):
        with pytest.raises(
            DataError, match=r"train: no targets .* in 0 documents; dropped chats: 7"
        ):
            run_stage(
                pack,
                {"seq_len": 32, "long_chats": long_chats},
                documents=documents,
                tokenizer=tokenizer_folder,
            )


PAIRS = [
    ([Message(role="user", content=f"what is {n}?")], f"it is {n}" * (n % 5 + 1), f"no {n}")
    for n in range(60)
]


def write_pairs(folder: Path, pairs: Sequence[tuple[list[Message], str, str]]) -> Path:
    lines = [
        json.dumps(
            {"id": f"{n:032x}", "messages": m, "chosen": c, "rejected": r, "kind": f"{n % 2}"}
        )
        for n, (m, c, r) in enumerate(pairs)
    ]
    write_lines(folder, {"train": lines, "validation": lines[:9]}, "preferences")
    return folder


def test_a_pair_is_packed_whole_and_its_halves_are_found(
    tmp_path: Path, run_stage: RunStage, tokenizer_folder: Path, tokenizer: ByteLevelBPE
) -> None:
    long = ([Message(role="user", content="why? " * 9)], "so " * 30, "that " * 30)
    documents = write_pairs(tmp_path / "pairs", [*PAIRS, long])
    out, summary = run_stage(pack, {"seq_len": 96}, documents=documents, tokenizer=tokenizer_folder)
    rows = PackedSequences(out, "train")
    assert rows.layout.content == summary["content"] == "preferences"
    assert summary["train_dropped_pairs"] == 1 and "validation_dropped_pairs" not in summary
    assert rows.info.num_documents == len(PAIRS) and rows.info.num_cut_documents == 0
    arrays = rows.read(np.arange(rows.num_sequences))
    halves = arrays.half_ids(rows.layout.bos_id)
    found: list[tuple[list[int], list[bool]]] = []
    for row in range(rows.num_sequences):
        for half in range(int(halves[row].max()) + 1):
            where = halves[row] == half
            assert len(set(arrays.document_ids[row][where])) == 1, "a half is of one pair"
            found.append((arrays.tokens[row][where].tolist(), arrays.mask[row][where].tolist()))
    assert rows.num_sequences < len(PAIRS), "a row holds several pairs"
    expected = [
        render_chat([*messages, Message(role="assistant", content=answer)], tokenizer)
        for messages, *answers in PAIRS
        for answer in answers
    ]
    couples, wanted = (
        sorted(zip(each[::2], each[1::2], strict=True))
        for each in (found, [tuple(one) for one in expected])
    )
    assert couples == wanted
    assert rows.info.num_bytes == sum(len(c) + len(r) for _, c, r in PAIRS)
    assert {rows.kind(ordinal) for ordinal in range(len(PAIRS))} == {"0", "1"}


def test_pairs_that_are_all_too_long_are_refused(
    tmp_path: Path, run_stage: RunStage, tokenizer_folder: Path
) -> None:
    documents = write_pairs(tmp_path / "pairs", PAIRS)
    with pytest.raises(DataError, match=r"train: no targets .* dropped pairs: 60.*pack\.seq_len"):
        run_stage(pack, {"seq_len": 8}, documents=documents, tokenizer=tokenizer_folder)


def test_documents_with_unknown_characters_are_left_out_and_counted(
    make_documents: MakeDocuments, run_stage: RunStage, tmp_path: Path
) -> None:
    tokenizer = CharacterTokenizer.train(["ab"], has_byte_fallback=False)
    (tmp_path / "narrow").mkdir()
    (tmp_path / "narrow" / TOKENIZER_JSON).write_bytes(tokenizer.to_files()[TOKENIZER_JSON])
    documents = make_documents(["ab" * 9, "é", "ba", "abc"], ["aa"])
    out, summary = run_stage(
        pack, {"seq_len": 8}, documents=documents, tokenizer=tmp_path / "narrow"
    )
    contents = contents_of_documents(out, "train").values()
    assert sorted(map(tokenizer.decode, contents)) == ["ab" * 9, "ba"]
    assert summary["train_documents"] == 2
    assert summary["train_documents_with_unknown_characters"] == 2
    assert "validation_documents_with_unknown_characters" not in summary


def test_packing_again_gives_the_same_bytes_and_another_seed_another_order(
    make_documents: MakeDocuments, run_stage: RunStage, tokenizer_folder: Path, corpus: list[str]
) -> None:
    inputs = {"documents": make_documents(corpus, corpus[:9]), "tokenizer": tokenizer_folder}
    digests = [
        read_manifest(run_stage(pack, {"seq_len": 32}, seed=seed, out=name, **inputs)[0]).digest
        for seed, name in ((1, "a"), (1, "b"), (2, "c"))
    ]
    assert digests[0] == digests[1] != digests[2]


def test_the_size_of_batches_does_not_change_sequences_of_text(
    make_documents: MakeDocuments,
    run_stage: RunStage,
    tokenizer_folder: Path,
    corpus: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = {"documents": make_documents(corpus, corpus[:9]), "tokenizer": tokenizer_folder}
    digests: set[str] = set()
    for size in (1, 1000, 1 << 20):
        monkeypatch.setattr(pack_module, "ENCODE_BATCH_BYTES", size)
        out, _ = run_stage(pack, {"seq_len": 32}, out=f"out{size}", **inputs)
        digests.add(read_manifest(out).digest)
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        ([], ["text"], r"train: no documents, expected at least one"),
        (["text " * 99], [], r"validation: no documents.*clean\.validation_fraction"),
        (["short"], ["text"], r"tokens, less than one sequence of pack\.seq_len \+ 1 = 33; lower"),
        (["text " * 99], [""], r"validation: no targets"),
        ([CHATS[0][:1]], CHATS[1:3], r"train: no targets to learn"),
    ],
)
def test_too_little_data_is_refused(
    make_documents: MakeDocuments,
    run_stage: RunStage,
    tokenizer_folder: Path,
    train: Sequence[str],
    validation: Sequence[str],
    message: str,
) -> None:
    documents = make_documents(train, validation)
    with pytest.raises(DataError, match=message):
        run_stage(pack, {"seq_len": 32}, documents=documents, tokenizer=tokenizer_folder)


def test_training_text_of_exactly_one_sequence_is_enough(
    make_documents: MakeDocuments,
    run_stage: RunStage,
    tokenizer_folder: Path,
    tokenizer: ByteLevelBPE,
) -> None:
    text = tokenizer.decode(tokenizer.encode_batch(["import argparse as parser " * 9])[0][:32])
    assert len(tokenizer.encode_batch([text])[0]) == 32
    inputs = {"documents": make_documents([text], ["x"]), "tokenizer": tokenizer_folder}
    out, _ = run_stage(pack, {"seq_len": 32}, **inputs)
    assert PackedSequences(out, "train").num_sequences == 1
    with pytest.raises(DataError, match="33 tokens, less than one sequence"):
        run_stage(pack, {"seq_len": 33}, out="longer", **inputs)


def test_bad_inputs_are_named(
    make_documents: MakeDocuments, run_stage: RunStage, tokenizer_folder: Path, corpus: list[str]
) -> None:
    inputs = {"documents": make_documents(corpus, corpus[:9]), "tokenizer": tokenizer_folder}
    with pytest.raises(ConfigError, match="seq_len"):
        run_stage(pack, {"seq_len": 4}, **inputs)
    lines = {split: [json.dumps(one) for one in lines_of(inputs["documents"], split)]
             for split in SPLITS}  # fmt: skip
    write_lines(inputs["documents"], lines | {"validation": ["{}"]})
    with pytest.raises(ArtifactError, match=r"validation/00000\.jsonl:1: not a document"):
        run_stage(pack, {"seq_len": 32}, **inputs)
    (tokenizer_folder / TOKENIZER_JSON).write_text("{}")
    with pytest.raises(ArtifactError, match=TOKENIZER_JSON):
        run_stage(pack, {"seq_len": 32}, **inputs)


def test_progress_is_reported_in_bytes_of_both_splits(
    make_documents: MakeDocuments,
    run_stage: RunStage,
    tokenizer_folder: Path,
    tmp_path: Path,
    corpus: list[str],
) -> None:
    documents = make_documents(corpus, corpus[:9])
    run_stage(pack, {"seq_len": 32}, documents=documents, tokenizer=tokenizer_folder)
    total = sum(path.stat().st_size for path in documents.glob("*/*.jsonl"))
    progress = json.loads((tmp_path / "out.work" / PROGRESS).read_text())
    assert progress == {"done": total, "total": total, "unit": "bytes"}


def test_a_stop_leaves_no_manifest_and_a_new_start_gives_the_same_bytes(
    make_documents: MakeDocuments,
    run_stage: RunStage,
    tokenizer_folder: Path,
    tmp_path: Path,
    corpus: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = {"documents": make_documents(corpus, corpus[:9]), "tokenizer": tokenizer_folder}
    undisturbed, _ = run_stage(pack, {"seq_len": 32}, out="undisturbed", **inputs)
    monkeypatch.setattr(pack_module, "ENCODE_BATCH_BYTES", 10_000)

    def stop(job: Job, done: int, total: int, unit: str) -> None:
        if done > total // 2:
            raise Interrupted("asked to stop")

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Job, "report_progress", stop)
        run_stage(pack, {"seq_len": 32}, **inputs)
    assert not (tmp_path / "out" / "manifest.json").exists()
    again, _ = run_stage(pack, {"seq_len": 32}, **inputs)
    assert read_manifest(again).digest == read_manifest(undisturbed).digest


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared example data is not beside the project")
def test_real_instructions_fill_97_of_100_positions(
    make_documents: MakeDocuments, run_stage: RunStage, tokenizer_folder: Path
) -> None:
    records = json.loads((SHARED / "instruction-data.json").read_text(encoding="utf-8"))
    chats = [
        chat(f"{record['instruction']}\n{record['input']}".strip(), record["output"])
        for record in records
    ]
    documents = make_documents(chats[:1000], chats[1000:])
    out, summary = run_stage(
        pack, {"seq_len": 256}, documents=documents, tokenizer=tokenizer_folder
    )
    rows = PackedSequences(out, "train")
    assert rows.info.num_padding_tokens <= 0.03 * rows.num_sequences * 257
    assert summary["train_cut_documents"] == 0


def test_pack_keeps_the_kind_of_each_chat(
    tmp_path: Path, run_stage: RunStage, tokenizer_folder: Path
) -> None:
    chats = [
        {
            "id": f"{number:032x}",
            "kind": f"kind {number % 3}",
            "messages": [
                {"role": "user", "content": f"say {number}"},
                {"role": "assistant", "content": "x" * (number % 7 + 1)},
            ],
        }
        for number in range(50)
    ]
    lines = [json.dumps(chat) for chat in chats]
    folder = tmp_path / "documents"
    write_lines(folder, {"train": lines, "validation": lines}, "chats")
    out, _ = run_stage(pack, {"seq_len": 64}, documents=folder, tokenizer=tokenizer_folder)
    rows = PackedSequences(out, "train")
    data = (out / "train/00000.document_ids.bin").read_bytes()[HEADER.size :]
    numbers = [int.from_bytes(data[place : place + 16], "big") for place in range(0, 800, 16)]
    assert [rows.kind(ordinal) for ordinal in range(50)] == [f"kind {n % 3}" for n in numbers]
