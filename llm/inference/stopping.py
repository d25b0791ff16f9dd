"""Where a continuation ends: looked for in ids or in text while they are made.

What may be the beginning of a stop is held back until it is known to be none, so that nothing of a
stop is ever shown.
"""

import codecs
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from llm.errors import ConfigError
from llm.inference.sampling import Sampling
from llm.tokenizer.base import Tokenizer

Piece = TypeVar("Piece", str, tuple[int, ...])
PieceOut = TypeVar("PieceOut", str, tuple[int, ...], covariant=True)


class Ending(Protocol[PieceOut]):
    """One row's: takes its tokens, gives what is sure to be part of the continuation."""

    def take(self, token: int) -> tuple[PieceOut, bool]:
        """Return what is now sure, and whether the row ends."""
        ...

    def flush(self) -> PieceOut:
        """Return what was held back of the continuation, when no more comes."""
        ...


class StopSearch(Generic[Piece]):
    """Looks for the first of several sequences in one that arrives in pieces."""

    def __init__(self, stops: Sequence[Piece], nothing: Piece) -> None:
        self._stops, self._nothing = stops, nothing
        self._held = nothing

    def take(self, piece: Piece) -> tuple[Piece, bool]:
        """Return what cannot be part of a stop, up to one if it is found, and whether it is."""
        held = self._held + piece
        for start in range(len(held)):
            rest = held[start:]
            if any(rest[: len(stop)] == stop for stop in self._stops):
                self._held = self._nothing
                return held[:start], True
            if any(stop[: len(rest)] == rest for stop in self._stops):
                self._held = rest
                return held[:start], False
        self._held = self._nothing
        return held, False

    def flush(self) -> Piece:
        """Return what was held back, up to a stop in what was the beginning of a longer one."""
        held, self._held = self._held, self._nothing
        for start in range(len(held)):
            if any(held[start : start + len(stop)] == stop for stop in self._stops):
                return held[:start]
        return held


class IdEnding:
    """Ends at a stop id, or at a sequence of ids that `sampling` stops at.

    Raises:
        ConfigError: `sampling` stops at a text, which ids alone do not say.
    """

    def __init__(self, stop_ids: Sequence[int], sampling: Sampling) -> None:
        texts = [stop for stop in sampling.stops if isinstance(stop, str)]
        if texts:
            raise ConfigError(
                f"stops: found the text {texts[0]!r}, expected sequences of ids where ids are made;"
                " make text instead"
            )
        self._search = StopSearch(_id_stops(stop_ids, sampling), ())

    def take(self, token: int) -> tuple[tuple[int, ...], bool]:
        """Return ids that are sure, and whether the row ends."""
        return self._search.take((token,))

    def flush(self) -> tuple[int, ...]:
        """Return the ids held back."""
        return self._search.flush()


class TextEnding:
    """Ends at any stop, and turns ids into text as soon as its characters are whole.

    A token may end inside a character; what never becomes one is U+FFFD.
    """

    def __init__(self, stop_ids: Sequence[int], sampling: Sampling, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids = StopSearch(_id_stops(stop_ids, sampling), ())
        texts = [stop for stop in sampling.stops if isinstance(stop, str)]
        self._texts = StopSearch(texts, "")
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def take(self, token: int) -> tuple[str, bool]:
        """Return text that is sure, and whether the row ends."""
        ids, is_ended = self._ids.take((token,))
        text, is_text_ended = self._texts.take(self._decode(ids, is_last=is_ended))
        if is_ended and not is_text_ended:
            text += self._texts.flush()
        return text, is_ended or is_text_ended

    def flush(self) -> str:
        """Return the text held back."""
        text, is_ended = self._texts.take(self._decode(self._ids.flush(), is_last=True))
        return text if is_ended else text + self._texts.flush()

    def _decode(self, ids: Sequence[int], *, is_last: bool) -> str:
        return self._decoder.decode(self._tokenizer.decode_bytes(ids), final=is_last)


def _id_stops(stop_ids: Sequence[int], sampling: Sampling) -> list[tuple[int, ...]]:
    sequences = [stop for stop in sampling.stops if not isinstance(stop, str)]
    return [*((each,) for each in stop_ids), *sequences]
