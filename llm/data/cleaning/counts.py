"""What became of documents: each is kept, or counted under one reason; the steps are a funnel."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

from llm.artifact import Json
from llm.data.raw.records import Skip

MAX_REJECTED_EXAMPLES = 20
"""Kept of each reason."""
STEPS = ("read", "filters", "length", "exact duplicates", "near duplicates", "decontamination")
"""In their order."""
COUNTERS = ("num_kept", "kept_bytes", "skipped", "skipped_at")


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A document that was left out."""

    reason: str
    file: str
    line: int
    excerpt: str
    shard: int = 0
    record: int = 0
    """Which of the shard's records it is: examples are shown in the order they were read in."""


@dataclass(kw_only=True, slots=True)
class Tally:
    """The counts: read = train + validation + skipped."""

    num_read: int = 0
    num_kept: Counter[str] = field(default_factory=Counter[str])
    """Documents by split."""
    kept_bytes: Counter[str] = field(default_factory=Counter[str])
    """Bytes of text by split."""
    skipped: Counter[str] = field(default_factory=Counter[str])
    """Documents by reason."""
    skipped_at: Counter[str] = field(default_factory=Counter[str])
    """Documents by step."""
    examples: list[Example] = field(default_factory=list[Example])
    """At least the first of each reason."""
    num_decode_errors: int = 0

    def skip(self, skip: Skip, record: int, step: str) -> None:
        """Count a document that is left out, and show it while it is one of the first."""
        self.count(skip.reason, step, 1)
        if self.skipped[skip.reason] <= MAX_REJECTED_EXAMPLES:
            self.show(skip, record)

    def count(self, reason: str, step: str, num_documents: int) -> None:
        """Count documents that are left out; the first are for the caller to show."""
        if num_documents:
            self.skipped_at[step] += num_documents
            self.skipped[reason] += num_documents

    def show(self, skip: Skip, record: int, shard: int = 0) -> None:
        """Keep a document that was left out as an example."""
        place = skip.place
        self.examples.append(
            Example(reason=skip.reason, file=place.file, line=place.line, excerpt=skip.excerpt,
                    shard=shard, record=record)
        )  # fmt: skip

    def keep(self, side: str, size_bytes: int, num_documents: int = 1) -> None:
        """Count documents that are written."""
        self.num_kept[side] += num_documents
        self.kept_bytes[side] += size_bytes

    def add(self, other: "Tally", shard: int, lines_before: int) -> None:
        """Add what a shard read and left out; what it kept may be left out later.

        Shards are added in their order. What this one read begins `lines_before` lines after the
        beginning of its file.
        """
        self.num_read += other.num_read
        self.num_decode_errors += other.num_decode_errors
        self.skipped += other.skipped
        self.skipped_at += other.skipped_at
        for example in other.examples:
            line = example.line + lines_before
            self.examples.append(replace(example, shard=shard, line=line))

    def rejected(self) -> list[dict[str, Json]]:
        """Return the first examples of each reason, in the order they were read in."""
        num_shown = Counter[str]()
        rejected: list[dict[str, Json]] = []
        for example in sorted(self.examples, key=lambda one: (one.shard, one.record)):
            num_shown[example.reason] += 1
            if num_shown[example.reason] <= MAX_REJECTED_EXAMPLES:
                names = ("reason", "file", "line", "excerpt")
                rejected.append({name: getattr(example, name) for name in names})
        return rejected

    def to_json(self) -> dict[str, Json]:
        """Return what `from_json` takes."""
        counters: dict[str, Json] = {name: dict(getattr(self, name)) for name in COUNTERS}
        return {
            **counters,
            "num_read": self.num_read,
            "num_decode_errors": self.num_decode_errors,
            "examples": [asdict(example) for example in self.examples],
        }

    @classmethod
    def from_json(cls, found: Json) -> "Tally":
        """Return the tally that `to_json` described."""
        fields = cast(Mapping[str, Mapping[str, int]], found)
        examples = [
            Example(**example) for example in cast(list[dict[str, Any]], fields["examples"])
        ]
        return cls(
            num_read=cast(int, fields["num_read"]),
            num_decode_errors=cast(int, fields["num_decode_errors"]),
            examples=examples,
            **{name: Counter(fields[name]) for name in COUNTERS},
        )

    def funnel(self, steps: Sequence[str] = STEPS) -> list[Json]:
        """Return for each step how many documents it dropped and how many it left."""
        assert self.num_read == self.num_kept.total() + self.skipped.total()
        assert set(self.skipped_at) <= set(steps)
        rows: list[Json] = []
        num_left = self.num_read
        for step in steps:
            num_left -= self.skipped_at[step]
            rows.append({"step": step, "dropped": self.skipped_at[step], "left": num_left})
        return rows
