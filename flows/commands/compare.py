"""The command `compare`: models against the first one, on the items that all were evaluated on."""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from flows.commands.options import add_artifacts_option
from llm.artifact import MANIFEST, Json, read_manifest
from llm.errors import ArtifactError, ConfigError
from llm.models import MODELS
from tasks.stages import EVALUATE
from tasks.store import ArtifactStore

if TYPE_CHECKING:
    from llm.evaluation.report import Comparison

DIGEST = re.compile("[0-9a-f]{8,32}")
SHOWN_DIGITS = 8
TEXT = "compare models item by item: difference, 95 % interval, p-value, verdict"
EPILOG = (
    "The first model is the baseline. Intervals are BCa bootstrap intervals over items. p-values"
    " are two-sided, by McNemar's exact test where answers are right or wrong, else by a sign-flip"
    " test, after Holm's correction for all models and metrics; below 0.05 the verdict is better or"
    " worse. The verdict is about these models: another seed of the same training is another model."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """An evaluate artifact."""

    folder: Path
    digests: Mapping[str, str]
    """Of its models, by name."""
    settings: Mapping[str, Json]


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedModel:
    """A model, and the evaluation that its items are from."""

    label: str
    name: str
    """In its evaluation."""
    digest: str
    evaluation: Evaluation


def add_compare_command(commands: Any) -> None:
    """Add `compare` to the subparsers."""
    compare = commands.add_parser("compare", help=TEXT, description=TEXT, epilog=EPILOG)
    compare.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="two or more models that were evaluated: each a folder, a digest or its first"
        f" {SHOWN_DIGITS} characters or more, or the name of a run in MLflow (the newest of"
        " that name; at MLFLOW_TRACKING_URI, else in the artifacts folder)",
    )
    compare.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    add_artifacts_option(compare)
    compare.set_defaults(command=_compare)


def _compare(options: argparse.Namespace) -> int:
    store = ArtifactStore(options.artifacts)
    models = find_models(options.models, store)
    comparisons = compare(models)
    notes = _other_settings(models)
    if options.json:
        about = [
            {"label": one.label, "digest": one.digest, "evaluation": str(one.evaluation.folder)}
            for one in models
        ]
        found = {"models": about, "comparisons": list(map(asdict, comparisons)), "notes": notes}
        print(json.dumps(found))
    else:
        _print(models, comparisons, notes)
    return 0


def find_models(words: Sequence[str], store: ArtifactStore) -> list[ComparedModel]:
    """Return the models that the words name: all from the newest evaluation that has all of them,
    else each from the newest that has it.

    Raises:
        ArtifactError: a word names no model, or several, or one that was never evaluated.
        ConfigError: fewer than two models.
    """
    evaluations = _evaluations(store)
    digests = {word: _digest(word, store, evaluations) for word in words}
    if len(set(digests.values())) < max(2, len(words)):
        raise ConfigError(
            f"compare: found {' '.join(words)}; expected two or more models, each another one"
        )
    shared = [one for one in evaluations if set(digests.values()) <= set(one.digests.values())]
    found: list[ComparedModel] = []
    for word, digest in digests.items():
        holding = (one for one in (*shared, *evaluations) if digest in one.digests.values())
        if (evaluation := next(holding, None)) is None:
            raise ArtifactError(
                f"{word}: no evaluation in {store.root} has items of model {digest}; evaluate it:"
                " `fromscratch run RECIPE --only evaluate`, with the recipe and the settings that"
                " built it"
            )
        name = next(name for name, known in evaluation.digests.items() if known == digest)
        label = f"{name} {digest[:SHOWN_DIGITS]}"
        found.append(ComparedModel(label=label, name=name, digest=digest, evaluation=evaluation))
    return found


def compare(models: Sequence[ComparedModel]) -> "list[Comparison]":
    """Compare each later model with the first.

    Raises:
        ArtifactError: two models have no items in common.
    """
    from llm.evaluation.items import read_items
    from llm.evaluation.paired import compare_models

    items = {one.evaluation.folder: read_items(one.evaluation.folder) for one in models}
    by_label = {one.label: items[one.evaluation.folder].get(one.name, {}) for one in models}
    baseline, *others = by_label
    comparisons = compare_models(by_label, [(baseline, other) for other in others])
    for one in comparisons:
        if not one.metrics:
            reasons = "; ".join(one.notes) or "no metric has items"
            raise ArtifactError(
                f"{one.a} and {one.b}: nothing to compare ({reasons}); evaluate both on the same"
                " validation data"
            )
    return comparisons


