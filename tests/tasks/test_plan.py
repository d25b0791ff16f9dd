"""Plans: every step is cached, or has the setting, input or code that makes it build."""

from pathlib import Path
from typing import Any

import pytest

from flows.pipeline import language_model
from llm.artifact import ArtifactWriter
from llm.config import RunConfig
from llm.errors import ArtifactError, ConfigError, DataError
from llm.recipes import load_config, recipe_names
from tasks import plan as plan_module
from tasks.plan import PlannedStep, Selection, key_parts, make_plan
from tasks.stages import all_stages, in_order
from tasks.store import ArtifactStore, KeyRecord

RECIPE = Path(__file__).with_name("defaults.yaml")
CHAT = '{"instruction": "Who?", "input": "", "output": "The one who asked."}'


def build_all(config: RunConfig, store: ArtifactStore) -> None:
    """Fill the store as a run would; the bytes are the input digests and settings."""
    digests: dict[Any, str] = {}
    for step in in_order(language_model(config)):
        inputs = {name: digests[dependency] for name, dependency in step.inputs.items()}
        parts = key_parts(step, config, inputs, store)
        out = store.staging(parts) / "out"
        writer = ArtifactWriter(out)
        writer.write_json("bytes.json", [parts.inputs, parts.settings, parts.seed])
        writer.finish(stage=parts.stage, summary={})
        artifact = store.publish(parts, out)
        digests[step] = artifact.digest
        store.remember(
            KeyRecord(key=parts.key, parts=parts, digest=artifact.digest, seconds=1, made_at="")
        )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Local files as corpus and chats."""
    (tmp_path / "corpus.txt").write_text("some text\n")
    (tmp_path / "chats.json").write_text("[]")
    return tmp_path


@pytest.fixture
def overrides(source: Path) -> list[str]:
    """The settings that name them."""
    return [
        "download.corpus.kind=files",
        f"download.corpus.path={source / 'corpus.txt'}",
        "download.chats.kind=files",
        f"download.chats.path={source / 'chats.json'}",
    ]


@pytest.fixture
def store(tmp_path: Path, overrides: list[str]) -> ArtifactStore:
    """A store in which everything is built."""
    store = ArtifactStore(tmp_path / "artifacts")
    build_all(load_config(RECIPE, overrides), store)
    return store


def planned(
    store: ArtifactStore, overrides: list[str], selection: Selection | None = None
) -> list[PlannedStep]:
    """The plan of the quickstart recipe with these overrides."""
    config = load_config(RECIPE, overrides)
    return make_plan(in_order(language_model(config)), config, store, selection or Selection())


def to_build(plan: list[PlannedStep]) -> list[str]:
    """Names of the steps a plan builds."""
    return [item.step.name for item in plan if item.status == "build"]


def reason(plan: list[PlannedStep], name: str) -> str:
    """Why a step is built."""
    return next(item.reason for item in plan if item.step.name == name)


def test_each_of_several_sources_is_a_download_of_its_own_and_weights_count_for_pack_alone(
    tmp_path: Path,
) -> None:
    store = ArtifactStore(tmp_path / "artifacts")

    def digests(*more: str) -> dict[str, str]:
        config = load_config("quickstart", [*named, *more])
        steps = in_order(language_model(config))
        keys: dict[str, str] = {}
        for step in steps:
            inputs = dict.fromkeys(step.inputs, "0")
            keys[step.name] = key_parts(step, config, inputs, store).key
        return keys

    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"Words of {name}.")
    place = "download.corpus.sources"
    kinds = [f"{place}.{index}.kind=files" for index in range(2)]
    named = [*kinds, f"{place}.0.path={tmp_path / 'a.txt'}", f"{place}.1.path={tmp_path / 'b.txt'}"]
    before = digests()
    assert "download corpus.sources.0" in before and "download corpus" not in before
    after = digests(f"{place}.0.weight=3")
    assert [name for name in before if before[name] != after[name]] == ["pack corpus"]
    swapped = digests(
        f"{place}.0.path={tmp_path / 'b.txt'}", f"{place}.1.path={tmp_path / 'a.txt'}"
    )
    assert swapped["download corpus.sources.0"] == before["download corpus.sources.1"]


def test_empty_store_builds_everything(tmp_path: Path, overrides: list[str]) -> None:
    plan = planned(ArtifactStore(tmp_path / "empty"), overrides)
    assert len(to_build(plan)) == len(plan) == 10
    assert reason(plan, "download corpus") == "never built"
    assert not (tmp_path / "empty" / "keys").exists()


def test_unchanged_run_builds_nothing(store: ArtifactStore, overrides: list[str]) -> None:
    assert to_build(planned(store, overrides)) == []


@pytest.mark.parametrize(
    ("override", "rebuilt", "why"),
    [
        ("finetune.num_steps=7", ["finetune", "evaluate"], "finetune.num_steps: 500 -> 7"),
        ("evaluate.temperature=0.5", ["evaluate"], "evaluate.temperature: 0.8 -> 0.5"),
        ("pretrain.learning_rate=1e-4", ["pretrain", "finetune", "evaluate"], "learning_rate"),
        ("pretrain.model.d_ff=64", ["pretrain", "finetune", "evaluate"], "d_ff: 704 -> 64"),
        (
            "pack.seq_len=64",
            ["pack corpus", "pack chats", "pretrain", "finetune", "evaluate"],
            "pack.seq_len: 256 -> 64",
        ),
        (
            "train_tokenizer.vocab_size=300",
            ["train_tokenizer", "pack corpus", "pack chats", "pretrain", "finetune", "evaluate"],
            "train_tokenizer.vocab_size: 4096 -> 300",
        ),
        (
            "seed=2",
            ["train_tokenizer", "pack corpus", "pack chats", "pretrain", "finetune", "evaluate"],
            "seed: 1 -> 2",
        ),
        ("runtime.log_every_steps=5", [], ""),
        ("runtime.num_processes=2", [], ""),
        ("description=other words", [], ""),
    ],
)
def test_a_changed_setting_rebuilds_exactly_what_depends_on_it(
    store: ArtifactStore, overrides: list[str], override: str, rebuilt: list[str], why: str
) -> None:
    base = ["finetune.warmup_steps=1"] if "finetune" in override else []
    if base:
        build_all(load_config(RECIPE, [*overrides, *base]), store)
    plan = planned(store, [*overrides, *base, override])
    assert to_build(plan) == rebuilt
    if rebuilt:
        assert why in reason(plan, rebuilt[0])


def test_a_changed_byte_of_text_rebuilds_what_is_made_from_it(
    store: ArtifactStore, overrides: list[str], source: Path
) -> None:
    (source / "corpus.txt").write_text("some texT\n")
    built = to_build(planned(store, overrides))
    assert "download corpus" in built and "pretrain" in built
    assert "download chats" not in built and "clean chats" not in built


@pytest.mark.parametrize(("action", "is_rebuilt"), [("none", False), ("count", True)])
def test_other_chats_rebuild_the_corpus_only_where_it_is_read_for_what_they_hold_out(
    tmp_path: Path, overrides: list[str], source: Path, action: str, is_rebuilt: bool
) -> None:
    store, chosen = (
        ArtifactStore(tmp_path / action),
        [*overrides, f"clean.decontamination.action={action}"],
    )
    build_all(load_config(RECIPE, chosen), store)
    assert to_build(planned(store, chosen)) == []
    (source / "chats.json").write_text(CHAT)
    plan = planned(store, chosen)
    built = to_build(plan)
    assert {"clean chats", "evaluate"} <= set(built) and "download corpus" not in built
    assert ("clean corpus" in built) == ("train_tokenizer" in built) == is_rebuilt
    if is_rebuilt:
        assert "input held_out" in reason(plan, "clean corpus")


def test_prompts_that_are_measured_with_are_kept_out_of_training_where_that_is_asked_for(
    tmp_path: Path, overrides: list[str]
) -> None:
    long = "evaluate.prompts=[one two three four five six seven eight nine ten eleven twelve more]"
    for action in ("none", "drop"):
        store = ArtifactStore(tmp_path / action)
        chosen = [*overrides, f"clean.decontamination.action={action}"]
        build_all(load_config(RECIPE, chosen), store)
        assert to_build(planned(store, [*chosen, "evaluate.prompts=[Short]"])) == ["evaluate"]
        plan = planned(store, [*chosen, long])
        assert ({"clean corpus", "clean chats"} <= set(to_build(plan))) == (action == "drop")
    assert "clean.decontamination.texts: [] -> ['one two" in reason(plan, "clean chats")


def test_a_moved_source_rebuilds_nothing(
    store: ArtifactStore, overrides: list[str], source: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (source / "corpus.txt").rename(tmp_path / "elsewhere" / "corpus.txt")
    moved = [*overrides, f"download.corpus.path={tmp_path / 'elsewhere' / 'corpus.txt'}"]
    assert to_build(planned(store, moved)) == []


def test_a_deleted_output_rebuilds_it_and_says_so(
    store: ArtifactStore, overrides: list[str]
) -> None:
    plan = planned(store, overrides)
    digest = next(item.digest for item in plan if item.step.name == "train_tokenizer")
    store.folder("train_tokenizer", digest).rename(store.root / "gone")
    plan = planned(store, overrides)
    assert to_build(plan)[0] == "train_tokenizer"
    assert "deleted" in reason(plan, "train_tokenizer")


def test_a_flipped_bit_rebuilds_it_and_says_where(
    store: ArtifactStore, overrides: list[str]
) -> None:
    plan = planned(store, overrides)
    digest = next(item.digest for item in plan if item.step.name == "clean corpus")
    path = store.folder("clean", digest) / "bytes.json"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    plan = planned(store, overrides)
    assert "clean corpus" in to_build(plan)
    assert "bytes.json: sha256" in reason(plan, "clean corpus")


@pytest.mark.parametrize(
    ("module", "rebuilt"),
    [
        ("llm.model.transformer", ["pretrain", "finetune", "evaluate"]),
        ("llm.evaluation.report", ["evaluate"]),
        ("llm.clean", ["clean corpus", "clean chats"]),
    ],
)
def test_changed_code_rebuilds_the_stages_that_use_it(
    store: ArtifactStore,
    overrides: list[str],
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    rebuilt: list[str],
) -> None:
    original = plan_module.code_digests

    def edited(stage: str) -> dict[str, str]:
        return {
            name: "edited" if name == module else code for name, code in original(stage).items()
        }

    monkeypatch.setattr(plan_module, "code_digests", edited)
    plan = planned(store, overrides)
    assert to_build(plan)[: len(rebuilt)] == rebuilt
    assert f"code changed in {module}" in reason(plan, rebuilt[0])
    reused = Selection(reuse=tuple({name.split()[0] for name in rebuilt}))
    assert to_build(planned(store, overrides, reused)) == []


def test_only_takes_one_stage_and_refuses_when_its_inputs_are_missing(
    store: ArtifactStore, overrides: list[str], tmp_path: Path
) -> None:
    plan = planned(store, [*overrides, "finetune.num_steps=600"], Selection(only="finetune"))
    assert to_build(plan) == ["finetune"]
    assert plan[-1].step.name == "finetune"
    with pytest.raises(ArtifactError, match="--only finetune: its inputs are not all built"):
        planned(ArtifactStore(tmp_path / "empty"), overrides, Selection(only="finetune"))


def test_from_builds_a_stage_and_all_after_it(store: ArtifactStore, overrides: list[str]) -> None:
    built = to_build(planned(store, overrides, Selection(start_from="pretrain")))
    assert built == ["pretrain", "finetune", "evaluate"]


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_is_planned_without_a_network(recipe: str, tmp_path: Path) -> None:
    config = load_config(recipe)
    plan = make_plan(in_order(language_model(config)), config, ArtifactStore(tmp_path), Selection())
    assert len(to_build(plan)) == len(plan)
    assert not list(tmp_path.glob("*/*"))


def test_unknown_stage_lists_the_stages() -> None:
    with pytest.raises(ConfigError, match="the stages are download, clean"):
        Selection(only="train")


def test_missing_file_names_the_setting(store: ArtifactStore, overrides: list[str]) -> None:
    with pytest.raises(DataError, match=r"download\.corpus\.path"):
        planned(store, [*overrides, "download.corpus.path=nowhere.txt"])


def test_a_stage_has_one_name_everywhere() -> None:
    config = load_config(RECIPE)
    llm_folder = Path(plan_module.__file__).parents[1] / "llm"
    for stage in all_stages():
        assert hasattr(config, stage.name)
        assert f"def {stage.name}(" in (llm_folder / f"{stage.name}.py").read_text()


def test_the_source_of_a_reward_function_is_part_of_the_key(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rewards = ["stages_after_pretrain=[finetune,align]", "align.method=grpo"]
    rewards += ["align.grpo.rewards=['my_rewards:short']"]
    module, source = tmp_path / "my_rewards.py", "def short(prompt, answer, reference): return 1.0"
    module.write_text(source)
    store = ArtifactStore(tmp_path / "artifacts")
    config = load_config(RECIPE, [*overrides, *rewards])
    build_all(config, store)
    assert to_build(planned(store, [*overrides, *rewards])) == []
    module.write_text(source.replace("1.0", "-len(answer)"))
    found = planned(store, [*overrides, *rewards])
    assert to_build(found) == ["align", "evaluate"]
    assert reason(found, "align").startswith("my_rewards ")


def test_the_plan_shows_the_format_of_local_records(tmp_path: Path, overrides: list[str]) -> None:
    (tmp_path / "chats.json").write_text(f"[{CHAT}]")
    store = ArtifactStore(tmp_path / "artifacts")
    found = {item.step.name: item.note for item in planned(store, overrides)}
    assert (found["download chats"], found["download corpus"]) == ("format alpaca", "")
