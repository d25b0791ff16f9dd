"""The models that a pipeline trains, as one table; a new training stage is one more entry.

It imports nothing heavy, so that a command line can read it at once.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineModel:
    """One model, made by one training stage."""

    stage: str
    """Its module `llm.<stage>` and its section of the recipe."""
    name: str
    """Prefix of its metrics (`base/bits_per_byte`) and of its run in MLflow."""
    data: Literal["text", "chats"]
    """What it is trained on. A model of chats answers messages; one of text continues prompts."""


MODELS: dict[str, PipelineModel] = {
    model.stage: model
    for model in (
        PipelineModel(stage="pretrain", name="base", data="text"),
        PipelineModel(stage="finetune", name="chat", data="chats"),
    )
}
"""By stage, in training order. The first starts from random weights, the others from the model
before them in the recipe.
"""


def chat_models() -> list[PipelineModel]:
    """Return the models that answer messages, in training order."""
    return [model for model in MODELS.values() if model.data == "chats"]
