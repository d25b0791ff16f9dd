"""The packed sequences of a training stage: opened, checked, and mixed with replayed text.

Replay of pretraining text in fine-tuning keeps the model from forgetting it (experience replay,
arXiv 1811.11682; for language models arXiv 2403.08763).

Shapes: B sequences, T positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llm.config import FinetuneConfig, OptimizationConfig
from llm.data.packed import PackedArrays, PackedSequences, sequence_order
from llm.errors import DataError
from llm.model.transformer import Transformer
from llm.runtime.job import Job
from llm.seeds import derive_seed
from llm.tokenizer.base import Tokenizer
from llm.training.shares import replayed_per_step

REPLAY = "replay_sequences"  # name of the input


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """An endless order of sequences, of which each step takes the next ones."""

    sequences: PackedSequences
    seed: int
    per_step: int
    """Sequences of a step over all processes."""

    def epochs(self, num_steps: int) -> float:
        """Return how often `num_steps` steps go through the sequences."""
        return num_steps * self.per_step / self.sequences.num_sequences


def open_sequences(
    job: Job, model: Transformer, tokenizer: Tokenizer
) -> tuple[PackedSequences, PackedSequences]:
    """Open the training and the validation split of the stage's data.

    Raises:
        DataError: another context or vocabulary than the model's, or no sequences.
    """
    train, validation = _open(job.inputs["sequences"], ("train", "validation"), model, tokenizer)
    return train, validation


def open_replay(
    job: Job, config: OptimizationConfig, model: Transformer, tokenizer: Tokenizer
) -> Source | None:
    """Open the text that the settings ask to replay, if they do.

    Raises:
        DataError: it does not fit the model, which the stage's own data fits.
    """
    if not isinstance(config, FinetuneConfig) or not config.replay_fraction:
        return None
    (sequences,) = _open(job.inputs[REPLAY], ("train",), model, tokenizer)
    per_step = replayed_per_step(config.replay_fraction, config.global_batch_size)
    # another order than that of pretraining, which has seen the text
    seed = derive_seed(job.seed, job.stage, "replay")
    return Source(sequences=sequences, seed=seed, per_step=per_step)


def _open(
    path: str, splits: Sequence[str], model: Transformer, tokenizer: Tokenizer
) -> list[PackedSequences]:
    folder = Path(path)
    found = [PackedSequences(folder, split) for split in splits]
    layout = found[0].layout
    problems: list[str] = []  # all at once: each run that fails costs the start of a process
    if layout.seq_len != model.seq_len:
        problems.append(f"seq_len: found {layout.seq_len}, expected the model's {model.seq_len}")
    for what, size in (("sequences", layout.vocab_size), ("tokenizer", tokenizer.vocab_size)):
        if size != model.vocab_size:
            problems.append(
                f"vocab_size: found {size} in the {what}, expected the model's {model.vocab_size}"
            )
    for name, split in zip(splits, found, strict=True):
        if not split.num_sequences or not split.info.num_target_tokens:
            problems.append(
                f"{name}: found {split.num_sequences} sequences with {split.info.num_target_tokens}"
                " target tokens, expected some; give more data or change clean.validation_fraction"
            )
    if problems:
        raise DataError(
            f"{folder}: these sequences do not fit the model; pack them with its tokenizer and"
            " context\n" + "\n".join(f"  {problem}" for problem in problems)
        )
    return found


def read_samples(sources: Sequence[Source], samples: npt.NDArray[np.int64]) -> PackedArrays:
    """Return the sequences at indices `samples` (B,) of training's endless sequence of steps.

    Each step holds `per_step` sequences of the first source, then those of the next. Every source
    goes through its own epochs: a function of the arguments alone, without a state.
    """
    sizes = np.array([source.per_step for source in sources])
    ends = np.cumsum(sizes)
    steps, positions = np.divmod(samples, ends[-1])
    numbers = np.searchsorted(ends, positions, side="right")  # (B,): the source of each
    order: list[npt.NDArray[np.int64]] = []
    parts: list[PackedArrays] = []
    for number, source in enumerate(sources):
        where = np.flatnonzero(numbers == number)
        of_source = steps[where] * source.per_step + positions[where] - (ends - sizes)[number]
        chosen = sample_sequences(source.seed, of_source, source.sequences.num_sequences)
        order.append(where)
        parts.append(source.sequences.read(chosen))
    back = np.argsort(np.concatenate(order))
    return PackedArrays(*(np.concatenate(arrays)[back] for arrays in zip(*parts, strict=True)))


def sample_sequences(
    seed: int, samples: npt.NDArray[np.int64], num_sequences: int
) -> npt.NDArray[np.int64]:
    """Return the packed sequences at indices `samples` of training's endless sequence of them.

    It is epoch after epoch, each a permutation of all. A function of its arguments alone: there is
    no state to save, and the number of processes does not matter.
    """
    # a step may span two epochs, so no sequence is ever dropped at the end of one
    epochs, positions = samples // num_sequences, samples % num_sequences
    chosen = np.empty(len(samples), dtype=np.int64)
    for epoch in np.unique(epochs):
        is_in_epoch = epochs == epoch
        order = sequence_order(seed, int(epoch), positions[is_in_epoch], num_sequences)
        chosen[is_in_epoch] = order
    return chosen
