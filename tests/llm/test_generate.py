"""Generation: the cache and the batch change nothing, and sampling follows the probabilities."""

import collections
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm.errors import ConfigError, DataError
from llm.inference.generate import generate, generate_texts, stream, stream_texts
from llm.inference.options import GenerationOptions
from llm.inference.packed import is_packed, packed
from llm.inference.stopping import StopSearch, TextStoppingCriterion, id_stopping_criterion
from llm.model.transformer import Transformer
from llm.tokenizer.bpe import ByteLevelBPE
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
    """Greedy output without a cache: the whole sequence is processed for each token."""
    tokens = list(prompt)
    while len(tokens) <= SEQ_LEN and len(tokens) - len(prompt) < max_new_tokens:
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("sequences_per_batch", [1, 2, 64])
def test_batched_greedy_output_equals_generation_without_a_cache(
    model: Transformer, sequences_per_batch: int
) -> None:
    options = GenerationOptions(max_new_tokens=15)
    found = generate(model, PROMPTS, options, sequences_per_batch=sequences_per_batch)
    assert found == [without_cache(model, prompt, 15) for prompt in PROMPTS]
    assert len(set(map(tuple, found))) == len(PROMPTS)


def test_equal_prompts_are_read_once_and_answered_as_if_alone(model: Transformer) -> None:
    prompts = [prompt for prompt in PROMPTS[:4] for _ in range(3)]
    seeds = list(range(len(prompts)))
    options = GenerationOptions(max_new_tokens=12, temperature=1.0)
    found = generate(model, prompts, options, seeds)
    for prompt, seed, expected in zip(prompts, seeds, found, strict=True):
        assert generate(model, [prompt], options, [seed]) == [expected]
    assert len(set(map(tuple, found))) == len(prompts)
    same = generate(model, prompts[:2], options, [5, 5])
    assert same[0] == same[1], "the seed alone decides"


def test_a_completion_ends_where_the_context_does(model: Transformer) -> None:
    found = generate(model, PROMPTS, GenerationOptions(max_new_tokens=100))
    assert [len(new) for new in found] == [SEQ_LEN + 1 - len(prompt) for prompt in PROMPTS]
    assert found == [without_cache(model, prompt, 100) for prompt in PROMPTS]


def test_a_stop_id_ends_its_sequence_alone_and_is_not_returned(model: Transformer) -> None:
    whole = generate(model, PROMPTS, GenerationOptions(max_new_tokens=10))
    stop = whole[1][4]
    found = generate(model, PROMPTS, GenerationOptions(max_new_tokens=10, stop_ids=(stop,)))
    expected = [new[: new.index(stop)] if stop in new else new for new in whole]
    assert found == expected != whole


def test_sampling_depends_on_seed_and_index_alone(model: Transformer) -> None:
    def sample(prompts: list[list[int]], seed: int) -> list[list[int]]:
        options = GenerationOptions(temperature=1.5, seed=seed)
        return generate(model, prompts, replace(options, max_new_tokens=8))

    prompts = [[5, 6]] * 3
    first = sample(prompts, 1)
    assert first == sample(prompts, 1)
    assert first != sample(prompts, 2)
    assert len(set(map(tuple, first))) == 3
    assert first == sample([*prompts, [1] * 9, [4]], 1)[:3]


def test_samples_have_the_model_s_frequencies() -> None:
    model = tiny_model(vocab_size=12)
    with torch.no_grad():
        model.embedding.weight.mul_(40)
        chances = (model(torch.tensor([[3, 4]]))[0, -1] / 0.7).softmax(-1)
    prompts, options = [[3, 4]] * 4000, GenerationOptions(temperature=0.7)
    found = generate(model, prompts, replace(options, max_new_tokens=1))
    counts = collections.Counter(new[0] for new in found)
    for token, chance in enumerate(chances.tolist()):
        error = 4 * (chance * (1 - chance) / 4000) ** 0.5  # four standard errors
        assert counts[token] / 4000 == pytest.approx(chance, abs=error + 1e-9), token


