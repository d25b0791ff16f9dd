"""Selection of the best weights by validation loss, and early stopping.

For other rules of when to stop see Prechelt 1998, "Early Stopping - But When?"
(doi 10.1007/3-540-49430-8_3).
"""

from dataclasses import dataclass

from llm.artifact import Json
from llm.config import BestConfig, OptimizationConfig, TuningConfig
from llm.training.kept_weights import KeptWeights
from llm.training.loop import TrainState


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Decides which weights a stage keeps and when it ends.

    All of it is a function of the training state, so a checkpoint needs no more.
    """

    config: BestConfig
    num_steps: int
    state: TrainState
    kept: KeptWeights

    def is_due(self, step: int) -> bool:
        """Tell whether the weights of `step` are measured."""
        every_steps = self.config.every_steps
        # not those before the first step: a stage gives trained weights
        return step > 0 and every_steps > 0 and (step % every_steps == 0 or step == self.num_steps)

    def consider(self, loss: float) -> None:
        """Keep the model's weights if their loss is the lowest so far."""
        # less, not equal: of equals the earlier stays, also when a resumed training measures the
        # step of its checkpoint again
        if self.state.best_loss is None or loss < self.state.best_loss:
            self.state.best_step, self.state.best_loss = self.state.step, loss
            self.kept.keep_best()

    @property
    def has_stopped_early(self) -> bool:
        """Whether the last `patience` validations gave no new best, before the last step."""
        state, patience = self.state, self.config.patience
        if not patience or state.best_loss is None or state.step == self.num_steps:
            return False
        # from the steps alone: the same on all processes, and after a resume
        return (state.step - state.best_step) // self.config.every_steps >= patience

    def summary(self) -> dict[str, Json]:
        """Return what the artifact's summary says about the selection."""
        if not self.config.every_steps:
            return {}
        early = f"stopped early at step {self.state.step} of {self.num_steps}"
        return {
            "ended": early if self.has_stopped_early else f"after all {self.num_steps} steps",
            "best_step": self.state.best_step,
            "best_loss": self.state.best_loss,
        }


def make_selection(config: OptimizationConfig, state: TrainState, kept: KeptWeights) -> Selection:
    """Return the selection of a stage; pretraining has none."""
    best = config.best if isinstance(config, TuningConfig) else BestConfig()
    return Selection(config=best, num_steps=config.num_steps, state=state, kept=kept)
