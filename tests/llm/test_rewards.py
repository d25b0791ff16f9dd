"""Reward functions: what each gives, and what is refused before anything runs."""

import sys
from pathlib import Path

import pytest

from llm.errors import ConfigError, StageError
from llm.training.rewards import (
    Answer,
    judge,
    last_number,
    load_rewards,
    reward_problems,
    source_digests,
    total,
)

OWN = """
import math

def length(prompt, answer, reference):
    return len(answer) / len(reference)

def broken(prompt, answer, reference):
    raise KeyError("units")

def not_a_number(prompt, answer, reference):
    return math.nan

text = "no function"
"""


def reward(name: str, text: str, reference: str = "", *, has_ended: bool = True) -> float:
    answer = Answer(prompt="question", text=text, reference=reference, has_ended=has_ended)
    [found] = judge(load_rewards([name], "rewards"), answer).values()
    return found


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a user's module."""
    (tmp_path / "own_rewards.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    return "own_rewards"


@pytest.mark.parametrize(
    ("name", "text", "reference", "expected"),
    [
        ("exact_match", " a b\n", "a b", 1),
        ("exact_match", "a  b", "a b", 0),
        ("number", "so 3 + 4 = 7.0", "7", 1),
        ("number", "it is 1,250.", "= 1250.00", 1),
        ("number", "7 or 8", "7", 0),
        ("number", "-5", "5", 0),
        ("number", "none", "no number", 0),
        ("json", '{"a": [1, null]}', "", 1),
        ("json", "{'a': 1}", "", 0),
        ("json", "NaN", "", 0),
        ("json", "[" * 10**5, "", 0),
        ("format", "x", "", 1),
        ("format", " ", "", 0),
        (r"regex:^\d+$", "12", "", 1),
        (r"regex:^\d+$", "12a", "", 0),
    ],
)
def test_rewards_by_name(name: str, text: str, reference: str, expected: float) -> None:
    assert reward(name, text, reference) == expected


def test_an_answer_that_reached_the_limit_is_not_well_formed() -> None:
    assert reward("format", "x", has_ended=False) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3-5", 5), ("x=-5", -5), ("1,2,3", 3), ("2e3", 2000), ("1,234,567.5 kg", 1234567.5)],
)
def test_the_last_number_of_a_text(text: str, expected: float) -> None:
    found = last_number(text)
    assert found is not None
    assert float(found) == expected


def test_weights_are_added_up_and_functions_of_the_user_get_texts(own: str) -> None:
    rewards = load_rewards(["2*exact_match", f"0.5*{own}:length", "regex:a|b"], "rewards")
    assert [each.name for each in rewards] == ["exact_match", "own_rewards_length", "regex_a_b"]
    answer = Answer(prompt="p", text="ab", reference="abcd", has_ended=True)
    values = judge(rewards, answer)
    assert values == {"exact_match": 0.0, "own_rewards_length": 0.5, "regex_a_b": 1.0}
    assert total(rewards, values) == 0.25 + 1.0


def test_every_problem_of_the_setting_is_found_without_running_the_users_module(
    own: str, tmp_path: Path
) -> None:
    (tmp_path / "own_rewards.py").write_text(OWN + "raise SystemExit('imported')")
    names = ["exact_match", "exactmatch", "regex:a(", "nowhere:f", f"2*{own}:lenght", f"{own}:text"]
    problems = reward_problems([*names, "2*exact_match"], "align.grpo.rewards")
    expected = [
        "align.grpo.rewards.1: found 'exactmatch', expected one of exact_match, number, json",
        "align.grpo.rewards.2: found 'regex:a(', which is no regular expression: missing )",
        "align.grpo.rewards.3: found 'nowhere:f', but there is no module nowhere",
        f"align.grpo.rewards.4: found '2*{own}:lenght', but {tmp_path}/own_rewards.py defines no",
        "align.grpo.rewards: exact_match twice; expected once, with a weight: 2*exact_match",
    ]
    assert len(problems) == len(expected)
    for problem, beginning in zip(problems, expected, strict=True):
        assert problem.startswith(beginning)
    assert reward_problems([], "rewards")[0].startswith("rewards: empty, expected reward functions")


def test_what_only_importing_shows_is_a_config_error(own: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="which is no function but 'no function'"):
        load_rewards([f"{own}:text"], "rewards")
    (tmp_path / "failing_rewards.py").write_text("def f(p, a, r): ...\nimport no_such_module")
    with pytest.raises(ConfigError, match=r"fails on import: ModuleNotFoundError: .*no_such"):
        load_rewards(["failing_rewards:f"], "rewards")


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        ("broken", "raised KeyError: 'units'"),
        ("not_a_number", "gave nan, expected a finite number"),
    ],
)
def test_a_function_that_fails_is_named_with_prompt_and_answer(
    own: str, function: str, problem: str
) -> None:
    with pytest.raises(StageError) as caught:
        reward(f"{own}:{function}", "the answer", "the reference")
    assert str(caught.value) == (
        f"the reward function own_rewards_{function} {problem}\n  prompt: 'question'\n"
        "  answer: 'the answer'\n  reference: 'the reference'"
    )


def test_the_digest_of_a_users_module_changes_with_its_source(own: str, tmp_path: Path) -> None:
    names = ["exact_match", f"2*{own}:length", f"{own}:broken", "regex:own_rewards:length"]
    before = source_digests(names)
    assert before.keys() == {own}
    (tmp_path / "own_rewards.py").write_text(OWN + "# changed")
    assert source_digests(names)[own] != before[own]
    assert not source_digests(["exact_match"])