def test_top_k_draws_from_the_k_most_probable_and_one_is_greedy(model: Transformer) -> None:
    greedy = generate(model, PROMPTS[:4], GenerationOptions(max_new_tokens=6))
    one = GenerationOptions(temperature=100.0, top_k=1)
    assert generate(model, PROMPTS[:4], replace(one, max_new_tokens=6)) == greedy
    with torch.no_grad():
        likeliest = set(model(torch.tensor([[7]]))[0, -1].topk(5).indices.tolist())
    five = GenerationOptions(temperature=100.0, top_k=5)
    drawn = generate(model, [[7]] * 200, replace(five, max_new_tokens=1))
    assert {new[0] for new in drawn} == likeliest


def test_a_padded_vocabulary_is_never_drawn_from(model: Transformer) -> None:
    hot = GenerationOptions(temperature=1e6)
    drawn = generate(model, [[7]] * 500, replace(hot, max_new_tokens=3))
    assert max(max(new) for new in drawn) <= 600


def test_a_repetition_penalty_counts_the_prompt_and_each_sequence_separately(
    model: Transformer,
) -> None:
    options = GenerationOptions(repetition_penalty=1e9)
    found = generate(model, PROMPTS[:5], replace(options, max_new_tokens=12))
    for prompt, new in zip(PROMPTS, found, strict=False):
        text = [*prompt, *new]
        assert len(set(text)) == len(set(prompt)) + len(new), "no token repeats"
        alone = generate(model, [prompt], replace(options, max_new_tokens=12))
        assert alone == [new]


def test_a_stream_yields_what_generate_gives_step_by_step(model: Transformer) -> None:
    expected = generate(model, PROMPTS[:4], GenerationOptions(max_new_tokens=6))
    found: list[list[int]] = [[] for _ in expected]
    for index, token in stream(model, PROMPTS[:4], GenerationOptions(max_new_tokens=6)):
        found[index].append(token)
        assert max(map(len, found)) - min(map(len, found)) <= 1, "sequences advance together"
    assert found == expected


def test_a_stop_of_several_ids_ends_its_sequence_and_is_not_returned(model: Transformer) -> None:
    whole = generate(model, PROMPTS[:4], GenerationOptions(max_new_tokens=10))
    options = GenerationOptions(stops=(tuple(whole[1][3:6]), (599, 598)))
    found = generate(model, PROMPTS[:4], replace(options, max_new_tokens=10))
    assert found[1] == whole[1][:3]
    assert found[0] == whole[0]


def test_a_stop_text_ends_its_sequence_and_is_not_returned(
    model: Transformer, tokenizer: ByteLevelBPE
) -> None:
    made = tiny_model(vocab_size=tokenizer.vocab_size)
    options = GenerationOptions(temperature=1.0, max_new_tokens=25)
    [whole] = generate_texts(made, tokenizer, [[9]], options)
    assert len(whole) > 12
    stop = whole[7:11]
    options = replace(options, stops=("not there", stop))
    [found] = generate_texts(made, tokenizer, [[9]], options)
    assert found == whole[: whole.index(stop)]
    pieces = [piece for _, piece in stream_texts(made, tokenizer, [[9]], options)]
    assert "".join(pieces) == found
    assert len(pieces) > 1
    with pytest.raises(ConfigError, match="stops: found the text 'not there'"):
        generate(made, [[9]], options)


TEXTS = st.text("ab", max_size=12)


