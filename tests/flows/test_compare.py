"""The command `compare`: which models its words name, and what it prints about them."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from flows.cli import main
from flows.commands.compare import find_models
from llm.artifact import ArtifactWriter, Json
from llm.errors import ArtifactError
from llm.evaluation.items import make_items, write_items
from tasks.store import ArtifactStore
from tasks.tracking.client import DIGEST_TAG, MlflowConnection

NUM_ITEMS = 300


class Artifacts:
    """An artifacts folder with models that do nothing, and evaluations of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._seconds = 0

    def model(self, content: str, stage: str = "pretrain") -> str:
        """Write a model and return its digest."""
        writer = ArtifactWriter(self.root / "made")
        writer.write_bytes("model.safetensors", content.encode())
        digest = writer.finish(stage=stage, summary={}).digest
        (self.root / stage).mkdir(exist_ok=True)
        writer.folder.rename(self.root / stage / digest)
        return digest

    def evaluate(
        self,
        models: Mapping[str, str],
        settings: Mapping[str, Json] | None = None,
        first_item: int = 0,
        has_items: bool = True,
        num_right: Sequence[int] = (100, 200, 200),
    ) -> Path:
        """Write an evaluation of models, given by name and digest, and return its folder."""
        folder = self.root / "evaluate" / f"{self._seconds:032}"
        writer = ArtifactWriter(folder)
        ids = [f"{index:032x}" for index in range(first_item, first_item + NUM_ITEMS)]
        right = [np.arange(NUM_ITEMS) < count for count in num_right]
        nats = np.random.default_rng(1).random((3, NUM_ITEMS))
        items = {
            name: {
                "answer_loss": make_items(ids, nats[index]),
                "exact_match": make_items(ids, right[index], higher_is_better=True),
            }
            for index, name in enumerate(models)
        }
        if has_items:
            write_items(writer, items)
        names: list[Json] = list(models)
        settings = {"models": names, **(settings or {})}
        writer.finish(stage="evaluate", summary={}, settings=settings, inputs=models)
        self._seconds += 1
        os.utime(folder / "manifest.json", (self._seconds, self._seconds))
        return folder


@pytest.fixture
def made(tmp_path: Path) -> Artifacts:
    return Artifacts(tmp_path)


def test_models_are_found_by_folder_digest_and_prefix(made: Artifacts) -> None:
    base, chat, aligned = made.model("a"), made.model("b", "finetune"), made.model("c", "align")
    evaluation = made.evaluate({"base": base, "chat": chat, "aligned": aligned})
    words = [str(made.root / "pretrain" / base), chat, aligned[:8]]
    found = find_models(words, ArtifactStore(made.root))
    assert [one.digest for one in found] == [base, chat, aligned]
    assert [one.label for one in found] == [
        f"base {base[:8]}",
        f"chat {chat[:8]}",
        f"aligned {aligned[:8]}",
    ]
    assert {one.evaluation.folder for one in found} == {evaluation}


def test_models_are_found_by_the_name_of_their_run(made: Artifacts) -> None:
    digests = [made.model(content) for content in "abc"]
    made.evaluate({"base": digests[0], "chat": digests[1], "other": digests[2]})
    mlflow = MlflowConnection(f"sqlite:///{made.root / 'mlflow.db'}", made.root, "project")
    for number, (name, digest) in enumerate(
        [("base 3M tiny", digests[0]), ("it's a chat", digests[2]), ("it's a chat", digests[1])]
    ):
        mlflow.create_run("models", f"{number}", name, {DIGEST_TAG: digest}, number)
    found = find_models(["base 3M tiny", "it's a chat"], ArtifactStore(made.root))
    assert [one.digest for one in found] == digests[:2]
    with pytest.raises(ArtifactError, match="no run of this name"):
        find_models(["base 3M tiny", "nobody"], ArtifactStore(made.root))


