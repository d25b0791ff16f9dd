"""Generation: the cache and the batch change nothing, and sampling follows the probabilities."""

import collections

import pytest
import torch

from llm.errors import DataError
from llm.inference import generate as module
from llm.inference.generate import generate
from llm.model.transformer import Transformer
from tests.llm.training_setup import SEQ_LEN, tiny_model

PROMPTS = [[7], [5, 6, 7, 8, 9, 10, 11], [300, 2], [1] * 20, [9, 9, 9], [42] * SEQ_LEN]


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Weights large enough that greedy choices are far from ties and vary with the prompt."""
    made = tiny_model(vocab_size=601, tie_embeddings=False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.3, generator=generator)
    return made


def without_cache(model: Transformer, prompt: list[int], max_new_tokens: int) -> list[int]:
    """Greedy output the slow way: the whole text is read anew for each token."""
    tokens = list(prompt)
    while len(tokens) <= SEQ_LEN and len(tokens) - len(prompt) < max_new_tokens:
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("rows_per_batch", [1, 2, 64])
def test_batched_greedy_output_equals_reading_everything_anew(
    model: Transformer, rows_per_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROWS_PER_BATCH", rows_per_batch)
    found = generate(model, PROMPTS, max_new_tokens=15, stop_ids=[])
    assert found == [without_cache(model, prompt, 15) for prompt in PROMPTS]
    assert len(set(map(tuple, found))) == len(PROMPTS)


def test_the_text_ends_where_the_context_does(model: Transformer) -> None:
    found = generate(model, PROMPTS, max_new_tokens=100, stop_ids=[])
    assert [len(new) for new in found] == [SEQ_LEN + 1 - len(prompt) for prompt in PROMPTS]
    assert found == [without_cache(model, prompt, 100) for prompt in PROMPTS]


def test_a_stop_id_ends_its_row_alone_and_is_not_returned(model: Transformer) -> None:
    whole = generate(model, PROMPTS, max_new_tokens=10, stop_ids=[])
    stop = whole[1][4]
    found = generate(model, PROMPTS, max_new_tokens=10, stop_ids=[stop])
    expected = [new[: new.index(stop)] if stop in new else new for new in whole]
    assert found == expected != whole


def test_sampling_depends_on_seed_and_place_alone(model: Transformer) -> None:
    settings = {"max_new_tokens": 8, "stop_ids": [], "temperature": 1.5}
    prompts = [[5, 6]] * 3
    first = generate(model, prompts, seed=1, **settings)
    assert first == generate(model, prompts, seed=1, **settings)
    assert first != generate(model, prompts, seed=2, **settings)
    assert len(set(map(tuple, first))) == 3
    assert first == generate(model, [*prompts, [1] * 9, [4]], seed=1, **settings)[:3]


def test_samples_have_the_model_s_frequencies() -> None:
    model = tiny_model(vocab_size=12)
    with torch.no_grad():
        model.embedding.weight.mul_(40)
        chances = (model(torch.tensor([[3, 4]]))[0, -1] / 0.7).softmax(-1)
    found = generate(model, [[3, 4]] * 4000, max_new_tokens=1, stop_ids=[], temperature=0.7)
    counts = collections.Counter(new[0] for new in found)
    for token, chance in enumerate(chances.tolist()):
        error = 4 * (chance * (1 - chance) / 4000) ** 0.5  # four standard errors
        assert counts[token] / 4000 == pytest.approx(chance, abs=error + 1e-9), token


def test_top_k_draws_from_the_k_likeliest_and_one_is_greedy(model: Transformer) -> None:
    greedy = generate(model, PROMPTS[:4], max_new_tokens=6, stop_ids=[])
    hot = {"max_new_tokens": 6, "stop_ids": [], "temperature": 100.0}
    assert generate(model, PROMPTS[:4], top_k=1, **hot) == greedy
    with torch.no_grad():
        likeliest = set(model(torch.tensor([[7]]))[0, -1].topk(5).indices.tolist())
    drawn = generate(model, [[7]] * 200, max_new_tokens=1, stop_ids=[], temperature=100.0, top_k=5)
    assert {new[0] for new in drawn} == likeliest


def test_a_padded_vocabulary_is_never_drawn_from(model: Transformer) -> None:
    drawn = generate(model, [[7]] * 500, max_new_tokens=3, stop_ids=[], temperature=1e6)
    assert max(max(new) for new in drawn) <= 600


def test_no_prompts_and_no_new_tokens_give_nothing(model: Transformer) -> None:
    assert generate(model, [], max_new_tokens=5, stop_ids=[]) == []
    assert generate(model, PROMPTS, max_new_tokens=0, stop_ids=[]) == [[]] * len(PROMPTS)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt 1: found 0 tokens, expected 1 to 32"),
        ([1] * (SEQ_LEN + 1), "prompt 1: found 33 tokens, expected 1 to 32"),
        ([601], "prompt 1: found ids from 601 to 601, expected 0 to 600"),
        ([-1, 3], "prompt 1: found ids from -1 to 3"),
    ],
)
def test_impossible_prompts_are_refused_by_number(
    model: Transformer, prompt: list[int], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        generate(model, [[1], prompt], max_new_tokens=3, stop_ids=[])


def test_numbers_below_zero_are_refused(model: Transformer) -> None:
    for wrong in ({"temperature": -0.1}, {"top_k": -1}):
        with pytest.raises(ValueError, match="expected none below 0"):
            generate(model, [[1]], max_new_tokens=3, stop_ids=[], **wrong)  # type: ignore[arg-type]


def test_the_model_is_left_in_the_mode_it_was_in(model: Transformer) -> None:
    for is_training in (True, False):
        model.train(is_training)
        generate(model, [[1]], max_new_tokens=1, stop_ids=[])
        assert model.training == is_training
