"""Mix several sources of documents by tokens: deterministic, and never far from the weights.

The next document always comes from the source that has given the fewest tokens for its weight, so
that at every point the tokens of each source are within one document of its share. The mixture ends
when every source has been read once; a source that is too small for its weight is read again, and
that is counted.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from llm.config import ShareConfig
from llm.errors import DataError

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How long a document is."""

    num_tokens: int
    num_bytes: int


@dataclass(kw_only=True, slots=True)
class SourceTally:
    """What a source gave to the mixture."""

    num_tokens: int = 0
    num_documents: int = 0
    """Each reading of a document counts."""
    num_distinct_documents: int = 0

    @property
    def num_epochs(self) -> float:
        """How often its documents were read, on average."""
        return round(self.num_documents / max(1, self.num_distinct_documents), 3)


def mix(
    shares: Sequence[ShareConfig],
    sources: Sequence[Callable[[], Iterator[Item]]],
    size_of: Callable[[Item], Size],
    tallies: Sequence[SourceTally],
) -> Iterator[Item]:
    """Yield documents of `sources`, each a way to read one in order, by the weights of `shares`.

    `tallies`, one for each source, are filled as the documents are taken.

    Raises:
        DataError: a source gives no document, or its caps allow none.
    """
    numbered = enumerate(zip(shares, sources, tallies, strict=True))
    readings = [_read(number, *parts, size_of) for number, parts in numbered]
    unread = set(range(len(shares)))
    while True:
        number = min(range(len(shares)), key=lambda n: tallies[n].num_tokens / shares[n].weight)
        item = next(readings[number])
        if item is not None:
            tallies[number].num_tokens += size_of(item).num_tokens
            tallies[number].num_documents += 1
            yield item
        elif not (unread := unread - {number}):
            return


def _read(
    number: int,
    share: ShareConfig,
    source: Callable[[], Iterator[Item]],
    tally: SourceTally,
    size_of: Callable[[Item], Size],
) -> Iterator[Item | None]:
    """Yield the documents that the caps allow, None, and the same documents over and over."""
    left_tokens, left_bytes = share.max_tokens, share.max_bytes
    for item in source():
        size = size_of(item)
        left_tokens, left_bytes = left_tokens - size.num_tokens, left_bytes - size.num_bytes
        if (share.max_tokens and left_tokens < 0) or (share.max_bytes and left_bytes < 0):
            break
        tally.num_distinct_documents += 1
        yield item
    if tally.num_distinct_documents == 0:
        raise DataError(
            f"sources.{number}: no document of it is left for training; expected at least one. Give"
            " more data, raise its max_tokens and max_bytes, or leave it out"
        )
    yield None
    while True:
        again = source()
        for _ in range(tally.num_distinct_documents):
            yield next(again)
