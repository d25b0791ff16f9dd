"""Selection of the best weights and early stopping, against the rule written out over a list."""

from hypothesis import given
from hypothesis import strategies as st

from llm.config import BestConfig, PretrainConfig
from llm.training.kept_weights import KeptWeights
from llm.training.loop import TrainState
from llm.training.selection import Selection, make_selection
from tests.llm.training_setup import tiny_finetune, tiny_model


class Counted(KeptWeights):
    """Counts the copies instead of making them."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def keep_best(self) -> None:
        """Count."""
        self.steps.append(1)


@given(
    losses=st.lists(st.integers(0, 5).map(float), min_size=1, max_size=12),
    every_steps=st.integers(1, 4),
    rest=st.integers(0, 3),
    patience=st.integers(0, 4),
)
def test_the_first_of_the_lowest_is_kept_and_training_ends_after_patience(
    losses: list[float], every_steps: int, rest: int, patience: int
) -> None:
    num_steps = every_steps * len(losses) + min(rest, every_steps - 1)
    measured = dict(zip(range(every_steps, num_steps + 1, every_steps), losses, strict=True))
    measured.setdefault(num_steps, 2.5)
    best, state = BestConfig(every_steps=every_steps, patience=patience), TrainState()
    selection = Selection(config=best, num_steps=num_steps, state=state, kept=Counted())
    # the rule: stop at the first validation with `patience` of them since the best
    seen: list[tuple[float, int]] = []
    end = num_steps
    for step, loss in measured.items():
        seen.append((loss, step))
        if patience and step < num_steps and len(seen) - 1 - seen.index(min(seen)) >= patience:
            end = step
            break
    while state.step < num_steps and not selection.has_stopped_early:
        state.step += 1
        assert selection.is_due(state.step) == (state.step in measured)
        if selection.is_due(state.step):
            selection.consider(measured[state.step])
            selection.consider(measured[state.step])  # a resume measures again: no change
    assert (state.step, state.best_loss, state.best_step) == (end, *min(seen))
    assert selection.has_stopped_early == (end < num_steps)
    told = str(selection.summary()["ended"])
    assert told.startswith("stopped early at step" if end < num_steps else "after all")


def test_pretraining_and_a_stage_without_the_setting_select_nothing() -> None:
    for config in (PretrainConfig(), tiny_finetune()):
        kept = KeptWeights(tiny_model(), config)
        selection = make_selection(config, TrainState(step=4), kept)
        assert not any(map(selection.is_due, range(5)))
        assert not selection.has_stopped_early and not selection.summary()
