"""The result of a run; imports neither prefect nor mlflow."""

from collections.abc import Sequence
from dataclasses import dataclass

from flows.services.addresses import addresses
from llm.config import RunConfig
from tasks.cached import Outcome, cached_outcome
from tasks.plan import PlannedStep
from tasks.store import ArtifactStore


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The result of a run, whether its steps were built or cached."""

    recipe: str
    outcomes: list[Outcome]
    mlflow_run_id: str
    addresses: dict[str, str]
    """Addresses of the pages of MLflow and Prefect, by name."""


def cached_result(
    config: RunConfig, plan: Sequence[PlannedStep], store: ArtifactStore
) -> RunResult:
    """Return the result of a run whose steps are all cached, read from the store."""
    outcomes = [cached_outcome(item, store) for item in plan]
    return RunResult(
        recipe=config.name,
        outcomes=outcomes,
        mlflow_run_id=outcomes[-1].links.get("mlflow_run_id", ""),
        addresses=addresses(config.runtime, store.root),
    )
