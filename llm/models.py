"""The stages that train a model, as one table, and the trainings of a recipe.

It imports nothing heavy, so that a command line can read it at once.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # settings read the table
    from llm.config import OptimizationConfig, RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineModel:
    """The model of one training stage."""

    stage: str
    """Its module `llm.<stage>` and its section of the recipe."""
    name: str
    """Prefix of its metrics (`base/bits_per_byte`) and of its run in MLflow."""


MODELS: dict[str, PipelineModel] = {
    model.stage: model
    for model in (
        PipelineModel(stage="pretrain", name="base"),
        PipelineModel(stage="finetune", name="chat"),
        PipelineModel(stage="align", name="aligned"),
    )
}
"""By stage, in training order. The first starts from random weights, the others from the model
before them in the recipe.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """One training of a recipe: a stage, or one of several trainings of it."""

    stage: str
    role: str
    """Empty, or the name of one of several."""
    dotted: str
    """Its section of the recipe: `finetune` or `finetune.stages.0`."""
    settings: "OptimizationConfig"

    @property
    def model_name(self) -> str:
        """Name of its model."""
        return model_name(self.stage, self.role)


def trainings(config: "RunConfig") -> list[Training]:
    """Return the trainings of a recipe, in order."""
    found: list[Training] = []
    for stage in (next(iter(MODELS)), *config.stages_after_pretrain):
        section = getattr(config, stage)
        several = getattr(section, "stages", ())
        if not several:
            found.append(Training(stage=stage, role="", dotted=stage, settings=section))
        for index, one in enumerate(several):
            dotted = f"{stage}.stages.{index}"
            found.append(Training(stage=stage, role=one.name, dotted=dotted, settings=one))
    return found


def model_name(stage: str, role: str) -> str:
    """Return the name of the model that a training stage made."""
    return role or MODELS[stage].name


def dataset_of(settings: "OptimizationConfig") -> str:
    """Return the name of the dataset that a training reads."""
    name = getattr(settings, "data", "corpus")
    default = "preferences" if getattr(settings, "method", "") == "dpo" else "chats"
    return name or default
