"""Bits per byte: against loops over single tokens, formulas and resampling."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from llm.artifact import Json
from llm.config import ModelConfig
from llm.data.packed import PackedSequences
from llm.errors import ArtifactError
from llm.evaluation import bits_per_byte
from llm.evaluation.bits_per_byte import DocumentScores, ratio, score_documents, target_nats
from llm.model.transformer import Transformer
from llm.pack import pack
from llm.tokenizer.bpe import ByteLevelBPE

SEQ_LEN = 16
SHAPE = ModelConfig(num_layers=2, d_model=32, num_heads=2, num_kv_heads=1, d_ff=48)
CHATS = [
    [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word * count}]
    for count, word in enumerate(["yes", "no", "ü", ""], start=1)
]

MakeDocuments = Callable[..., Path]
RunStage = Callable[..., tuple[Path, Mapping[str, Json]]]
MakeRows = Callable[[Sequence[object]], PackedSequences]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products are slower on two threads, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_rows(
    make_documents: MakeDocuments, tokenizer_folder: Path, run_stage: RunStage
) -> MakeRows:
    """Return a function that packs documents as the validation split."""

    def make(documents: Sequence[object]) -> PackedSequences:
        train = ["a text to train on " * 5] if isinstance(documents[0], str) else CHATS
        folder, _ = run_stage(
            pack,
            {"seq_len": SEQ_LEN},
            out="rows",
            documents=make_documents(train, documents),
            tokenizer=tokenizer_folder,
        )
        return PackedSequences(folder, "validation")

    return make


@pytest.fixture
def texts(corpus: list[str]) -> list[str]:
    """Documents of very unequal length, from one byte to several sequences."""
    return ["x", corpus[3][:80], "naïve — 文字 🙂", corpus[4][:30], corpus[5][:50], "\n"]


@pytest.fixture
def model(tokenizer: ByteLevelBPE) -> Transformer:
    """Random weights, large enough that token losses differ a lot."""
    made = Transformer(SHAPE, tokenizer.vocab_size, SEQ_LEN)
    made.initialize(torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter *= 5
    return made.eval()


def score(
    model: Transformer,
    rows: PackedSequences,
    tokenizer: ByteLevelBPE,
    document_mask: bool = False,
    has_control_targets: bool = False,
) -> DocumentScores:
    return score_documents(
        model,
        rows,
        tokenizer.token_bytes,
        document_mask=document_mask,
        has_control_targets=has_control_targets,
    )


def cost(model: Transformer, context: list[int], target: int) -> float:
    """-log p(target) after `context`, from one forward pass of one sequence."""
    with torch.no_grad():
        logits = model(torch.tensor([context]))[0, -1].double()
    return float(torch.logsumexp(logits, 0) - logits[target])


@pytest.mark.parametrize("document_mask", [False, True])
def test_every_text_token_is_scored_once_in_its_context_for_its_document(
    make_rows: MakeRows,
    texts: list[str],
    model: Transformer,
    tokenizer: ByteLevelBPE,
    document_mask: bool,
) -> None:
    rows = make_rows(texts)
    nats, num_bytes = np.zeros(len(texts)), np.zeros(len(texts), dtype=int)
    document = -1
    stream = b""
    for index in range(rows.num_sequences):
        row = rows.read([index]).tokens[0].tolist()
        document += index == 0  # the first row begins with a bos that is no target
        begins = 0  # where the document goes on, or begins, in this row
        for place in range(1, SEQ_LEN + 1):
            token = row[place]
            if token == tokenizer.bos_id:
                document, begins = document + 1, place
            elif token != tokenizer.pad_id:
                context = row[begins if document_mask else 0 : place]
                nats[document] += cost(model, context, token)
                num_bytes[document] += len(tokenizer.decode_bytes([token]))
                stream += tokenizer.decode_bytes([token])
    found = score(model, rows, tokenizer, document_mask=document_mask)
    # a row read at once, and alone up to every token: sums in another order, in fp32
    np.testing.assert_allclose(found.nats, nats, rtol=1e-5)
    np.testing.assert_array_equal(found.num_bytes, num_bytes)
    assert sorted(num_bytes) == sorted(len(text.encode()) for text in texts)
    assert len(stream) == rows.info.num_bytes and all(text.encode() in stream for text in texts)
    metric = found.bits_per_byte()
    assert metric.value == pytest.approx(nats.sum() / math.log(2) / num_bytes.sum(), rel=1e-5)
    assert metric.num_examples == len(texts)


def test_a_uniform_model_has_the_logarithm_of_the_vocabulary_as_loss(
    make_rows: MakeRows, texts: list[str], tokenizer: ByteLevelBPE
) -> None:
    rows = make_rows(texts)
    model = Transformer(SHAPE, tokenizer.vocab_size, SEQ_LEN)
    torch.nn.init.zeros_(model.embedding.weight)
    num_tokens = sum(len(ids) for ids in tokenizer.encode_batch(texts))
    num_bytes = sum(len(text.encode()) for text in texts)
    scores = score(model, rows, tokenizer)
    assert scores.num_tokens.sum() == num_tokens
    expected = num_tokens * math.log2(tokenizer.vocab_size) / num_bytes
    assert scores.bits_per_byte().value == pytest.approx(expected, rel=1e-5)
    assert scores.nats_per_token().value == pytest.approx(math.log(tokenizer.vocab_size), rel=1e-5)


def test_of_chats_exactly_the_answers_and_their_ends_are_scored(
    make_rows: MakeRows, model: Transformer, tokenizer: ByteLevelBPE
) -> None:
    rows = make_rows(CHATS)
    found = score(model, rows, tokenizer, has_control_targets=True)
    answers = [chat[1]["content"] for chat in CHATS]
    lengths = [len(ids) + 1 for ids in tokenizer.encode_batch(answers)]
    assert sorted(found.num_tokens) == sorted(lengths)
    assert sorted(found.num_bytes) == sorted(len(answer.encode()) for answer in answers)
    without = score(model, rows, tokenizer)
    assert found.num_tokens.sum() - without.num_tokens.sum() == len(CHATS)


@pytest.mark.parametrize("logits", [1, 20_000])
def test_batch_and_chunk_sizes_change_nothing(
    make_rows: MakeRows,
    texts: list[str],
    model: Transformer,
    tokenizer: ByteLevelBPE,
    monkeypatch: pytest.MonkeyPatch,
    logits: int,
) -> None:
    rows = make_rows(texts)
    whole = score(model, rows, tokenizer)
    monkeypatch.setattr(bits_per_byte, "LOGITS_PER_BATCH", logits)
    pieces = score(model, rows, tokenizer)
    np.testing.assert_allclose(pieces.nats, whole.nats, rtol=1e-5)
    np.testing.assert_array_equal(pieces.num_tokens, whole.num_tokens)
    np.testing.assert_array_equal(pieces.num_bytes, whole.num_bytes)


def test_scoring_keeps_no_gradient(model: Transformer) -> None:
    assert not target_nats(model, torch.zeros(1, 5, dtype=torch.long)).requires_grad


def test_a_model_without_finite_losses_is_refused(
    make_rows: MakeRows, texts: list[str], model: Transformer, tokenizer: ByteLevelBPE
) -> None:
    with torch.no_grad():
        model.norm.weight[3] = math.nan
    with pytest.raises(ArtifactError, match="not finite"):
        score(model, make_rows(texts), tokenizer)


def unequal_documents() -> tuple[np.ndarray, np.ndarray]:
    """Nats and bytes of 400 documents whose lengths span three orders of magnitude."""
    rng = np.random.default_rng(1)
    num_bytes = np.exp(rng.uniform(2, 9, 400)).astype(np.int64)
    return num_bytes * rng.normal(2.0, 0.5, 400), num_bytes


def test_the_standard_error_is_what_resampling_documents_gives() -> None:
    bits, num_bytes = unequal_documents()
    found = ratio(bits, num_bytes, "bits per byte")
    assert found.value == pytest.approx(bits.sum() / num_bytes.sum(), rel=1e-5)
    rng = np.random.default_rng(2)
    drawn = rng.integers(0, len(bits), (4000, len(bits)))
    values = bits[drawn].sum(axis=1) / num_bytes[drawn].sum(axis=1)
    # 4000 draws know a deviation to about 1 %; linearizing costs a few more
    assert found.standard_error == pytest.approx(values.std(), rel=0.06)


def test_the_standard_error_of_equal_documents_is_that_of_their_mean() -> None:
    bits = np.array([1.0, 2.0, 4.0, 9.0]) * 10
    found = ratio(bits, np.full(4, 10), "bits per byte")
    expected = np.std([1.0, 2.0, 4.0, 9.0], ddof=1) / math.sqrt(4)
    assert found.standard_error == pytest.approx(expected, rel=1e-5)


def test_documents_without_a_target_are_not_counted_and_one_alone_has_no_error() -> None:
    found = ratio(np.array([3.0, 0.0]), np.array([2, 0]), "bits per byte")
    assert (found.value, found.num_examples, found.standard_error) == (1.5, 1, None)
