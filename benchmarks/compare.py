"""Paired comparison: the time of `fromscratch compare`, and how often it finds what is not there.

    python -m benchmarks.compare [FOLDER]

Time: two models with 10,000 items each of three metrics, as a command of its own. False verdicts:
100 pairs of models that differ by chance only, made of stored items: each item is drawn again from
all items, and the outcomes of the two models are exchanged by the throw of a coin. Without a folder
of an evaluation with two models, the items are made up.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from llm.artifact import ArtifactWriter, Json
from llm.evaluation.items import Items, ModelItems, make_items, read_items, write_items
from llm.evaluation.paired import compare_models

NUM_ITEMS, NUM_PAIRS, ITEMS_PER_PAIR = 10_000, 100, 500


def made_up_items() -> dict[str, dict[str, Items]]:
    """Two models with the same skill on documents, chats and questions, some of them hard."""
    generator = np.random.default_rng(1)
    size = np.ceil(np.exp(generator.normal(6, 1, NUM_ITEMS)))
    hardness = size * np.exp(generator.normal(0.3, 0.3, NUM_ITEMS))
    chance = generator.beta(0.5, 0.5, NUM_ITEMS)
    ids = [f"{index:032x}" for index in range(NUM_ITEMS)]

    def losses() -> Items:
        return make_items(ids, hardness * np.exp(generator.normal(0, 0.05, NUM_ITEMS)), size)

    def answers() -> Items:
        return make_items(ids, generator.random(NUM_ITEMS) < chance, higher_is_better=True)

    return {
        model: {"bits_per_byte": losses(), "answer_loss": losses(), "exact_match": answers()}
        for model in ("base", "chat")
    }


def seconds_of_the_command(items: dict[str, dict[str, Items]]) -> tuple[float, float]:
    """Write an evaluation of the models, and return the wall and the processor time of the command
    that compares them.
    """
    with tempfile.TemporaryDirectory() as folder:
        writer = ArtifactWriter(Path(folder) / "evaluate" / "items")
        write_items(writer, items)
        digests = {model: f"{index:032x}" for index, model in enumerate(items, start=1)}
        settings: dict[str, Json] = {"models": [*items]}
        writer.finish(stage="evaluate", summary={}, settings=settings, inputs=digests)
        command = [sys.executable, "-m", "flows.cli", "compare", *digests.values()]
        started_at = time.monotonic()
        subprocess.run([*command, "--artifacts", folder], check=True)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.monotonic() - started_at, used.ru_utime + used.ru_stime


def false_verdicts(a: ModelItems, b: ModelItems) -> dict[str, int]:
    """Count, of each metric, the pairs in which the second model is called better, and in which it
    is called better or worse.
    """
    counts = {f"{kind} {metric}": 0 for metric in a for kind in ("better:", "p < 0.05:")}
    counts["any better:"] = 0
    for seed in range(NUM_PAIRS):
        generator = np.random.default_rng([2, seed])
        models: dict[str, dict[str, Items]] = {"a": {}, "b": {}}
        for metric in a:
            chosen = generator.integers(0, len(a[metric].ids), ITEMS_PER_PAIR)
            is_exchanged = generator.random(ITEMS_PER_PAIR) < 0.5
            ours, theirs = a[metric].numerators[chosen], b[metric].numerators[chosen]
            for model, first, second in (("a", ours, theirs), ("b", theirs, ours)):
                models[model][metric] = make_items(
                    map(str, range(ITEMS_PER_PAIR)),
                    np.where(is_exchanged, second, first),
                    a[metric].denominators[chosen],
                    higher_is_better=a[metric].higher_is_better,
                )
        (found,) = compare_models(models, [("a", "b")])
        counts["any better:"] += any(one.verdict == "better" for one in found.metrics.values())
        for metric, one in found.metrics.items():
            counts[f"better: {metric}"] += one.verdict == "better"
            counts[f"p < 0.05: {metric}"] += one.p_value < 0.05
    return counts


def main() -> None:
    """Print both."""
    items = read_items(Path(sys.argv[1])) if len(sys.argv) > 1 else made_up_items()
    a, b = list(items.values())[:2]
    num_items = sum(len(one.ids) for one in a.values())
    wall, processor = seconds_of_the_command(items)
    print(f"{wall:.2f} s ({processor:.2f} s of processor) for {num_items:,} items of each model")
    for name, count in false_verdicts(a, b).items():
        print(f"{count:4} of {NUM_PAIRS} pairs of equal models, {name}")


if __name__ == "__main__":
    main()
