"""Stopping criteria: where a completion ends, searched in ids or in text as tokens arrive.

Output that may be the beginning of a stop is held back until it is known not to be one, so that no
part of a stop is ever emitted.
"""

import codecs
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from llm.errors import ConfigError
from llm.inference.options import GenerationOptions
from llm.tokenizer.base import Tokenizer

Output = TypeVar("Output", str, tuple[int, ...])
OutputCovariant = TypeVar("OutputCovariant", str, tuple[int, ...], covariant=True)


class StoppingCriterion(Protocol[OutputCovariant]):
    """Of one sequence: takes its tokens and releases what belongs to the completion."""

    def add(self, new: tuple[int, ...], /) -> tuple[OutputCovariant, bool]:
        """Return what is released now, and whether the completion ends."""
        ...

    def flush(self) -> OutputCovariant:
        """Return what was held back, when no more tokens come."""
        ...


class StopSearch(Generic[Output]):
    """Incremental search for the first of several stops."""

    def __init__(self, stops: Sequence[Output], empty: Output) -> None:
        self._stops, self._empty = stops, empty
        self._held = empty

    def add(self, new: Output) -> tuple[Output, bool]:
        """Return what cannot be part of a stop, up to one if it is found, and whether it is."""
        held = self._held + new
        for start in range(len(held)):
            rest = held[start:]
            if any(rest[: len(stop)] == stop for stop in self._stops):
                self._held = self._empty
                return held[:start], True
            if any(stop[: len(rest)] == rest for stop in self._stops):
                self._held = rest
                return held[:start], False
        self._held = self._empty
        return held, False

    def flush(self) -> Output:
        """Return what was held back, up to a short stop inside the beginning of a longer one."""
        held, self._held = self._held, self._empty
        for start in range(len(held)):
            if any(held[start : start + len(stop)] == stop for stop in self._stops):
                return held[:start]
        return held


def id_stopping_criterion(options: GenerationOptions) -> StopSearch[tuple[int, ...]]:
    """Return a criterion that ends at a stop id or at a sequence of ids.

    Raises:
        ConfigError: a stop is a text, which ids alone do not give.
    """
    if texts := _text_stops(options):
        raise ConfigError(
            f"stops: found the text {texts[0]!r}, expected sequences of ids where ids are"
            " generated; generate text instead"
        )
    return StopSearch(_id_stops(options), ())


class TextStoppingCriterion:
    """Ends at any stop, and decodes ids to text as soon as characters are complete.

    A token may end inside a character; bytes that never complete one become U+FFFD.
    """

    def __init__(self, options: GenerationOptions, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids = StopSearch(_id_stops(options), ())
        self._texts = StopSearch(_text_stops(options), "")
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, new: tuple[int, ...], /) -> tuple[str, bool]:
        """Return the text released, and whether the completion ends."""
        ids, is_stopped = self._ids.add(new)
        text, is_text_stopped = self._texts.add(self._decode(ids, is_last=is_stopped))
        if is_stopped and not is_text_stopped:
            text += self._texts.flush()
        return text, is_stopped or is_text_stopped

    def flush(self) -> str:
        """Return the text held back."""
        text, is_stopped = self._texts.add(self._decode(self._ids.flush(), is_last=True))
        return text if is_stopped else text + self._texts.flush()

    def _decode(self, ids: Sequence[int], *, is_last: bool) -> str:
        return self._decoder.decode(self._tokenizer.decode_bytes(ids), final=is_last)


def _id_stops(options: GenerationOptions) -> list[tuple[int, ...]]:
    sequences = [stop for stop in options.stops if not isinstance(stop, str)]
    return [*((each,) for each in options.stop_ids), *sequences]


def _text_stops(options: GenerationOptions) -> list[str]:
    return [stop for stop in options.stops if isinstance(stop, str)]