def test_an_evaluation_of_all_models_comes_before_newer_ones_of_each(made: Artifacts) -> None:
    base, chat = made.model("a"), made.model("b")
    made.evaluate({"base": base, "chat": chat})
    both = made.evaluate({"base": base, "chat": chat})
    made.evaluate({"base": base}, first_item=10_000)
    made.evaluate({"base": base, "chat": chat}, has_items=False)
    found = find_models([base, chat], ArtifactStore(made.root))
    assert [one.evaluation.folder for one in found] == [both, both]


def test_json_holds_each_metric_of_models_evaluated_in_different_runs(
    made: Artifacts, capsys: pytest.CaptureFixture[str]
) -> None:
    base, chat = made.model("a"), made.model("b")
    made.evaluate({"base": base}, {"max_new_tokens": 8})
    made.evaluate({"chat": chat}, {"max_new_tokens": 9}, first_item=50, num_right=(250,))
    words = [base, chat, "--json", "--artifacts", str(made.root)]
    assert main(["compare", *words]) == 0
    shown = json.loads(capsys.readouterr().out)
    (comparison,) = shown["comparisons"]
    assert [one["digest"] for one in shown["models"]] == [base, chat]
    assert (comparison["a"], comparison["b"]) == (f"base {base[:8]}", f"chat {chat[:8]}")
    match = comparison["metrics"]["exact_match"]
    # items 50 to 299 of both: the baseline is right up to 99, the other model up to 299
    assert (match["a"], match["b"], match["difference"]) == (0.2, 1.0, 0.8)
    assert match["interval"][0] < 0.8 < match["interval"][1]
    assert match["p_value"] < 1e-50 and match["verdict"] == "better"
    assert (match["num_items"], match["num_unpaired"]) == (250, 100)
    assert comparison["metrics"]["answer_loss"]["verdict"] == "not distinguishable"
    assert shown["notes"] == [f"chat {chat[:8]} was evaluated with another evaluate.max_new_tokens"]


def test_each_later_model_has_a_table_with_the_first(
    made: Artifacts, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {name: made.model(name) for name in ("base", "chat", "aligned")}
    folder = made.evaluate(names)
    assert main(["compare", *names.values(), "--artifacts", str(made.root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.split()[:2] == ["exact_match", "0.3333"] for line in lines) == 2
    row = next(line for line in lines if line.startswith("exact_match"))
    assert row.split()[1:4] == ["0.3333", "0.6667", "+0.3333"]
    assert row.rstrip().endswith("300         0  better")
    assert lines[-1] == f"items of {folder}"


def test_what_names_no_evaluated_model_is_one_line(
    made: Artifacts, capsys: pytest.CaptureFixture[str]
) -> None:
    base, chat, new, other = (made.model(content) for content in "abcd")
    made.evaluate({"base": base, "chat": chat})
    made.evaluate({"other": other}, first_item=10_000)
    made.evaluate({"other": new}, has_items=False)
    for words, code, said in (
        ([base], 2, "expected two or more models"),
        ([base, base[:10]], 2, "each another one"),
        ([base, new], 1, f"items of model {new}; evaluate it: `fromscratch run RECIPE --only"),
        ([base, "0" * 8], 1, "00000000: found no such folder, no model of this digest"),
        ([base, str(made.root)], 1, "no manifest.json there"),
        ([base, other], 1, "nothing to compare (answer_loss: not compared, 0 items in common"),
    ):
        assert main(["compare", *words, "--artifacts", str(made.root)]) == code
        assert said in (error := capsys.readouterr().err) and error.count("\n") == 1
    assert not (made.root / "mlflow.db").exists()


def test_a_prefix_of_several_models_is_refused(made: Artifacts) -> None:
    made.evaluate({"base": "abcdef01" + "0" * 24, "chat": "abcdef01" + "1" * 24})
    with pytest.raises(ArtifactError, match=r"abcdef01: found .*; expected the digest of one"):
        find_models(["abcdef01", "abcdef01" + "1" * 24], ArtifactStore(made.root))
