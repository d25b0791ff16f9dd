"""Items of an evaluation: the outcome of each document or question, by which models are compared.

`items.jsonl` has one line for its format and what the metrics mean, then one for each metric, model
and item (110 bytes each):

    {"format":"items","version":1,"higher_is_better":{"bits_per_byte":false,"exact_match":true}}
    {"metric":"bits_per_byte","model":"base","id":"0f3c...","numerator":1033.2,"denominator":812}

A metric is the sum of the numerators over the sum of the denominators: bits over bytes, nats over
tokens, 1 or 0 over 1. An id does not depend on the model: it is that of the document in `clean`, or
a hash of question and answer.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm.artifact import ArtifactWriter, digest
from llm.errors import ArtifactError
from llm.evaluation.report import rounded

ITEMS_JSONL = "items.jsonl"
FORMAT, VERSION = "items", 1

ModelItems = Mapping[str, "Items"]
"""The items of one model by metric."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Items:
    """The outcomes of one model on N items, which make one metric."""

    ids: Sequence[str]
    """(N,), unique."""
    numerators: npt.NDArray[np.float64]
    """(N,)"""
    denominators: npt.NDArray[np.float64]
    """(N,), positive: how much there was to predict, whatever the model."""
    higher_is_better: bool = False

    @property
    def value(self) -> float:
        """The metric."""
        return float(self.numerators.sum() / self.denominators.sum())


def make_items(
    ids: Iterable[str],
    numerators: npt.ArrayLike,
    denominators: npt.ArrayLike | None = None,
    *,
    higher_is_better: bool = False,
) -> Items:
    """Return items without those that count nothing. Denominators are 1 by default.

    The second of two equal ids becomes `ID-2`. Numerators are rounded, as a report's metrics are.
    """
    above = np.array([rounded(value) for value in np.asarray(numerators, dtype=np.float64)])
    below = np.ones(len(above)) if denominators is None else np.asarray(denominators, np.float64)
    counts = below > 0
    found = [one for one, is_counted in zip(ids, counts, strict=True) if is_counted]
    return Items(
        ids=_numbered(found),
        numerators=above[counts],
        denominators=below[counts],
        higher_is_better=higher_is_better,
    )


def hashed_id(*parts: object) -> str:
    """Return the id of an item that has none: a hash of what the model is asked, and of the answer
    expected.
    """
    return digest(list(parts))


def write_items(writer: ArtifactWriter, items: Mapping[str, ModelItems]) -> None:
    """Write `items.jsonl`: the items of each model, by its name."""
    directions = {
        metric: found.higher_is_better
        for of_model in items.values()
        for metric, found in of_model.items()
    }
    head = {"format": FORMAT, "version": VERSION, "higher_is_better": directions}
    with writer.open(ITEMS_JSONL) as file:
        file.write(_line(head))
        for metric in directions:
            for model, of_model in items.items():
                if (found := of_model.get(metric)) is not None:
                    file.writelines(_lines(metric, model, found))


def read_items(folder: Path) -> dict[str, dict[str, Items]]:
    """Read what `write_items` wrote: the items of each model, by its name and by metric.

    Raises:
        ArtifactError: no items, or not of this version.
    """
    path = folder / ITEMS_JSONL
    columns: dict[tuple[str, str], tuple[list[str], list[float], list[float]]] = {}
    number = 1
    try:
        with path.open("rb") as file:
            head: dict[str, Any] = json.loads(next(file, b"null"))
            if (found := (head["format"], head["version"])) != (FORMAT, VERSION):
                raise ValueError(f"found {found}, expected {(FORMAT, VERSION)}")
            directions: dict[str, bool] = head["higher_is_better"]
            for line in file:
                number += 1
                item: dict[str, Any] = json.loads(line)
                ids, above, below = columns.setdefault(
                    (item["model"], item["metric"]), ([], [], [])
                )
                ids.append(item["id"])
                above.append(item["numerator"])
                below.append(item["denominator"])
        items: dict[str, dict[str, Items]] = {}
        for (model, metric), (ids, above, below) in columns.items():
            items.setdefault(model, {})[metric] = Items(
                ids=ids,
                numerators=np.array(above, dtype=np.float64),
                denominators=np.array(below, dtype=np.float64),
                higher_is_better=directions[metric],
            )
        return items
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: not there; evaluate again") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(
            f"{path}: line {number}: no items of this version ({error}); evaluate again"
        ) from error


def _lines(metric: str, model: str, items: Items) -> Iterable[bytes]:
    for one, above, below in zip(items.ids, items.numerators, items.denominators, strict=True):
        yield _line(
            {
                "metric": metric,
                "model": model,
                "id": one,
                "numerator": _number(above),
                "denominator": _number(below),
            }
        )


def _line(record: Mapping[str, object]) -> bytes:
    return json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _number(value: float) -> int | float:
    """Return counts as integers, which are shorter."""
    return int(value) if float(value).is_integer() else float(value)


def _numbered(ids: Sequence[str]) -> list[str]:
    seen: dict[str, int] = {}
    for one in ids:
        seen[one] = seen.get(one, 0) + 1
    if len(seen) == len(ids):
        return list(ids)
    numbered: list[str] = []
    seen.clear()
    for one in ids:
        seen[one] = seen.get(one, 0) + 1
        numbered.append(one if seen[one] == 1 else f"{one}-{seen[one]}")
    return numbered
