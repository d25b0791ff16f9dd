"""Cleaning statistics: each document is kept or counted under one drop reason, step by step."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

from llm.artifact import Json
from llm.data.raw.records import Skip

MAX_REJECTED_EXAMPLES = 20
"""Per drop reason."""
STEPS = ("read", "filters", "length", "exact duplicates", "near duplicates", "decontamination")
COUNTERS = ("num_kept", "kept_bytes", "skipped", "skipped_at")


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A dropped document."""

    reason: str
    file: str
    line: int
    excerpt: str
    shard: int = 0
    record: int = 0
    """Ordinal among the shard's records: examples are listed in reading order."""


@dataclass(kw_only=True, slots=True)
class CleaningStats:
    """Counts of documents: read = train + validation + skipped."""

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
    """At least the first MAX_REJECTED_EXAMPLES of each reason."""
    num_decode_errors: int = 0

    def skip(self, skip: Skip, record: int, step: str) -> None:
        """Count a dropped document; keep it as an example if it is among the first."""
        self.count(skip.reason, step, 1)
        if self.skipped[skip.reason] <= MAX_REJECTED_EXAMPLES:
            self.add_example(skip, record)

    def count(self, reason: str, step: str, num_documents: int) -> None:
        """Count dropped documents; the caller adds the first as examples."""
        if num_documents:
            self.skipped_at[step] += num_documents
            self.skipped[reason] += num_documents

    def add_example(self, skip: Skip, record: int, shard: int = 0) -> None:
        """Keep a dropped document as an example."""
        self.examples.append(
            Example(
                reason=skip.reason,
                file=skip.location.file,
                line=skip.location.line,
                excerpt=skip.excerpt,
                shard=shard,
                record=record,
            )
        )

    def keep(self, side: str, size_bytes: int, num_documents: int = 1) -> None:
        """Count kept documents."""
        self.num_kept[side] += num_documents
        self.kept_bytes[side] += size_bytes

    def add(self, other: "CleaningStats", shard: int, lines_before: int) -> None:
        """Add what a shard read and dropped; what it kept may still be dropped.

        Its first record is `lines_before` lines after the start of its file.
        """
        self.num_read += other.num_read
        self.num_decode_errors += other.num_decode_errors
        self.skipped += other.skipped
        self.skipped_at += other.skipped_at
        for example in other.examples:
            line = example.line + lines_before
            self.examples.append(replace(example, shard=shard, line=line))

    def rejected(self) -> list[dict[str, Json]]:
        """Return the first examples of each reason, in reading order."""
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
    def from_json(cls, found: Json) -> "CleaningStats":
        """Return the stats that `to_json` described."""
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

    def funnel(self) -> list[Json]:
        """Return for each step how many documents it dropped and left."""
        assert self.num_read == self.num_kept.total() + self.skipped.total()
        assert set(self.skipped_at) <= set(STEPS)
        rows: list[Json] = []
        num_left = self.num_read
        for step in STEPS:
            num_left -= self.skipped_at[step]
            rows.append({"step": step, "dropped": self.skipped_at[step], "left": num_left})
        return rows
