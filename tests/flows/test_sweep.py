"""Sweeps: the members of a file, their results, and the table."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from flows import cli
from flows.commands import runs
from flows.result import RunResult
from flows.sweep import (
    Member,
    Sweep,
    comparison,
    differing_bytes,
    load_sweep,
    run_sweep,
    short_name,
    sweep_names,
)
from llm.config import RunConfig
from llm.errors import ConfigError, Interrupted, StageError
from llm.models import MODELS
from llm.recipes import load_config
from tasks.cached import Outcome
from tasks.tracking.models import _title


def write(folder: Path, text: str) -> str:
    path = folder / "sweep.yaml"
    path.write_text(text)
    return str(path)


def outcome(stage: str, role: str = "", **summary: float) -> Outcome:
    return Outcome(
        stage=stage, role=role, key="k", digest="d", status="built", reason="", seconds=1.0,
        path="", summary=summary,
    )  # fmt: skip


def outcomes(config: RunConfig, member: Member, overrides: Sequence[str]) -> Sequence[Outcome]:
    if config.seed == 3:
        raise StageError("pretrain: out of memory")
    return [
        outcome("pack", "corpus", validation_bytes=100),
        outcome("pack", "chats", validation_bytes=5),
        outcome("pretrain", num_parameters=10_000),
        outcome("evaluate", **{"base/bits_per_byte": 1.0 + config.seed % 3}),
    ]


SWEEP = Sweep(
    recipe="quickstart",
    members=[["seed=2", "pack.seq_len=64"], ["seed=3", "pack.seq_len=64"], ["pack.seq_len=64"]],
)


def test_a_grid_is_every_combination_and_values_read_as_in_a_recipe(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "recipe: quickstart\noverrides: [pack.seq_len=64]\ngrid:\n"
        "  seed: [1, 2]\n  evaluate.prompts: [[a, 'b: c']]\n  pretrain.learning_rate: [0.001]\n"
        "  pretrain.document_mask: [true]\n  train_tokenizer.kind: [bytes, bpe]\n",
    )
    sweep = load_sweep(path, ["clean.min_document_bytes=2"])
    assert len(sweep.members) == 4
    configs = [load_config(sweep.recipe, member) for member in sweep.members]
    found = [(config.seed, config.train_tokenizer.kind) for config in configs]
    assert found == [(1, "bytes"), (1, "bpe"), (2, "bytes"), (2, "bpe")]
    for config in configs:
        assert config.evaluate.prompts == ("a", "b: c")
        assert config.pretrain.learning_rate == 0.001 and config.pretrain.document_mask
        assert (config.pack.seq_len, config.clean.min_document_bytes) == (64, 2)


def test_every_bundled_sweep_gives_valid_settings() -> None:
    assert "tokenizers" in sweep_names()
    for name in sweep_names():
        sweep = load_sweep(name)
        keys = {load_config(sweep.recipe, member).train_tokenizer for member in sweep.members}
        assert len(sweep.members) > 1 and len(keys) == len(sweep.members)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "recipe: quickstart", "recipe: quickstart\ngrid: {}", "grid: {seed: [1]}",
        "recipe: quickstart\ngrid: {seed: 1}", "recipe: quickstart\ngrid: [[seed=1], seed=2]",
        "recipe: quickstart\noverrides: seed=1\ngrid: {seed: [1]}",
        "recipe: quickstart\ngrid: {seed: [1]}\ngird: {}", "a: [",
    ],
)  # fmt: skip
def test_a_file_that_is_no_sweep_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"sweep\.yaml: "):
        load_sweep(write(tmp_path, text))


def test_an_unknown_sweep_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="did you mean tokenizers"):
        load_sweep("tokenizer")


def test_a_member_that_fails_stops_no_other() -> None:
    said: list[str] = []
    members = run_sweep(SWEEP, outcomes, said.append)
    assert [member.status for member in members] == ["finished", "failed", "finished"]
    assert members[1].error == "pretrain: out of memory"
    assert [member.overrides for member in members] == [["seed=2"], ["seed=3"], []]
    assert said[0] == "1 of 3: seed=2" and "failed: pretrain: out of memory" in said


def test_being_stopped_stops_the_sweep() -> None:
    def stop(config: RunConfig, member: Member, overrides: Sequence[str]) -> Sequence[Outcome]:
        raise Interrupted("asked to stop")

    with pytest.raises(Interrupted):
        run_sweep(SWEEP, stop, lambda line: None)


def test_all_wrong_settings_are_reported_before_anything_runs() -> None:
    def never(config: RunConfig, member: Member, overrides: Sequence[str]) -> Sequence[Outcome]:
        raise AssertionError

    sweep = Sweep(recipe="quickstart", members=[["seed=-1"], ["pack.seq_ln=3"], ["seed=1"]])
    with pytest.raises(ConfigError) as caught:
        run_sweep(sweep, never, lambda line: None)
    assert "seed: found -1" in str(caught.value) and "pack.seq_ln: unknown" in str(caught.value)


def test_the_table_has_the_best_first_and_only_metrics_that_exist() -> None:
    members = run_sweep(SWEEP, outcomes, lambda line: None)
    headings, rows = comparison(members)
    assert headings == ["member", "parameters", "base bits/byte", "seconds"]
    assert rows == [
        ["3 unchanged", "10,000", "2", "0"],
        ["1 seed=2", "10,000", "3", "0"],
        ["2 seed=3", "", "", "failed"],
    ]


@pytest.mark.parametrize("name", sweep_names())
def test_members_are_told_apart_by_20_characters_of_their_names(name: str) -> None:
    """About as many are shown in MLflow's table of runs and on a narrow Prefect page."""
    named: list[str] = []

    def note(config: RunConfig, member: Member, overrides: Sequence[str]) -> Sequence[Outcome]:
        run = f"{short_name(member)} {config.name}"
        named.extend([run, *(_title(run, stage, 4_300_000) for stage in MODELS)])
        return []

    run_sweep(load_sweep(name), note, lambda line: None)
    assert len({shown[:20] for shown in named}) == len(named)


def test_bits_per_byte_of_different_texts_are_not_compared_silently() -> None:
    members = run_sweep(SWEEP, outcomes, lambda line: None)
    assert differing_bytes(members) == ""
    members[0].num_validation_bytes = 90
    assert "(90, 100 bytes)" in differing_bytes(members)


def test_the_command_ends_with_1_when_a_member_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def result(options: object, config: RunConfig, *rest: object) -> RunResult:
        found = list(outcomes(config, Member(number=1, overrides=()), ()))
        return RunResult(recipe=config.name, outcomes=found, mlflow_run_id="", addresses={})

    monkeypatch.setattr(runs, "_execute", result)
    place = f"runtime.artifacts_dir={tmp_path}"
    good = write(tmp_path, "recipe: quickstart\ngrid: {seed: [1, 2]}")
    assert cli.main(["sweep", good, place]) == 0
    assert "base bits/byte" in capsys.readouterr().out
    bad = write(tmp_path, "recipe: quickstart\ngrid: {seed: [3, 1]}")
    assert cli.main(["sweep", bad, place, "--json"]) == 1
    assert '"status": "failed"' in capsys.readouterr().out
    assert cli.main(["sweep", "nothing"]) == 2