@given(TEXTS, st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_the_first_stop_is_found_however_a_text_is_cut(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    search = StopSearch(stops, "")
    found, is_ended, rest = "", False, text
    while rest and not is_ended:
        size = data.draw(st.integers(1, len(rest)))
        piece, is_ended = search.add(rest[:size])
        found, rest = found + piece, rest[size:]
        shown = [found.find(stop) for stop in stops]
        assert max(shown, default=-1) < 0, "nothing of a stop is shown"
    if not is_ended:
        found += search.flush()
    ends = [text.index(stop) for stop in stops if stop in text]
    assert found == text[: min(ends, default=len(text))]
    assert is_ended <= bool(ends)


def test_a_stop_in_the_beginning_of_a_longer_one_counts_where_the_text_ends() -> None:
    search = StopSearch(["b", "aba"], "")
    assert search.add("ab") == ("", False)
    assert search.flush() == "a"
    assert search.add("ab") == ("", False)
    assert search.add("c") == ("a", True)


@given(st.text(max_size=20))
def test_characters_appear_whole_and_nothing_is_lost(tokenizer: ByteLevelBPE, text: str) -> None:
    ids = [tokenizer.bytes_of_token.index(bytes([byte])) for byte in text.encode()]
    criterion = TextStoppingCriterion(GenerationOptions(), tokenizer)
    pieces = [criterion.add((token,))[0] for token in ids]
    assert [piece for piece in pieces if piece] == list(text)
    assert criterion.flush() == ""


def test_half_a_character_at_the_end_becomes_a_replacement_character(
    tokenizer: ByteLevelBPE,
) -> None:
    ids = [tokenizer.bytes_of_token.index(bytes([byte])) for byte in "文字".encode()[:-1]]
    criterion = TextStoppingCriterion(GenerationOptions(), tokenizer)
    text = "".join(criterion.add((token,))[0] for token in ids)
    assert text + criterion.flush() == "文\ufffd"


def test_a_stop_id_flushes_the_beginning_of_a_stop_text(tokenizer: ByteLevelBPE) -> None:
    [ids] = tokenizer.encode_batch(["one tw"])
    criterion = TextStoppingCriterion(
        GenerationOptions(stop_ids=(tokenizer.end_id,), stops=("two",)), tokenizer
    )
    found = "".join(criterion.add((token,))[0] for token in ids)
    assert found == "one "
    assert criterion.add((tokenizer.end_id,)) == ("tw", True)
    assert id_stopping_criterion(GenerationOptions(stop_ids=(3,), stops=((1, 2),))).add((1,)) == (
        (),
        False,
    )


def test_a_packed_model_shares_all_but_its_matrices_and_gives_the_same_logits(
    model: Transformer,
) -> None:
    ready = packed(model)
    assert is_packed(ready)
    assert not is_packed(model)
    assert packed(ready) is ready
    assert ready.embedding.weight is model.embedding.weight
    assert not isinstance(ready.head, torch.nn.Linear)
    tokens = torch.tensor([PROMPTS[1]])
    with torch.inference_mode():
        # the same products in another order of sums; logits are up to 100 here
        torch.testing.assert_close(ready(tokens), model(tokens), rtol=1e-5, atol=1e-3)


def test_in_bfloat16_logits_are_near(model: Transformer) -> None:
    tokens = torch.tensor([PROMPTS[1]])
    with torch.inference_mode():
        exact, found = model(tokens), packed(model, "bf16")(tokens)
    # 8 bits of fraction, through two layers
    assert (found - exact).norm() / exact.norm() < 0.03
    new = generate(packed(model, "bf16"), PROMPTS, GenerationOptions(max_new_tokens=5))
    assert [len(each) for each in new] == [5, 5, 5, 5, 5, 1]


def test_no_prompts_and_no_new_tokens_give_nothing(model: Transformer) -> None:
    assert generate(model, [], GenerationOptions(max_new_tokens=5)) == []
    assert generate(model, PROMPTS, GenerationOptions(max_new_tokens=0)) == [[]] * len(PROMPTS)


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
        generate(model, [[1], prompt], GenerationOptions(max_new_tokens=3))


def test_the_model_is_left_in_the_mode_it_was_in(model: Transformer) -> None:
    for is_training in (True, False):
        model.train(is_training)
        generate(model, [[1]], GenerationOptions(max_new_tokens=1))
        assert model.training == is_training
