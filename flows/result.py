"""What a run came to, built or found; needs neither prefect nor mlflow."""

from collections.abc import Sequence
from dataclasses import dataclass

from flows.services.servers import addresses
from llm.config import RunConfig
from tasks.cached import Outcome, cached_outcome
from tasks.plan import PlannedStep
from tasks.store import Store


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run came to."""

    recipe: str
    outcomes: list[Outcome]
    mlflow_run_id: str
    addresses: dict[str, str]
    """Where to look: MLflow, Prefect."""


def cached_result(config: RunConfig, plan: Sequence[PlannedStep], store: Store) -> RunResult:
    """Return the result of a run that had nothing to do, from what is on disk."""
    outcomes = [cached_outcome(item, store) for item in plan]
    return RunResult(
        recipe=config.name,
        outcomes=outcomes,
        mlflow_run_id=outcomes[-1].links.get("mlflow_run_id", ""),
        addresses=addresses(config.runtime, store.root),
    )