def _evaluations(store: ArtifactStore) -> list[Evaluation]:
    """Return the evaluations that have items, newest first."""
    from llm.evaluation.items import ITEMS_JSONL

    folders = [
        folder for folder in store.artifacts([EVALUATE.name]) if (folder / ITEMS_JSONL).exists()
    ]
    folders.sort(key=lambda folder: (folder / MANIFEST).stat().st_mtime_ns, reverse=True)
    found: list[Evaluation] = []
    for folder in folders:
        manifest = read_manifest(folder)
        names = cast(Sequence[str], manifest.settings.get("models", ()))
        digests = {name: manifest.inputs[name] for name in names if name in manifest.inputs}
        found.append(Evaluation(folder=folder, digests=digests, settings=manifest.settings))
    return found


def _digest(word: str, store: ArtifactStore, evaluations: Sequence[Evaluation]) -> str:
    """Return the digest of the model that a word names."""
    if (folder := Path(word)).is_dir():
        return read_manifest(folder).digest
    if DIGEST.fullmatch(word):
        known = {folder.name for folder in store.artifacts(list(MODELS))}
        known.update(*(one.digests.values() for one in evaluations))
        found = sorted(digest for digest in known if digest.startswith(word))
        if len(found) > 1:
            raise ArtifactError(f"{word}: found {', '.join(found)}; expected the digest of one")
        if found:
            return found[0]
    if digest := _digest_of_run(word, store.root):
        return digest
    raise ArtifactError(
        f"{word}: found no such folder, no model of this digest in {store.root} and no run of this"
        " name in MLflow; expected the folder of a model, artifacts/STAGE/DIGEST, its digest, or"
        " the name of its run"
    )


def _digest_of_run(name: str, artifacts_dir: Path) -> str:
    """Return the digest of the newest run of a model with this name in MLflow, or nothing."""
    from tasks.tracking.client import (
        DIGEST_TAG,
        MlflowConnection,
        one_line,
        tracking_uri,
    )
    from tasks.tracking.files import DATABASE, database_uri

    uri = tracking_uri("", artifacts_dir)
    if uri == database_uri(artifacts_dir) and not (artifacts_dir / DATABASE).exists():
        return ""  # opening it would create it
    client = MlflowConnection(uri, artifacts_dir, "").client
    from mlflow.exceptions import MlflowException

    quote = '"' if "'" in name else "'"
    try:
        runs = client.search_runs(
            [experiment.experiment_id for experiment in client.search_experiments()],
            filter_string=f"attributes.run_name = {quote}{name}{quote}",
            order_by=["attributes.start_time DESC"],
        )
    except MlflowException as error:
        raise ArtifactError(
            f"{name}: no such folder or digest, and MLflow cannot be asked for a run of this name"
            f" ({one_line(error)})"
        ) from error
    digests = (run.data.tags.get(DIGEST_TAG, "") for run in runs)
    return next(filter(None, digests), "")


def _other_settings(models: Sequence[ComparedModel]) -> list[str]:
    """Say which settings of their evaluations differ from those of the first."""
    first, *others = models
    notes: list[str] = []
    for other in others:
        ours, theirs = first.evaluation.settings, other.evaluation.settings
        names = [
            name
            for name in sorted(ours.keys() | theirs.keys())
            if name != "models" and ours.get(name) != theirs.get(name)
        ]
        if names:
            settings = ", ".join(f"evaluate.{name}" for name in names)
            notes.append(f"{other.label} was evaluated with another {settings}")
    return notes


def _print(
    models: Sequence[ComparedModel], comparisons: "Sequence[Comparison]", notes: Sequence[str]
) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=1000, highlight=False)  # the terminal wraps, rich would cut numbers
    styles = {"better": "green", "worse": "red"}
    for one in comparisons:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("metric", no_wrap=True)
        for heading in (one.a, one.b, "difference", "95 % interval", "p", "items", "unpaired"):
            table.add_column(escape(heading), justify="right")
        table.add_column(escape(f"{one.b} is"))
        for name, found in one.metrics.items():
            low, high = found.interval
            table.add_row(
                escape(name),
                *(f"{value:.4f}" for value in (found.a, found.b)),
                f"{found.difference:+.4f}",
                f"{low:+.4f} to {high:+.4f}",
                f"{found.p_holm:.2g}",
                *(f"{count:,}" for count in (found.num_items, found.num_unpaired)),
                f"[{styles.get(found.verdict, 'default')}]{found.verdict}[/]",
            )
        console.print(table)
        for note in one.notes:
            console.print(escape(note))
        console.print()
    for note in notes:
        console.print(escape(note))
    for folder in dict.fromkeys(one.evaluation.folder for one in models):
        console.print(f"items of {escape(str(folder))}")
