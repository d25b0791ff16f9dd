"""The optional cleaning steps on single documents: normalize, mask personal data, filter."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from llm.artifact import Json
from llm.config import CleanConfig
from llm.data.cleaning.filters import apply_c4, gopher_reason
from llm.data.cleaning.normalize import normalize
from llm.data.cleaning.personal_data import MaskCounts, mask
from llm.data.raw.reading import RawDocument


@dataclass(kw_only=True, slots=True)
class Changes:
    """Counts of changes in documents, kept or dropped later."""

    masked: MaskCounts = field(default_factory=MaskCounts)
    removed_lines: Counter[str] = field(default_factory=Counter[str])
    """By reason."""


class DocumentSteps:
    """Normalization, masking and the rules of C4 and Gopher, as enabled by the settings."""

    def __init__(self, settings: CleanConfig) -> None:
        """Start with no changes."""
        self.changes = Changes()
        self._settings = settings
        self._is_masking = settings.masks_emails or settings.masks_ip_addresses
        self._is_normalizing = settings.line_ends != "as_is" or settings.unicode_form != "as_is"

    def apply(self, document: RawDocument) -> str:
        """Change `document` and return the reason to drop it, or "". Chats are not filtered."""
        settings, reason = self._settings, ""
        if self._is_normalizing or self._is_masking:
            document.text = self._rewrite(document.text)
            for message in document.messages:
                message["content"] = self._rewrite(message["content"])
        if settings.filters == "none" or document.messages:
            return ""
        if not document.text.strip():
            return "empty"
        if "c4" in settings.filters:
            removed = self.changes.removed_lines
            document.text, reason = apply_c4(document.text, settings.c4, removed)
        if not reason and "gopher" in settings.filters:
            reason = gopher_reason(document.text, settings.gopher)
        return reason

    def summary(self) -> dict[str, Json]:
        """Return the counts of changes by the enabled steps."""
        settings, changes = self._settings, self.changes
        counts: dict[str, Json] = {}
        if settings.masks_emails:
            counts["masked_emails"] = changes.masked.num_emails
        if settings.masks_ip_addresses:
            counts["masked_ip_addresses"] = changes.masked.num_ip_addresses
        if "c4" in settings.filters:
            counts["removed_lines"] = dict(sorted(changes.removed_lines.items()))
        return counts

    def _rewrite(self, text: str) -> str:
        settings = self._settings
        if self._is_normalizing:
            text = normalize(text, settings.line_ends, settings.unicode_form)
        if self._is_masking:
            text = mask(
                text,
                self.changes.masked,
                emails=settings.masks_emails,
                ip_addresses=settings.masks_ip_addresses,
            )
        return text


def add_changes(total: dict[str, Json], found: Mapping[str, Json]) -> None:
    """Add a shard's counts of changes to the total."""
    for name, value in found.items():
        if isinstance(value, dict):
            counts = Counter(cast(dict[str, int], total.get(name, {})))
            counts.update(cast(dict[str, int], value))
            total[name] = dict(sorted(counts.items()))
        else:
            total[name] = cast(int, total.get(name, 0)) + cast(int, value)
