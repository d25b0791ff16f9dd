"""Generation options: every option out of range is refused, all in one error."""

import math

import pytest

from llm.errors import ConfigError
from llm.inference.options import GenerationOptions


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", -1),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("stops", ("",)),
        ("stops", ((),)),
    ],
)
def test_options_out_of_range_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: found .*, expected "):
        GenerationOptions(**{name: value})  # type: ignore[arg-type]


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        GenerationOptions(temperature=-1.0, top_p=2.0, min_p=3.0)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "temperature",
        "top_p",
        "min_p",
    ]
