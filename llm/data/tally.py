"""What became of documents: each is kept, or counted under one reason; the steps are a funnel."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from llm.artifact import Json
from llm.data.records import Skip

MAX_REJECTED_EXAMPLES = 20
"""Kept of each reason."""
STEPS = ("read", "filters", "length", "exact duplicates", "near duplicates", "decontamination")
"""In their order."""


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
    rejected: list[dict[str, Json]] = field(default_factory=list[dict[str, Json]])
    """The first examples of each reason."""
    num_decode_errors: int = 0

    def skip(self, skip: Skip, step: str) -> None:
        """Count a document that is left out, and keep it while it is one of the first."""
        self.skipped_at[step] += 1
        self.skipped[skip.reason] += 1
        if self.skipped[skip.reason] <= MAX_REJECTED_EXAMPLES:
            self.rejected.append(
                {
                    "reason": skip.reason,
                    "file": skip.place.file,
                    "line": skip.place.line,
                    "excerpt": skip.excerpt,
                }
            )

    def keep(self, side: str, size_bytes: int) -> None:
        """Count a document that is written."""
        self.num_kept[side] += 1
        self.kept_bytes[side] += size_bytes

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
