"""Mix several sources of documents by tokens: deterministic, and never far from the weights.

The next document comes from the source that has given the fewest tokens for its weight, so that at
every point each source's tokens are within one document of its share. The mixture ends when every
source has been read once; until then, sources that are too small for their weight are read again,
and that is counted.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from llm.config import ShareConfig

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentSize:
    """Length of a document."""

    num_tokens: int
    num_bytes: int


@dataclass(kw_only=True, slots=True)
class SourceTally:
    """Counts of what a source gave to the mixture."""

    num_tokens: int = 0
    num_documents: int = 0
    """A document counts each time that it is read."""
    num_distinct_documents: int = 0

    @property
    def num_epochs(self) -> float:
        """Mean number of times that its documents were read."""
        return round(self.num_documents / max(1, self.num_distinct_documents), 3)


def mix_sources(
    shares: Sequence[ShareConfig],
    sources: Sequence[Callable[[], Iterator[Item]]],
    size_of: Callable[[Item], DocumentSize],
    tallies: Sequence[SourceTally],
) -> Iterator[Item]:
    """Yield documents of `sources`, functions that read one in order, by the weights of `shares`.

    `tallies`, one for each source, count the documents as they are taken. A source whose caps allow
    no document is left out.
    """
    parts = zip(shares, sources, tallies, strict=True)
    readings = [_read(share, source, tally, size_of) for share, source, tally in parts]
    unread = set(range(len(shares)))
    giving = list(unread)
    while unread:
        number = min(giving, key=lambda n: tallies[n].num_tokens / shares[n].weight)
        item = next(readings[number])
        if item is not None:
            tallies[number].num_tokens += size_of(item).num_tokens
            tallies[number].num_documents += 1
            yield item
        else:
            unread.discard(number)
            if not tallies[number].num_documents:
                giving.remove(number)


def add_tallies(tallies: Iterable[SourceTally]) -> SourceTally:
    """Return the sum of the tallies of one source."""
    total = SourceTally()
    for tally in tallies:
        total.num_tokens += tally.num_tokens
        total.num_documents += tally.num_documents
        total.num_distinct_documents += tally.num_distinct_documents
    return total


def _read(
    share: ShareConfig,
    source: Callable[[], Iterator[Item]],
    tally: SourceTally,
    size_of: Callable[[Item], DocumentSize],
) -> Iterator[Item | None]:
    """Yield the documents that the caps allow, then None, then the same documents for ever."""
    left_tokens, left_bytes = share.max_tokens, share.max_bytes
    for item in source():
        size = size_of(item)
        left_tokens, left_bytes = left_tokens - size.num_tokens, left_bytes - size.num_bytes
        if (share.max_tokens and left_tokens < 0) or (share.max_bytes and left_bytes < 0):
            break
        tally.num_distinct_documents += 1
        yield item
    yield None
    while True:
        again = source()
        for _ in range(tally.num_distinct_documents):
            yield next(again)
